import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl import residual
from dreslcl.bank import MemoryBank
from dreslcl.common import ConfigError, StoreError
from dreslcl.config import ModelConfig
from dreslcl.residual import Codebook, ResidualAggregator, assign, encode_residuals, refreshed_residuals, residual_sums


def unit(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def make_bank(folder, rng, spans, codewords, on_codeword=0):
    """A filled bank in which the first `on_codeword` tiles of each slide lie exactly on a codeword."""
    K, D = codewords.shape
    bank = MemoryBank.create(folder / "bank", spans, D, K, encoder="e", grids="g")
    for slide, tiles in spans.items():
        rows = unit(rng, tiles, D)
        rows[:on_codeword] = codewords[rng.integers(0, K, len(rows[:on_codeword]))]
        bank.fill(slide, rows)
    bank.set_codebook(codewords, "w")
    return bank


def make_aggregator(bank, codewords, E=8, seed=0, **options):
    torch.manual_seed(seed)
    K, D = codewords.shape
    aggregator = ResidualAggregator(D, E, ModelConfig(codewords=K, width=16, depth=1, heads=2, **options)).eval()
    aggregator.set_codebook(codewords, bank.slide_means())
    return aggregator


def whole_slide(bank, slide, tiles, fresh, codewords):
    """The definition: residuals of all M tiles at once, the drawn ones replaced by fresh features."""
    rows = torch.from_numpy(bank.gather(slide, np.arange(bank.tiles(slide)))).float()
    rows = rows.index_put((torch.from_numpy(tiles),), fresh)
    codes = ((rows[:, None] - codewords[None]) ** 2).sum(2).argmin(1)
    sums = torch.stack([(rows[codes == k] - codewords[k]).sum(0) for k in range(len(codewords))])
    return sums, torch.stack([(codes == k).sum() for k in range(len(codewords))]).float()


def relative(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


def test_assignment_equals_the_nearest_codeword_by_distance():
    rng = np.random.default_rng(0)
    features, codewords = torch.from_numpy(unit(rng, 500, 24)), torch.from_numpy(unit(rng, 9, 24))
    assert (assign(features, codewords) == torch.cdist(features, codewords).argmin(1)).all()
    with torch.autocast("cpu", torch.bfloat16):  # residual maths stays float32
        assert (assign(features, codewords) == torch.cdist(features.double(), codewords.double()).argmin(1)).all()


def test_residual_sums_equal_a_loop_over_tiles_forward_and_gradient():
    rng = np.random.default_rng(0)
    features = torch.from_numpy(unit(rng, 40, 6)).requires_grad_()
    codewords = torch.from_numpy(unit(rng, 5, 6))
    codes = torch.from_numpy(rng.integers(0, 4, 40))  # the last codeword stays empty
    sums, counts = residual_sums(features, codes, codewords)
    expected = torch.stack([sum([features[i] - codewords[k] for i in range(40) if codes[i] == k], torch.zeros(6)) for k in range(5)])
    assert torch.allclose(sums, expected, atol=1e-6) and counts.tolist() == [(codes == k).sum() for k in range(5)]
    assert (sums[4] == 0).all()
    weight = torch.from_numpy(rng.normal(size=(5, 6)).astype(np.float32))
    (found,) = torch.autograd.grad((sums * weight).sum(), features)
    assert torch.allclose(found, weight[codes])


@settings(deadline=None, max_examples=25)
@given(data=st.data(), K=st.integers(2, 9), D=st.integers(2, 24), seed=st.integers(0, 10_000))
def test_incremental_equals_all_tiles_forward_and_gradient(tmp_path_factory, data, K, D, seed):
    rng = np.random.default_rng(seed)
    spans = {f"s{i}": data.draw(st.integers(1, 60)) for i in range(data.draw(st.integers(1, 4)))}
    drawn = [data.draw(st.one_of(st.just(1), st.just(M), st.integers(1, M))) for M in spans.values()]
    codewords = unit(rng, K, D).astype(np.float16).astype(np.float32)
    bank = make_bank(tmp_path_factory.mktemp("b"), rng, spans, codewords, on_codeword=data.draw(st.integers(0, 5)))
    aggregator = make_aggregator(bank, codewords)
    tiles = [rng.permutation(M)[:T] for M, T in zip(spans.values(), drawn)]
    features = unit(rng, sum(drawn), D)
    features[::4] = codewords[0]
    weight = torch.from_numpy(rng.normal(size=(len(spans), 8)).astype(np.float32))
    results = []
    for full in (False, True):
        fresh = torch.from_numpy(features).requires_grad_()
        if full:
            parts = zip(spans, tiles, fresh.split(drawn))
            pairs = [whole_slide(bank, slide, index, part, aggregator.codewords) for slide, index, part in parts]
            sums, counts = (torch.stack(x) for x in zip(*pairs))
        else:
            sums, counts = refreshed_residuals(bank, list(spans), tiles, fresh, aggregator.codewords)
            assert (sums[counts == 0] == 0).all()
        z = aggregator(sums, counts)
        results.append((z.detach(), torch.autograd.grad((z * weight).sum(), fresh)[0], counts))
    (z, gradient, counts), (full_z, full_gradient, full_counts) = results
    assert (counts == full_counts).all()
    assert relative(z, full_z) <= 1e-5
    assert relative(gradient, full_gradient) <= 1e-5


@pytest.fixture
def small(tmp_path):
    """A bank of two slides, its codewords, and four drawn tiles of each slide with fresh features."""
    rng = np.random.default_rng(5)
    codewords = unit(rng, 6, 12)
    bank = make_bank(tmp_path, rng, {"a": 30, "b": 50}, codewords)
    tiles = [rng.permutation(30)[:4], rng.permutation(50)[:4]]
    return bank, torch.from_numpy(codewords), tiles, torch.from_numpy(unit(rng, 8, 12))


def test_with_all_tiles_fresh_any_bank_content_gives_what_no_bank_gives(small):
    bank, codewords, _, _ = small
    rng = np.random.default_rng(1)
    tiles, fresh = [rng.permutation(30), rng.permutation(50)], torch.from_numpy(unit(rng, 80, 12))
    found = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords)
    alone = refreshed_residuals(None, ["a", "b"], tiles, fresh, codewords)
    assert all((x == y).all() for x, y in zip(found, alone))  # to the bit


def test_all_other_bank_rows_drawn_one_by_one_equal_the_running_sums(small):
    bank, codewords, tiles, fresh = small
    sums, counts = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords)
    rng = np.random.default_rng(0)
    drawn, drawn_counts = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, bank_tiles=46, rngs=[rng, rng])
    assert (counts == drawn_counts).all() and relative(drawn, sums) <= 1e-5
    _, few = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, bank_tiles=10, rngs=[rng, rng])
    assert few.sum(1).tolist() == [14, 14]


