"""The loss against OpenCLIP's own; the model folder round trip."""

import numpy as np
import open_clip
import pytest
import torch

from dreslcl.common import ModelError
from dreslcl.config import EncoderConfig, ModelConfig
from dreslcl.encoder import Encoder
from dreslcl.model import DRESLCL, autocast, contrastive_loss

CONFIG = ModelConfig(codewords=4, width=16, heads=2, depth=1, dropout=0.0, joint_dim=8)


def unit(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=-1).requires_grad_()


def small_model(encoder=None, **about):
    torch.manual_seed(0)
    model = DRESLCL(encoder, CONFIG, dim=6, text_dim=5, frozen_text=True, about={"tiles": "features", "text": "vectors", **about})
    rng = np.random.default_rng(0)
    model.aggregator.set_codebook(rng.normal(size=(4, 6)).astype(np.float32), rng.normal(size=(9, 6)).astype(np.float32))
    return model


def test_info_nce_equals_open_clips_loss_and_gradient_when_all_reports_differ():
    z, u, scale = unit(7, 12, 0), unit(7, 12, 1), torch.tensor(9.0, requires_grad=True)
    ours = torch.autograd.grad(contrastive_loss(z, u, torch.arange(7), scale), (z, u, scale))
    theirs = torch.autograd.grad(open_clip.loss.ClipLoss()(z, u, scale), (z, u, scale))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(contrastive_loss(z, u, torch.arange(7), scale), open_clip.loss.ClipLoss()(z, u, scale))


def test_siglip_equals_open_clips_when_all_reports_differ():
    z, u, scale, bias = unit(7, 12, 0), unit(7, 12, 1), torch.tensor(9.0), torch.tensor(-4.0)
    ours = contrastive_loss(z, u, torch.arange(7), scale, bias=bias)
    torch.testing.assert_close(ours, open_clip.loss.SigLipLoss()(z, u, scale, bias))


def test_a_cpu_computes_in_float32_unless_bf16_is_asked_for():
    for precision, kind in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(torch.device("cpu"), precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == kind


def test_slides_with_one_report_are_positives_of_each_other():
    z, scale = unit(4, 12, 0), torch.tensor(20.0)
    u = unit(4, 12, 1)
    apart = contrastive_loss(z, u, torch.tensor([0, 1, 2, 3]), scale)
    together = contrastive_loss(z, u, torch.tensor([0, 0, 2, 3]), scale)
    by_hand = 0.0
    for logits in (scale * z @ u.T, scale * u @ z.T):
        log_p = logits.log_softmax(1)
        rows = [(log_p[0, 0] + log_p[0, 1]) / 2, (log_p[1, 0] + log_p[1, 1]) / 2, log_p[2, 2], log_p[3, 3]]
        by_hand = by_hand - torch.stack(rows).mean() / 2
    torch.testing.assert_close(together, by_hand)
    assert not torch.isclose(apart, together)


def test_a_saved_model_embeds_as_before(tmp_path):
    model = small_model(seen=["a"]).eval()
    features = np.random.default_rng(1).normal(size=(40, 6)).astype(np.float32)
    model.save(tmp_path)
    loaded = DRESLCL.load(tmp_path)
    assert loaded.about["seen"] == ["a"] and loaded.fingerprint() == model.fingerprint()
    np.testing.assert_allclose(loaded.embed_features([features]), model.embed_features([features[:9], features[9:]]), atol=1e-6)
    assert abs(np.linalg.norm(loaded.embed_features([features])) - 1) < 1e-5


def test_a_saved_model_keeps_its_tile_encoder(tmp_path):
    encoder = Encoder.create(EncoderConfig(), seed=3)
    model = DRESLCL(
        encoder, CONFIG, dim=encoder.dim, text_dim=encoder.text_dim, frozen_text=False, about={"tiles": "pixels", "text": "tower"}
    )
    model.save(tmp_path)
    loaded = DRESLCL.load(tmp_path)
    tiles = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_allclose(loaded.embed_tiles(tiles), model.embed_tiles(tiles), atol=1e-6)
    np.testing.assert_allclose(loaded.embed_text("carcinoma"), model.embed_text(["carcinoma"])[0], atol=1e-6)


def test_what_a_model_cannot_do_is_said(tmp_path):
    model = small_model()
    with pytest.raises(ModelError, match=r"width 7.*width 6"):
        model.embed_features([np.zeros((3, 7), np.float32)])
    with pytest.raises(ModelError, match="report vectors made elsewhere"):
        model.embed_text("carcinoma")
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        DRESLCL.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json"])
def test_a_damaged_model_folder_is_refused(tmp_path, name):
    small_model().save(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        DRESLCL.load(tmp_path)
