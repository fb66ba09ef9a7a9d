import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
from folders import Bomb, refused
from PIL import Image

from dreslcl.common import ModelError
from dreslcl.config import EncoderConfig
from dreslcl.encoder import Augmentation, Encoder, autocast, cached_features
from dreslcl.text import make_text

REPORT = " ".join(f"Finding {i}: the margin measures {i} mm, free of tumour." for i in range(40))


def tiles(n=3, height=96, width=96, seed=0):
    """Smooth colours with an edge, so that interpolation matters."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([np.asarray(Image.fromarray(s).resize((width, height))) for s in small]))


def build(vision, **rest):
    """A small OpenCLIP model of our own configuration, as an Encoder."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    cfg = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**cfg)
    open_clip.model.set_model_preprocess_cfg(clip, {**open_clip.transform.PreprocessCfg(size=clip.visual.image_size).__dict__, **rest})
    return Encoder(clip, open_clip.SimpleTokenizer(), cfg, "ours", pretrained=False, reads=False).eval()


VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
TIMM = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 32}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(96, 96), (48, 48), (32, 32), (20, 20), (70, 45), (45, 71)])
def test_preprocessing_equals_openclips_transform_within_one_grey_level(interpolation, resize_mode, shape):
    encoder = build(VIT, interpolation=interpolation, resize_mode=resize_mode, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), fill_color=255)
    batch = tiles(2, *shape)
    ours = (encoder.preprocess(batch) - encoder.mean) / encoder.std
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**encoder.preprocess_cfg), is_train=False)
    theirs = torch.stack([transform(Image.fromarray(tile.numpy())) for tile in batch])
    assert ours.shape == theirs.shape
    if shape == encoder.image_size:
        assert torch.equal(encoder.preprocess(batch), batch.permute(0, 3, 1, 2).float() / 255), "not touched"
    assert ((ours - theirs) * encoder.std).abs().max() <= (1.01 if shape[0] == shape[1] else 2.01) / 255  # tiles are square