def test_slides_without_fresh_tiles_are_what_the_bank_holds(small):
    bank, codewords, _, _ = small
    none = [np.empty(0, np.int64)] * 2
    for scale in ("1", "full"):
        sums, counts = refreshed_residuals(bank, ["a", "b"], none, torch.empty(0, 12), codewords, gradient_scale=scale)
        assert (sums[1].numpy() == bank.residuals("b")[0]).all() and counts.sum(1).tolist() == [30, 50]


def test_stale_dropout_leaves_out_bank_rows_and_keeps_the_count(small):
    bank, codewords, tiles, fresh = small
    fresh = fresh.requires_grad_()
    rng = np.random.default_rng(0)
    sums, counts = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, stale_dropout=0.6, rngs=[rng, rng])
    assert torch.allclose(counts.sum(1), torch.tensor([30.0, 50.0]))
    (gradient,) = torch.autograd.grad(sums[0].sum(), fresh)
    weight = float(gradient[0, 0])  # each fresh tile of a slide stands for the rows left out
    assert 1 + 0.3 * 26 / 4 < weight < 1 + 0.9 * 26 / 4 and (gradient[4:] == 0).all()
    mean = torch.stack(
        [refreshed_residuals(bank, ["a"], tiles[:1], fresh[:4], codewords, stale_dropout=0.5, rngs=[rng, rng])[1] for _ in range(400)]
    ).mean(0)
    kept = torch.from_numpy(bank.residuals("a", without=tiles[0])[1]) * 0.5
    fresh_counts = torch.bincount(assign(fresh[:4], codewords), minlength=6) * (1 + 0.5 * 26 / 4)
    assert torch.allclose(mean[0], kept + fresh_counts, atol=1.0)


