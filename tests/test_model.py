"""The method on one page: residual sums, aggregators, the loss against OpenCLIP's own, the model's folder."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dreslcl.common import ConfigError, ModelError
from dreslcl.config import ModelConfig
from dreslcl.model import AGGREGATORS, DRESLCL, Bag, Gate, ResidualAggregator, contrastive_loss, nearest_codeword, residual_sums, unevenness
from dreslcl.text import make_text

CONFIG = ModelConfig(codewords=4, width=16, depth=1, dropout=0.0, joint_dim=8)
D, K = 6, 4


def features(n, seed=0, d=D):
    return nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def vectors_text(width=5):
    return make_text("auto", None, [np.zeros((1, width), np.float32)])


def make_aggregator(name="residual", **changes):
    torch.manual_seed(0)
    made = AGGREGATORS[name](D, 8, ModelConfig(**{**vars(CONFIG), **changes})).eval()
    made.codewords.copy_(features(K, 5))
    made.set_statistics(features(9, 6))
    return made


def small_model(aggregator="residual", **about):
    torch.manual_seed(0)
    model = DRESLCL(
        None, vectors_text(), ModelConfig(**{**vars(CONFIG), "aggregator": aggregator}), dim=D, about={"tiles": "features", **about}
    )
    model.aggregator.codewords.copy_(features(K, 5))
    model.aggregator.set_statistics(features(9, 6))
    return model


# residual sums


def test_the_nearest_codeword_is_that_of_least_distance_as_the_bank_rounds_it():
    x, words = features(300, 1), features(K, 2)
    assert (nearest_codeword(x, words) == torch.cdist(x.half().double(), words.double()).argmin(1)).all()


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 40), parts=st.integers(1, 3), seed=st.integers(0, 99))
def test_residual_sums_equal_a_loop_over_tiles_forward_and_gradient(n, parts, seed):
    x, words = features(n, seed).double().requires_grad_(), features(K, 7).double()
    weights = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    codes = nearest_codeword(x, words)
    part_of = torch.arange(n) % parts
    sums, counts = residual_sums(x, codes, words, weights=weights, part_of=part_of, parts=parts)
    expected, expected_counts = torch.zeros(parts, K, D, dtype=torch.float64), torch.zeros(parts, K, dtype=torch.float64)
    for i in range(n):
        expected[part_of[i], codes[i]] += weights[i] * (x[i] - words[codes[i]])
        expected_counts[part_of[i], codes[i]] += weights[i]
    torch.testing.assert_close(sums, expected)
    torch.testing.assert_close(counts, expected_counts)
    assert not sums[counts == 0].any()
    direction = torch.randn(parts, K, D, dtype=torch.float64)
    if n:
        ours, theirs = (torch.autograd.grad((s * direction).sum(), x, retain_graph=True)[0] for s in (sums, expected))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_bags_of_parts_add_up_to_the_bag_of_the_slide_in_any_order(name):
    made, x = make_aggregator(name).double(), features(50, 3).double()
    whole = made(made.bag(x))
    torch.testing.assert_close(made(made.bag(x[:13]) + made.bag(x[13:])), whole)
    torch.testing.assert_close(made(made.bag(x[torch.randperm(50)])), whole)
    twice = made.bag(x, torch.tensor([2.0] * 13 + [1.0] * 37).double())
    torch.testing.assert_close(made(twice), made(made.bag(torch.cat([x[:13], x]))), msg="a tile of weight 2 counts as two")


# aggregators


@pytest.mark.parametrize("name, changes", [(name, {}) for name in AGGREGATORS] + [("residual", {"mean_path": False})])
def test_every_aggregator_gives_unit_vectors_and_learns_in_all_its_weights(name, changes):
    made = make_aggregator(name, **changes).train()
    bags = [made.bag(features(30, seed)) for seed in range(5)]
    rows = tuple(row for bag in bags for row in bag.rows)
    bag = Bag(torch.cat([b.sums for b in bags]), torch.cat([b.counts for b in bags]), rows, tuple(torch.ones(30) for _ in rows))
    z = made(bag)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    (z * features(5, 9, 8)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_tiles_weigh_about_one_at_the_start_then_what_the_gate_says_within_its_bound():
    aggregator, rows = ResidualAggregator(8, 4, ModelConfig(codewords=3, width=16)), torch.randn(50, 8)
    assert (aggregator.weigh(rows).log().abs() < 1).all()
    torch.nn.init.normal_(aggregator.gate.score.weight, std=30)
    weights = aggregator.weigh(rows)
    assert weights.min() >= np.exp(-5) * 0.999 and weights.max() <= np.exp(5) * 1.001 and weights.max() / weights.min() > 100
    mean = aggregator.mean(aggregator.bag(rows))[0]
    torch.testing.assert_close(mean, (weights[:, None] * rows).sum(0) / weights.sum(), rtol=1e-4, atol=1e-5)


def test_the_gate_sees_directions_not_lengths_and_unevenness_is_from_zero_to_log_n():
    gate, x = Gate(8, 16), torch.randn(50, 8)
    torch.testing.assert_close(gate(100 * x), gate(x))
    assert gate(-x).ne(gate(x)).all()
    assert unevenness(torch.full((50,), 3.0)).item() == pytest.approx(0, abs=1e-6)
    assert unevenness(torch.eye(50)[0]).item() == pytest.approx(np.log(50))


def test_an_empty_codeword_has_a_finite_gradient_and_an_empty_slide_encodes():
    made = make_aggregator()
    x = made.codewords[0].repeat(5, 1).requires_grad_()  # all on one codeword: residuals of zero
    z = made(made.bag(x))
    assert torch.isfinite(torch.autograd.grad(z.sum(), x)[0]).all()
    assert torch.isfinite(made(Bag(torch.zeros(1, K, D), torch.zeros(1, K)))).all()


def test_the_mean_is_that_of_the_slide_less_the_centre_and_statistics_follow():
    made, x = make_aggregator("mean-mlp").double(), features(40, 1).double()
    torch.testing.assert_close(made.mean(made.bag(x))[0], x.mean(0) - made.centre)
    means = features(7, 2).double()
    made.set_statistics(means)
    torch.testing.assert_close(made.standardised(means).mean(0), torch.zeros(D).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(made.standardised(means).var(0, correction=0), torch.ones(D).double())
    before = made.centre.clone()
    made.set_statistics(means + 1, momentum=0.5)
    torch.testing.assert_close(made.centre, before + 0.5)


def test_a_feature_that_is_the_same_in_all_slides_does_not_blow_up_the_mean_path():
    made, means = make_aggregator(), features(20, 1)
    means[:, 0] = 0.25
    made.set_statistics(means)
    moved = made.standardised(torch.cat([means[:, :1] + 1e-3, means[:, 1:]], 1))
    assert moved[:, 0].abs().max() < 0.1
    made.set_statistics(torch.ones(3, D))
    assert (made.spread == 1).all()


def test_an_aggregator_of_ones_own_is_used_by_its_name_and_an_unknown_one_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(AGGREGATORS, "own", type("Own", (AGGREGATORS["attention"],), {}))
    small_model("own").save(tmp_path)
    assert type(DRESLCL.load(tmp_path).aggregator).__name__ == "Own"
    monkeypatch.delitem(AGGREGATORS, "own")
    with pytest.raises(ModelError, match="no aggregator 'own'; there are residual, attention, mean-mlp"):
        DRESLCL.load(tmp_path)
    with pytest.raises(ConfigError, match="put your own into"):
        small_model("own")


def test_both_paths_of_the_residual_encoder_start_at_comparable_scale_even_where_slides_hardly_differ():
    rng, base = np.random.default_rng(0), features(1, 8)[0]
    slides = [nn.functional.normalize(base + 0.02 * torch.from_numpy(rng.normal(size=(60, D))).float(), dim=1) for _ in range(12)]
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        made = ResidualAggregator(D, 8, CONFIG).eval()
        made.codewords.copy_(torch.cat(slides)[torch.randperm(720)[:K]])
        made.set_statistics(torch.stack([x.mean(0) for x in slides]))
        bags = [made.bag(x) for x in slides]
        bag = Bag(torch.cat([b.sums for b in bags]), torch.cat([b.counts for b in bags]))
        z = made(bag)
        mean = made.mean_head(made.mean(bag) / made.spread)
        ratios.append(float(mean.std(0).norm() / z.std(0).norm()))
    assert 0.1 < np.median(ratios) < 10


# loss


def test_info_nce_equals_open_clips_loss_and_gradient_when_all_reports_differ():
    z, u = (features(7, seed, 12).double().requires_grad_() for seed in (0, 1))
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    losses = contrastive_loss(z, u, torch.arange(7), scale), open_clip.loss.ClipLoss()(z, u, scale)
    torch.testing.assert_close(*losses)
    for ours, theirs in zip(*(torch.autograd.grad(loss, (z, u, scale)) for loss in losses)):
        torch.testing.assert_close(ours, theirs)


def test_slides_with_one_report_are_positives_of_each_other():
    z, u, scale = features(4, 0, 12).double(), features(4, 1, 12).double(), torch.tensor(20.0).double()
    together = contrastive_loss(z, u, torch.tensor([0, 0, 2, 3]), scale)
    by_hand = 0.0
    for logits in (scale * z @ u.T, scale * u @ z.T):
        log_p = logits.log_softmax(1)
        rows = [(log_p[0, 0] + log_p[0, 1]) / 2, (log_p[1, 0] + log_p[1, 1]) / 2, log_p[2, 2], log_p[3, 3]]
        by_hand = by_hand - torch.stack(rows).mean() / 2
    torch.testing.assert_close(together, by_hand)
    assert not torch.isclose(contrastive_loss(z, u, torch.arange(4), scale), together)


# the folder


@pytest.mark.parametrize("name", list(AGGREGATORS))
def test_a_saved_model_embeds_as_before(tmp_path, name):
    model, x = small_model(name, seen=["a"]).eval(), features(40, 1).numpy()
    model.save(tmp_path)
    loaded = DRESLCL.load(tmp_path)
    assert loaded.about["seen"] == ["a"] and loaded.fingerprint() == model.fingerprint()
    np.testing.assert_allclose(loaded.embed_features([x]), model.embed_features([x[:9], x[9:]]), atol=1e-6)
    assert abs(np.linalg.norm(loaded.embed_features([x])) - 1) < 1e-5


def test_a_saved_model_keeps_its_towers(model, tmp_path):
    made, tiles = DRESLCL.load(model), np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    with torch.no_grad():
        for p in made.encoder.parameters():
            p.mul_(1.01)
    made.save(tmp_path)
    loaded = DRESLCL.load(tmp_path)
    np.testing.assert_allclose(loaded.embed_tiles(tiles), made.embed_tiles(tiles), atol=1e-6)
    np.testing.assert_allclose(loaded.embed_text("carcinoma"), made.embed_text(["carcinoma"])[0], atol=1e-6)


def test_what_a_model_cannot_do_is_said(tmp_path):
    model = small_model()
    with pytest.raises(ModelError, match=r"width 7.*width 6"):
        model.embed_features([np.zeros((3, 7), np.float32)])
    with pytest.raises(ModelError, match="made elsewhere"):
        model.embed_text("carcinoma")
    with pytest.raises(ModelError, match="no tile encoder"):
        model.embed_tiles(np.zeros((1, 64, 64, 3), np.uint8))
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        DRESLCL.load(tmp_path)
