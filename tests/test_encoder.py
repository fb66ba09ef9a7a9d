import json
import pickle
import socket

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from dreslcl.common import ModelError
from dreslcl.config import EncoderConfig
from dreslcl.encoder import Augmentation, Encoder, clean_report, describe_encoder, list_encoders

REPORT = " ".join(f"Finding {i}: the margin measures {i} mm, free of tumour." for i in range(40))


@pytest.fixture(scope="module")
def tiny():
    return Encoder.create(EncoderConfig()).eval()


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def tiles(n=3, height=96, width=96, seed=0):
    """Smooth colours with an edge, so that interpolation matters."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    return torch.from_numpy(np.stack([np.asarray(Image.fromarray(s).resize((width, height))) for s in small]))


def build(vision, **rest):
    """A small OpenCLIP model of our own configuration, as an Encoder."""
    cfg = {
        "embed_dim": 32,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    clip = open_clip.CLIP(**cfg)
    open_clip.model.set_model_preprocess_cfg(clip, {**open_clip.transform.PreprocessCfg(size=clip.visual.image_size).__dict__, **rest})
    return Encoder(clip, open_clip.SimpleTokenizer(), cfg, "ours", False).eval()


VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
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
    assert ((ours - theirs) * encoder.std).abs().max() <= (1.01 if shape[0] == shape[1] else 2.01) / 255  # tiles are square


def test_tiles_of_the_towers_size_are_not_touched(tiny):
    batch = tiles(2, *tiny.image_size)
    assert torch.equal(tiny.preprocess(batch), batch.permute(0, 3, 1, 2).float() / 255)


def test_tile_features_are_unit_norm_and_do_not_depend_on_the_batch(tiny):
    with torch.inference_mode():
        whole = tiny.encode_tiles(tiles(4))
        single = torch.cat([tiny.encode_tiles(tile[None]) for tile in tiles(4)])
    assert whole.shape == (4, tiny.dim)
    assert torch.allclose(whole.norm(dim=1), torch.ones(4), atol=1e-5)
    assert torch.allclose(whole, single, atol=1e-5)


def test_same_seed_gives_the_same_random_weights_and_leaves_the_global_state_alone():
    state = torch.get_rng_state()
    first, second, other = (Encoder.create(EncoderConfig(), seed=seed).fingerprint() for seed in (1, 1, 2))
    assert first == second != other
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_turns_and_stains_as_told():
    images = torch.rand(2, 3, 8, 8).clamp_min(1 / 256)
    still = Augmentation(torch.tensor([0, 0]), torch.ones(2, 3))
    assert torch.allclose(still(images), images, atol=1e-6)
    turned = Augmentation(torch.tensor([1, 6]), torch.ones(2, 3))(images)
    assert torch.allclose(turned[0], torch.rot90(images[0], 1, (1, 2)), atol=1e-6)
    assert torch.allclose(turned[1], torch.rot90(images[1], 2, (1, 2)).flip(2), atol=1e-6)
    darker = Augmentation(torch.tensor([0, 0]), torch.full((2, 3), 2.0))(images)
    assert torch.allclose(-darker.log(), -2 * images.log(), atol=1e-4)


def test_augmentation_in_parts_equals_the_whole():
    views = Augmentation.draw(5, torch.Generator().manual_seed(0), 0.15)
    images = torch.rand(5, 3, 8, 8)
    assert torch.equal(torch.cat([views.part(0, 2)(images[:2]), views.part(2, 5)(images[2:])]), views(images))


# reports


def test_long_report_is_read_in_overlapping_windows_that_fit_and_lose_no_word(tiny):
    windows = tiny.split_report(REPORT)
    assert len(windows) > 3
    assert all(len(tiny.tokenizer.encode(window)) <= tiny.context - 2 for window in windows)
    words, place = REPORT.split(), 0
    for window in windows:
        own = window.split()
        starts = [i for i in range(place + 1) if words[i : i + len(own)] == own]
        assert starts, "a window leaves a gap to what was read before"
        place = starts[-1] + len(own)
    assert place == len(words)


def test_short_report_is_one_window_and_an_empty_one_is_read_too(tiny):
    assert tiny.split_report("Benign lung tissue.") == ["Benign lung tissue."]
    assert tiny.split_report(" \n") == [""]
    with torch.inference_mode():
        assert torch.isfinite(tiny.encode_reports([""])).all()


def test_sentences_are_pieces_of_their_own(tiny):
    assert tiny.split_report("Grade 2. Margins free; no nodes. pT2a", sentences=True) == ["Grade 2.", "Margins free;", "no nodes.", "pT2a"]


def test_vector_of_a_long_report_is_the_mean_of_its_windows(tiny):
    with torch.inference_mode():
        both = tiny.encode_reports([REPORT, "Short."])
        mean = tiny.encode_texts(tiny.split_report(REPORT)).mean(0)
        assert torch.allclose(both[0], mean, atol=1e-5)
        assert torch.allclose(both[1], tiny.encode_texts(["Short."])[0], atol=1e-5)


def test_cleaning_mends_what_character_recognition_left():
    assert clean_report("adeno-\ncarcinoma ..... of\tthe\x00 lung ____ pT2 | 3 x 2 cm") == "adenocarcinoma of the lung pT2 3 x 2 cm"
    assert clean_report("pT2a, 0.5 µm (10 %) – größe >5; KRAS p.G12C") == "pT2a, 0.5 µm (10 %) größe >5; KRAS p.G12C"


# what learns


def trainable(encoder):
    return {n for n, p in encoder.clip.visual.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("vision", "blocks", "head"), [(VIT, "transformer.resblocks", "proj"), (TIMM, "trunk.blocks", "head.proj.weight")])
def test_last_n_tunes_the_last_blocks_and_the_projection(vision, blocks, head):
    encoder = build(vision)
    count = 1 + max(int(n.split(".")[len(blocks.split("."))]) for n, _ in encoder.clip.visual.named_parameters() if n.startswith(blocks))
    encoder.set_trainable("last:1", text=False)
    assert head in trainable(encoder)
    assert {n.split(".")[len(blocks.split("."))] for n in trainable(encoder) if n.startswith(blocks)} == {str(count - 1)}
    encoder.set_trainable("head", text=False)
    assert head in trainable(encoder) and not any(n.startswith(blocks) for n in trainable(encoder))
    encoder.set_trainable("last:99", text=False)
    assert sum(n.startswith(blocks) for n in trainable(encoder)) == sum(
        n.startswith(blocks) for n, _ in encoder.clip.visual.named_parameters()
    )
    encoder.set_trainable("none", text=True)
    assert not trainable(encoder) and all(p.requires_grad for p in encoder.text_parameters())
    encoder.set_trainable("all", text=False)
    assert len(trainable(encoder)) == len(encoder.tower_parameters()) and not any(p.requires_grad for p in encoder.text_parameters())


def test_tower_without_known_blocks_refuses_last_n():
    encoder = build({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8})  # a ResNet
    with pytest.raises(ModelError, match="use --tune all, head or none"):
        encoder.set_trainable("last:1", text=False)
    encoder.set_trainable("head", text=False)
    assert trainable(encoder) and all(n.startswith("attnpool") for n in trainable(encoder))


def test_batch_norm_keeps_its_statistics_in_training():
    encoder = build({"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}).train()
    before = encoder.fingerprint()
    encoder.encode_tiles(tiles())
    assert encoder.training and encoder.fingerprint() == before


# files


def test_saved_folder_gives_the_same_features_in_openclip_itself(tiny, saved, no_network):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{saved}")
    batch = tiles(3, 100, 100)
    with torch.inference_mode():
        ours = tiny.encode_tiles(batch)
        theirs = model.eval().encode_image(torch.stack([transform(Image.fromarray(t.numpy())) for t in batch]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{saved}")(["benign"]), normalize=True)
    assert (ours - theirs).abs().max() < 2e-3
    assert torch.allclose(text, tiny.encode_texts(["benign"]), atol=1e-5)


@pytest.mark.parametrize("name", ["saved", "ViT-like"])
def test_saved_and_loaded_encoder_has_the_same_fingerprint_and_features(tiny, tmp_path, name):
    encoder = tiny if name == "saved" else build(VIT, mean=(0.1, 0.2, 0.3), interpolation="bilinear")
    encoder.save(tmp_path)
    again = Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}")).eval()
    with torch.inference_mode():
        assert torch.equal(again.encode_tiles(tiles()), encoder.encode_tiles(tiles()))
    assert again.fingerprint() == encoder.fingerprint() and again.pretrained


def test_fingerprint_depends_on_weights_and_preprocessing():
    plain = build(VIT)
    shifted = build(VIT, mean=(0.1, 0.2, 0.3))
    other = build(VIT)
    with torch.no_grad():
        next(other.clip.visual.parameters()).mul_(1.01)
    assert len({e.fingerprint() for e in (plain, shifted, other)}) == 3


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "model.pth"])
def test_pickled_code_in_a_local_folder_is_never_run(saved, tmp_path, name):
    (tmp_path / "open_clip_config.json").write_text((saved / "open_clip_config.json").read_text())
    (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "ran")}))
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "zipped.bin")
    for stored in (name, "zipped.bin"):
        with pytest.raises(ModelError, match="cannot be loaded") as caught:
            Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}"))
        assert "\n" not in str(caught.value)
        (tmp_path / stored).unlink()
    assert not (tmp_path / "ran").exists()


def test_pickled_code_in_a_weights_file_is_never_run(tmp_path):
    torch.save({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Encoder.create(EncoderConfig(pretrained=str(tmp_path / "weights.pt")))
    assert not (tmp_path / "ran").exists()


def damage(folder, how):
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    if how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "another architecture":
        cfg = json.loads(config.read_text())
        cfg["model_cfg"]["vision_cfg"] = VIT
        config.write_text(json.dumps(cfg))
    elif how == "broken configuration":
        config.write_text("{")
    elif how == "no configuration":
        config.unlink()
    elif how == "made-up architecture":
        config.write_text(json.dumps({"model_cfg": {"embed_dim": 3, "vision_cfg": {"timm_model_name": "nonsense"}, "text_cfg": {}}}))


@pytest.mark.parametrize(
    "how", ["truncated weights", "no weights", "another architecture", "broken configuration", "no configuration", "made-up architecture"]
)
def test_damaged_local_folder_is_refused_in_one_line(tiny, tmp_path, how):
    tiny.save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ModelError, match=r"needs open_clip_config\.json and open_clip_model\.safetensors") as caught:
        Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path}"))
    assert "\n" not in str(caught.value)


# names


def test_unknown_name_suggests_near_ones():
    with pytest.raises(ModelError, match="near names: ViT-B-32"):
        Encoder.create(EncoderConfig(name="ViT-B/32"))


def test_unknown_tag_lists_the_tags():
    with pytest.raises(ModelError, match=r"no weights 'opeanai'; tags: openai"):
        Encoder.create(EncoderConfig(name="ViT-B-32", pretrained="opeanai"))


@pytest.mark.parametrize("config", [EncoderConfig(name="hf-hub:nobody/nothing"), EncoderConfig(name="ViT-B-32", pretrained="openai")])
def test_failed_download_says_what_to_do_offline(config, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("Name or service not known\nmany more lines")

    for where in ("download_pretrained", "download_pretrained_from_hf"):
        monkeypatch.setattr(f"open_clip.factory.{where}", fail)
    with pytest.raises(ModelError, match="without a network, copy") as caught:
        Encoder.create(config)
    assert "\n" not in str(caught.value)


def test_random_weights_touch_no_network(no_network):
    Encoder.create(EncoderConfig())


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
    windows = encoder.split_report(REPORT)
    assert len(windows) > 3 and all(len(encoder._tokens(window)) <= 46 for window in windows)
    encoder.save(tmp_path / "saved")
    again = Encoder.create(EncoderConfig(name=f"local-dir:{tmp_path / 'saved'}")).eval()
    with torch.inference_mode():
        assert torch.allclose(again.encode_reports([REPORT]), encoder.encode_reports([REPORT]), atol=1e-6)
    encoder.set_trainable("none", text=True)
    assert len(encoder.text_parameters()) > 10 and all(p.requires_grad for p in encoder.text_parameters())


def test_tag_of_quick_gelu_weights_switches_the_activation(monkeypatch):
    seen = {}

    def create(name, pretrained, **options):
        seen.update(options)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model", create)
    for name, tag in (("ViT-B-32", "openai"), ("ViT-B-32-quickgelu", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")):
        with pytest.raises(ModelError):
            Encoder.create(EncoderConfig(name=name, pretrained=tag))
        assert seen["force_quick_gelu"] == (tag == "openai")


def test_encoders_are_described_without_building_weights(no_network):
    assert list_encoders()[0] == "dreslcl-tiny" and "ViT-S-16" in list_encoders()
    row = describe_encoder("ViT-S-16")
    assert (row["width"], row["image_px"], row["tokens"]) == (384, 224, 77)
    assert 21 < row["image_millions"] < 23 and "tiles_per_s" not in row
    assert describe_encoder("dreslcl-tiny", measure=True)["tiles_per_s"] > 0


# how the towers compute


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}


def towers_gradients(vision, **execution):
    """Features of tiles and texts, and the gradients of all weights behind them."""
    encoder = build(vision).train()
    encoder.set_execution(**execution)
    features, texts = encoder.encode_tiles(tiles(4)), encoder.encode_texts(["carcinoma", "benign"])
    weights = torch.linspace(0, 1, features.shape[1])
    (features @ weights).square().sum().add((texts @ weights).square().sum()).backward()
    return features.detach(), {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("vision", [VIT, TIMM, TIMM | {"timm_model_name": "test_efficientnet_gn"}], ids=["ViT", "timm ViT", "timm CNN"])
def test_checkpointing_changes_no_gradient_and_computes_blocks_twice(vision, monkeypatch):
    calls = []
    original = torch.nn.Module.__call__
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda self, *a, **k: calls.append(type(self)) or original(self, *a, **k))
    features, plain = towers_gradients(vision)
    once = len(calls)
    again, checkpointed = towers_gradients(vision, checkpointing=True)
    assert len(calls) - once > 1.4 * once, "no block was computed again"
    torch.testing.assert_close(again, features)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


def test_a_tower_without_checkpointing_says_so():
    with pytest.raises(ModelError, match="offers no activation checkpointing; lower --tile-batch"):
        build(RESNET).set_execution(checkpointing=True)


def test_a_tower_that_cannot_be_compiled_says_so(monkeypatch):
    encoder = build(VIT)
    monkeypatch.setattr(encoder.clip.visual, "compile", lambda: monkeypatch.setattr(encoder, "encode_tiles", lambda _: 1 / 0))
    with pytest.raises(ModelError, match=r"cannot be compiled here \(division by zero\); leave --compile out"):
        encoder.set_execution(compile=True)


@pytest.mark.slow
def test_compiling_changes_no_gradient_and_no_fingerprint():
    (features, plain), (again, compiled) = towers_gradients(VIT), towers_gradients(VIT, compile=True)
    torch.testing.assert_close(again, features, rtol=1e-4, atol=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4)
    encoder = build(VIT)
    before = encoder.fingerprint()
    encoder.set_execution(compile=True)
    assert encoder.fingerprint() == before