def test_stale_dropout_takes_bounded_many_other_rows_out_of_the_sums(small, monkeypatch):
    bank, codewords, tiles, fresh = small
    for count in (0, 1, 25, 26):
        out = residual._other_tiles(tiles[0], 30, count, np.random.default_rng(count))
        assert len(set(out)) == count and set(out) <= set(range(30)) - set(tiles[0])
    drawn = [set(residual._other_tiles(tiles[0], 30, 8, np.random.default_rng(i))) for i in range(100)]
    assert set.union(*drawn) == set(range(30)) - set(tiles[0])  # each of the others can go
    taken = []
    monkeypatch.setattr(
        residual, "_other_tiles", lambda *given: taken.append(given[2]) or np.setdiff1d(np.arange(given[1]), given[0])[: given[2]]
    )
    monkeypatch.setattr(residual, "LEFT_OUT_ROWS", 5)
    sums, counts = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, stale_dropout=0.9, rngs=[np.random.default_rng(0)] * 2)
    kept = [np.setdiff1d(np.arange(M), index)[5:] for M, index in zip((30, 50), tiles)]
    parts = [residual_sums(part, assign(part, codewords), codewords) for part in fresh.split(4)]
    expected = [torch.from_numpy(bank.residuals(slide, rest)[0]) + 9 / 4 * new[0] for slide, rest, new in zip("ab", kept, parts)]
    assert taken == [5, 5] and relative(sums, torch.stack(expected)) <= 1e-5
    assert torch.allclose(counts.sum(1), torch.tensor([30.0, 50.0]))


def test_full_gradient_scale_multiplies_the_gradient_by_m_over_t_and_changes_no_value(small):
    bank, codewords, tiles, fresh = small
    fresh = fresh.requires_grad_()
    plain, _ = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords)
    scaled, _ = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, gradient_scale="full")
    assert (plain == scaled).all()
    gradients = [torch.autograd.grad((x**2).sum(), fresh)[0] for x in (plain, scaled)]
    assert torch.allclose(gradients[1], gradients[0] * torch.tensor([30 / 4, 50 / 4]).repeat_interleave(4)[:, None])


def test_soft_assignment_equals_its_definition_and_tends_to_the_hard_one(small):
    bank, codewords, tiles, fresh = small
    shares = (-20 * torch.cdist(fresh, codewords) ** 2).softmax(1)
    expected = (shares[:, :, None] * (fresh[:, None] - codewords[None])).sum(0)
    sums, counts = encode_residuals(fresh, codewords, soft=20.0)
    assert torch.allclose(sums, expected, atol=1e-5) and torch.allclose(counts, shares.sum(0), atol=1e-5)
    hard, _ = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords)
    soft, _ = refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords, soft=1e5)
    assert relative(soft, hard) < 1e-4


def test_a_slide_in_parts_encodes_like_the_whole_slide():
    rng = np.random.default_rng(0)
    features, codewords = torch.from_numpy(unit(rng, 100, 8)), torch.from_numpy(unit(rng, 5, 8))
    whole = encode_residuals(features, codewords)
    parts = [encode_residuals(part, codewords) for part in features.split(33)]
    assert all(torch.allclose(sum(part), x, atol=1e-5) for part, x in zip(zip(*parts), whole))