def test_tile_features_are_unit_norm_and_do_not_depend_on_the_batch(tiny):
    with torch.inference_mode():
        whole = tiny.encode_tiles(tiles(4))
        single = torch.cat([tiny.encode_tiles(tile[None]) for tile in tiles(4)])
    assert whole.shape == (4, tiny.dim)
    assert torch.allclose(whole.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(whole, single, atol=1e-5)


def test_same_seed_gives_the_same_random_weights_from_no_network_and_leaves_the_global_state_alone(no_network):
    state = torch.get_rng_state()
    first, second, other = (Encoder.create(EncoderConfig(), seed=seed).fingerprint() for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_lays_tiles_all_eight_ways_and_stains_as_told():
    images = torch.rand(1, 3, 8, 8).clamp_min(1 / 256)
    turned = [torch.rot90(images[0], k, (1, 2)) for k in range(4)]
    found = set()
    for turn in torch.cartesian_prod(*[torch.tensor([False, True])] * 3):
        (view,) = Augmentation(turn[None], torch.ones(1, 3))(images)
        found |= {n for n, image in enumerate([*turned, *(i.flip(2) for i in turned)]) if torch.allclose(view, image, atol=1e-6)}
    assert len(found) == 8
    darker = Augmentation(torch.zeros(1, 3, dtype=torch.bool), torch.full((1, 3), 2.0))(images)
    assert torch.allclose(-darker.log(), -2 * images.log(), atol=1e-4)


# what learns


def trainable(encoder, tune=None, text=False):
    if tune:
        encoder.set_trainable(tune, text=text)
    return {n for n, p in encoder.clip.visual.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("vision", "blocks", "head"), [(VIT, "transformer.resblocks", "proj"), (TIMM, "trunk.blocks", "head.proj.weight")])
def test_last_n_tunes_the_last_blocks_and_the_projection(vision, blocks, head):
    encoder = build(vision)

    def numbers(names):
        return {int(name.removeprefix(blocks).split(".")[1]) for name in names if name.startswith(blocks)}

    every = numbers(name for name, _ in encoder.clip.visual.named_parameters())
    for tune, expected in (("last:1", {max(every)}), ("last:0", set()), ("last:99", every)):
        learns = trainable(encoder, tune)
        assert numbers(learns) == expected and head in learns
    assert not trainable(encoder, "none", text=True) and all(p.requires_grad for p in encoder.text_parameters())
    assert len(trainable(encoder, "all")) == len(encoder.tower_parameters())
    assert not any(p.requires_grad for p in encoder.text_parameters())


def test_the_last_block_of_a_resnet_is_its_last_stage_and_a_tower_without_known_blocks_refuses_last_n():
    encoder = build(RESNET)
    for last, expected in ((0, {"attnpool"}), (1, {"layer4", "attnpool"})):
        assert {name.split(".")[0] for name in trainable(encoder, f"last:{last}")} == expected
    encoder.blocks = list
    with pytest.raises(ModelError, match="use --tune all or none"):
        encoder.set_trainable("last:1", text=False)


def test_blocks_nearer_to_the_image_learn_more_slowly():
    encoder = build(TIMM)
    rates = {name: encoder.learning_rates(0.5)[p] for name, p in encoder.clip.visual.named_parameters()}
    depth = len(encoder.blocks())
    assert rates["trunk.patch_embed.proj.weight"] == 0.5 ** (depth + 1) and rates["trunk.blocks.0.attn.qkv.weight"] == 0.5**depth
    assert rates[f"trunk.blocks.{depth - 1}.attn.qkv.weight"] == 0.5 and rates["head.proj.weight"] == rates["trunk.norm.weight"] == 1


def test_batch_norm_keeps_its_statistics_in_training():
    encoder = build(RESNET).train()
    before = encoder.fingerprint()
    encoder.encode_tiles(tiles())
    assert encoder.training and encoder.fingerprint() == before


# files


@pytest.mark.parametrize("kind", ["tiny", "vit"])
def test_a_saved_encoder_has_the_same_fingerprint_and_features_here_and_in_openclip_itself(tiny, tmp_path, no_network, kind):
    encoder, name, batch = tiny if kind == "tiny" else build(VIT, mean=(0.1, 0.2, 0.3)), f"local-dir:{tmp_path}", tiles(3, 100, 100)
    encoder.save(tmp_path)
    again, (model, transform) = Encoder.create(EncoderConfig(name)).eval(), open_clip.create_model_from_pretrained(name)
    with torch.inference_mode():
        ours = encoder.encode_tiles(batch)
        theirs = model.eval().encode_image(torch.stack([transform(Image.fromarray(t.numpy())) for t in batch]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(["benign"]), normalize=True)
        assert torch.equal(again.encode_tiles(batch), ours) and (ours - theirs).abs().max() < 2e-3
    assert again.fingerprint() == encoder.fingerprint() and again.pretrained
    assert torch.allclose(text, make_text("tower", encoder, ["benign"]).encode(["benign"]), atol=1e-5)


@pytest.mark.parametrize("tower", ["dreslcl-tiny", "timm:test_vit"])
def test_a_saved_text_tower_is_pretrained_where_it_has_learnt_and_not_else(tmp_path, tower):
    encoder = Encoder.create(EncoderConfig(tower))
    for learns in (False, True):
        encoder.set_trainable("all", text=learns)
        encoder.save(tmp_path)
        again = Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}"))
        assert again.reads is learns and make_text("tower", again, ["benign"]).learns is not learns
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    (tmp_path / "open_clip_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "reads"}))
    assert Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}")).reads  # made elsewhere, with both towers


def test_fingerprint_depends_on_weights_and_preprocessing():
    plain, shifted, other = build(VIT), build(VIT, mean=(0.1, 0.2, 0.3)), build(VIT)
    with torch.no_grad():
        next(other.clip.visual.parameters()).mul_(1.01)
    assert len({e.fingerprint() for e in (plain, shifted, other)}) == 3


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth", "zipped.bin", "weights.pt"])
def test_pickled_code_in_a_local_folder_or_a_weights_file_is_never_run(tiny, tmp_path, name):
    tiny.save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    code = {"state_dict": Bomb(tmp_path / "ran")}
    if name in ("zipped.bin", "weights.pt"):
        torch.save(code, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(code))
    file = name == "weights.pt"
    with refused(ModelError, "cannot be loaded"):
        Encoder.create(EncoderConfig(pretrained=str(tmp_path / name)) if file else EncoderConfig(f"local-dir:{tmp_path}"))
    assert not (tmp_path / "ran").exists()


WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
DAMAGE = {
    "truncated weights": lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:1000]),
    "no weights": lambda at: (at / WEIGHTS).unlink(),
    "another architecture": lambda at: build(VIT).save(at / "other") or (at / "other" / CONFIG).replace(at / CONFIG),
    "broken configuration": lambda at: (at / CONFIG).write_text("{"),
    "no configuration": lambda at: (at / CONFIG).unlink(),
    "made-up architecture": lambda at: (at / CONFIG).write_text(
        json.dumps({"model_cfg": {"embed_dim": 3, "vision_cfg": {"timm_model_name": "nonsense"}, "text_cfg": {}}})
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_local_folder_is_refused_in_one_line(tiny, tmp_path, how):
    tiny.save(tmp_path)
    DAMAGE[how](tmp_path)
    with refused(ModelError, r"needs open_clip_config\.json and open_clip_model\.safetensors"):
        Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}"))


# names


@pytest.mark.parametrize(
    "config, message",
    [
        (EncoderConfig("ViT-B/32"), "near names: ViT-B-32"),
        (EncoderConfig("ViT-B-32", "opeanai"), "no weights 'opeanai'; tags: openai"),
        (EncoderConfig(pretrained="draw"), "tags: drawn"),
    ],
)
def test_an_unknown_name_or_tag_is_told_with_those_there_are(config, message):
    with pytest.raises(ModelError, match=message):
        Encoder.create(config)


@pytest.mark.parametrize("config", [EncoderConfig("hf-hub:nobody/nothing"), EncoderConfig("ViT-B-32", "openai")])
def test_failed_download_says_what_to_do_offline(config, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known\nmany more lines")

    for where in ("download_pretrained", "download_pretrained_from_hf"):
        monkeypatch.setattr(f"open_clip.factory.{where}", fail)
    with refused(ModelError, "without a network, copy"):
        Encoder.create(config)


def test_text_tower_of_transformers_asks_for_the_package():
    if "transformers" in open_clip.hf_model.__dict__ and open_clip.hf_model.transformers is not None:
        pytest.skip("transformers is installed")
    with pytest.raises(ModelError, match="pip install transformers"):
        Encoder.create(EncoderConfig(name="roberta-ViT-B-32"))


def test_text_tower_of_transformers_reads_windows_and_survives_saving(tmp_path, no_network, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    transformers.BertConfig(vocab_size=len(words), **shape).save_pretrained(tmp_path / "bert")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler", "context_length": 48}
    text["hf_tokenizer_name"] = text["hf_model_name"]
    (tmp_path / "our-bert.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": VIT, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "our-bert.json")
    encoder = Encoder.create(EncoderConfig(name="our-bert")).eval()
    text = make_text("tower", encoder, [REPORT])
    pieces = text.pieces(REPORT)
    assert len(pieces) > 3 and all(text.size(piece) <= 46 for piece in pieces)
    encoder.save(tmp_path / "saved")
    again = Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path / 'saved'}")).eval()
    with torch.inference_mode():
        assert torch.allclose(make_text("tower", again, [REPORT]).vector(REPORT), text.vector(REPORT), atol=1e-6)
    encoder.set_trainable("none", text=True)
    assert len(encoder.text_parameters()) > 10 and all(p.requires_grad for p in encoder.text_parameters())


def test_tag_of_quick_gelu_weights_switches_the_activation(monkeypatch):
    seen = {}
    monkeypatch.setattr(open_clip, "create_model", lambda name, pretrained, **options: seen.update(options) or 1 / 0)
    for name, tag in (("ViT-B-32", "openai"), ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(ModelError):
            Encoder.create(EncoderConfig(name=name, pretrained=tag))
        assert seen["force_quick_gelu"] == (tag == "openai")


# how the towers compute


def test_a_cpu_and_a_gpu_that_emulates_bf16_compute_in_float32_unless_bf16_is_asked_for(monkeypatch):
    for precision, kind in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with autocast(torch.device("cuda"), "auto"):
        assert not torch.is_autocast_enabled("cuda")


def test_a_tower_with_dropout_drops_the_same_in_both_passes():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).double()
    x, gradients = torch.rand(7, 4, dtype=torch.float64), []
    for tile_batch in (3, 7):
        layer.zero_grad()
        torch.manual_seed(0)
        seen = []
        features = cached_features(lambda _, *some, seen=seen: seen.append(layer(torch.stack(some))) or seen[-1], list(x), tile_batch)
        features.square().sum().backward()
        if tile_batch == 3:
            assert all(torch.equal(a.detach(), b.detach()) for a, b in zip(seen[:2], seen[:2:-1], strict=True))
        gradients.append(layer[0].weight.grad.clone())
    assert gradients[0].norm() > 0


def test_the_embedded_model_has_weights_that_know_drawn_tissue_and_a_text_tower_that_knows_nothing(caplog):
    drawn = Encoder.create(EncoderConfig(pretrained="drawn"))
    assert drawn.pretrained and drawn.fingerprint() != Encoder.create(EncoderConfig()).fingerprint()
    assert make_text("tower", drawn, ["a report", "another"]).learns and "random weights" in caplog.text