def test_tile_order_changes_nothing_and_an_empty_codeword_has_a_finite_gradient(small):
    bank, codewords, _, _ = small
    aggregator = make_aggregator(bank, codewords.numpy())
    rng = np.random.default_rng(0)
    fresh = codewords[[0, 0, 1]].clone().requires_grad_()  # tiles on their codewords; the other codewords are empty
    sums, counts = refreshed_residuals(None, ["a"], [np.arange(3)], fresh, codewords)
    assert not sums.any()
    z = aggregator(sums, counts)
    (gradient,) = torch.autograd.grad(z[0, 0], fresh)
    assert torch.isfinite(gradient).all() and torch.isfinite(z).all()
    order = rng.permutation(3)
    assert torch.allclose(aggregator(*refreshed_residuals(None, ["a"], [np.arange(3)], fresh[order], codewords)), z, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"mean_path": False}, {"count_term": False}, {"intra_norm": False}])
def test_every_form_of_the_aggregator_gives_unit_vectors_and_learns_in_all_its_weights(small, options):
    bank, codewords, tiles, fresh = small
    aggregator = make_aggregator(bank, codewords.numpy(), **options)
    z = aggregator(*refreshed_residuals(bank, ["a", "b"], tiles, fresh, codewords))
    assert z.shape == (2, 8) and torch.allclose(z.norm(dim=1), torch.ones(2), atol=1e-5)
    (z**3).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in aggregator.parameters())


def test_the_mean_path_sees_the_slide_mean_less_the_centre(small):
    bank, codewords, _, _ = small
    aggregator = make_aggregator(bank, codewords.numpy())
    none = [np.empty(0, np.int64)] * 2
    mean = aggregator.mean(*refreshed_residuals(bank, ["a", "b"], none, torch.empty(0, 12), codewords))
    expected = np.stack([bank.gather(s, np.arange(bank.tiles(s))).astype(np.float64).mean(0) for s in ("a", "b")])
    assert np.allclose(mean.numpy(), expected - expected.mean(0), atol=1e-6)


def test_both_paths_start_at_comparable_scale_even_where_slides_hardly_differ(tmp_path):
    rng = np.random.default_rng(0)
    common, D = unit(rng, 64), 64  # an untrained encoder: one common direction, and little else
    rows = {f"s{i}": common + 1e-2 * unit(rng, D) + 3e-2 * unit(rng, 80, D) for i in range(12)}
    rows = {slide: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for slide, x in rows.items()}
    bank = MemoryBank.create(tmp_path / "bank", dict.fromkeys(rows, 80), D, 8, encoder="e", grids="g")
    for slide, x in rows.items():
        bank.fill(slide, x)
    book = Codebook.fit(bank.sample(40, 0), 8, seed=0, encoder="e")
    bank.set_codebook(book.codewords, book.fingerprint)
    aggregator = make_aggregator(bank, book.codewords, E=32)
    none = [np.empty(0, np.int64)] * 12
    sums, counts = refreshed_residuals(bank, bank.slides, none, torch.empty(0, D), aggregator.codewords)
    with torch.no_grad():
        mean = aggregator.mean_head(aggregator.mean(sums, counts) / aggregator.spread)
        z = aggregator(sums, counts)
        aggregator.mean_head = None
        read = aggregator(sums, counts)  # unit norm: the other path's direction
        assert 0.3 < mean.norm(dim=1).mean() / 32**0.5 / 0.577 < 3  # its linear layers start with outputs of deviation 1/√3
        assert (z @ z.T).fill_diagonal_(0).mean() < 0.9 * (read @ read.T).fill_diagonal_(0).mean()


def clusters(rng, K, n, D=16, noise=0.05):
    centres = unit(rng, K, D)
    rows = centres[rng.integers(0, K, n)] + noise * unit(rng, n, D)
    return centres, rows.astype(np.float32)


@pytest.mark.parametrize("n", [600, 25_000])
def test_the_codebook_finds_clusters_and_the_same_seed_gives_the_same_codebook(n, caplog):
    centres, rows = clusters(np.random.default_rng(0), 7, n)
    with caplog.at_level(logging.INFO, "dreslcl.residual"):
        book = Codebook.fit(rows, 7, seed=1, encoder="e")
    distance = np.linalg.norm(centres[:, None] - book.codewords[None], axis=2)
    assert sorted(distance.argmin(1)) == list(range(7)) and distance.min(1).max() < 0.05
    assert (Codebook.fit(rows, 7, seed=1, encoder="e").codewords == book.codewords).all()
    assert f"7 codewords from {n} rows" in caplog.text and "share of rows per codeword" in caplog.text


def test_a_codebook_of_more_codewords_than_distinct_features_is_refused():
    rows = np.repeat(unit(np.random.default_rng(0), 3, 8), 50, axis=0)
    with pytest.raises(ConfigError, match="4 codewords asked for, but the 150 sampled tile features have 3 distinct values"):
        Codebook.fit(rows, 4, seed=0, encoder="e")
    book = Codebook.fit(rows, 3, seed=0, encoder="e")
    assert len(np.unique(assign(torch.from_numpy(rows), torch.from_numpy(book.codewords)))) == 3


def test_codewords_that_end_empty_move_to_far_rows(monkeypatch):
    import sklearn.cluster

    rng = np.random.default_rng(0)
    rows = unit(rng, 50, 8)

    def fit(self, rows):
        self.cluster_centers_ = np.concatenate([rows[:1], np.full((3, 8), 9.0)])
        return self

    monkeypatch.setattr(sklearn.cluster.KMeans, "fit", fit)
    book = Codebook.fit(rows, 4, seed=0, encoder="e")
    assert (torch.bincount(assign(torch.from_numpy(rows), torch.from_numpy(book.codewords)), minlength=4) > 0).all()


def test_matching_gives_each_codeword_back_its_old_place():
    rng = np.random.default_rng(0)
    old = Codebook(unit(rng, 9, 12), "e")
    order = rng.permutation(9)
    new = Codebook((old.codewords + 0.01 * unit(rng, 9, 12))[order], "e2")
    matched = new.match(old)
    assert np.abs(matched.codewords - old.codewords).max() < 0.02 and matched.encoder == "e2"


def test_a_codebook_saves_and_loads_and_refuses_another_encoder(tmp_path):
    book = Codebook(unit(np.random.default_rng(0), 4, 6), "enc-1")
    book.save(tmp_path / "codebook")
    again = Codebook.load(tmp_path / "codebook", "enc-1")
    assert (again.codewords == book.codewords).all() and again.fingerprint == book.fingerprint
    with pytest.raises(StoreError, match="encoder enc-1, asked for enc-2"):
        Codebook.load(tmp_path / "codebook", "enc-2")
    (tmp_path / "bad").write_bytes(b"nothing of the kind")
    for name in ("bad", "absent"):
        with pytest.raises(StoreError, match="not a codebook"):
            Codebook.load(tmp_path / name)


def test_a_feature_that_is_the_same_in_all_slides_does_not_blow_up_the_mean_path():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(6, 8)).astype(np.float32)
    means[:, 3] = 0.25  # a dead channel
    aggregator = ResidualAggregator(8, 4, ModelConfig(codewords=2, width=8, heads=2))
    aggregator.set_codebook(rng.normal(size=(2, 8)).astype(np.float32), means)
    for _ in range(100):
        aggregator.track(torch.from_numpy(means) - aggregator.centre)
    assert float(aggregator.spread[3]) == pytest.approx(0.1 * float(aggregator.spread.square().mean().sqrt()), rel=0.1)
    moved = torch.from_numpy(means[:1]) + 1e-4
    assert float(((moved - aggregator.centre) / aggregator.spread)[0, 3]) < 0.01
