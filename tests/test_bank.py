"""The memory bank: sums follow their definition through fills, writes and new codebooks; what is cut short is put right; bank_share."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import refused, sums_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl.bank import BLOCKS, MemoryBank, SlideFile, block_of, fit_codebook, slide_layout
from dreslcl.common import ConfigError, DiskError, ModelError, StoreError
from dreslcl.model import nearest_codeword

D, K = 16, 5


def unit(rng, n, d=D):
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def filled(folder, spans, seed=0):
    """A bank filled with random features, with random codewords."""
    rng = np.random.default_rng(seed)
    bank = MemoryBank(folder, dim=D, codewords=K, encoder="enc")
    bank.create()
    for slide, tiles in spans.items():
        bank.fill(slide, unit(rng, tiles), tiles, "mark")
    bank.set_codebook(unit(rng, K))
    return bank


@pytest.fixture
def make_bank(tmp_path):
    return partial(filled, tmp_path / "bank")


def rows_of(bank, slide):
    return bank.read(slide, np.arange(bank._open(slide).tiles))[0]


def codes_of(bank, features):
    return nearest_codeword(torch.from_numpy(features), bank.codewords).numpy().astype(np.uint16)


def put(bank, slide, drawn, features, step=0, share=1.0):
    """What a training step does with one slide."""
    rest = bank.rest(slide, drawn, share, np.random.default_rng(0))
    return rest, bank.write(rest, features, codes_of(bank, features), np.ones(len(features), np.float16), step)


def loop_sums(bank, slide, tiles=None):
    """The definition, in float64, tile by tile."""
    codewords, rows = bank.codewords.double().numpy(), rows_of(bank, slide).astype(np.float64)
    weights = bank._open(slide).weight.astype(np.float64)
    sums, counts = np.zeros(codewords.shape), np.zeros(len(codewords))
    for row, weight in zip(*(rows, weights) if tiles is None else (rows[tiles], weights[tiles])):
        k = ((codewords - row) ** 2).sum(1).argmin()
        sums[k] += weight * (row - codewords[k])
        counts[k] += weight
    return sums, counts


def assert_consistent(bank, rtol=1e-5):
    for slide in (path.stem for path in bank.folder.glob("*.bank")):
        sums, counts = sums_of(bank, slide)
        expected, expected_counts = loop_sums(bank, slide)
        assert np.allclose(counts, expected_counts, rtol=rtol)
        assert np.abs(sums - expected).max() <= rtol * max(1, np.abs(expected).max())
        assert (sums[counts == 0] == 0).all()
        assert np.allclose(bank.mean(slide), rows_of(bank, slide).astype(np.float64).mean(0), atol=1e-5)


def test_what_is_filled_comes_back_rounded_to_float16_after_reopening(make_bank, tmp_path):
    spans = {"007": 9, "b (1)": 1, "c": 40}
    words = make_bank(spans, seed=3).codewords.numpy()
    forecast = sum(slide_layout(tiles, D, K).itemsize for tiles in spans.values())
    assert forecast == sum(f.stat().st_size for f in tmp_path.glob("bank/*.bank"))
    bank, rng = MemoryBank(tmp_path / "bank", dim=D, codewords=K, encoder="enc"), np.random.default_rng(3)
    assert [bank.has(slide, tiles, "mark") for slide, tiles in spans.items()] == [True] * 3
    assert not bank.has("007", 9, "another grid") and not bank.has("007", 8, "mark") and not bank.has("nobody", 3, "mark")
    bank.set_codebook(words)
    for slide, tiles in spans.items():
        order = np.random.default_rng(1).permutation(tiles)
        assert (bank.read(slide, order)[0] == unit(rng, tiles).astype(np.float16)[order]).all()
    features = unit(rng, 30)
    bank.fill("parts", (features[i : i + 7] for i in range(0, 30, 7)), 30, "mark", step=4)
    assert (rows_of(bank, "parts") == features.astype(np.float16)).all()
    assert_consistent(bank)


@settings(deadline=None, max_examples=40)
@given(tiles=st.integers(1, 60), share=st.floats(0, 1), beside=st.integers(0, 20), data=st.data())
def test_writes_keep_sums_as_defined_and_the_rest_is_the_other_tiles_of_its_blocks(tmp_path_factory, tiles, share, beside, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    bank = filled(tmp_path_factory.mktemp("b"), {"a": tiles, "z": 3})
    bank.set_codebook(unit(rng, K).astype(np.float16).astype(np.float32))
    for step in range(3):
        drawn = rng.permutation(tiles)[: data.draw(st.integers(1, tiles))]
        fresh = unit(rng, len(drawn))
        fresh[: len(fresh) // 3] = bank.codewords[0]  # exactly on a codeword
        rest = bank.rest("a", drawn, share, rng, beside)
        assert (rest.tiles[: len(drawn)] == drawn).all() and len(rest.tiles) <= len(drawn) + beside
        assert np.isin(block_of(rest.tiles[len(drawn) :]), rest.used).all()
        others = np.setdiff1d(np.arange(tiles), rest.tiles)
        used = others[np.isin(block_of(others), rest.used)]
        sums, counts = loop_sums(bank, "a", used)
        assert np.allclose(rest.counts, counts, rtol=1e-4) and np.allclose(rest.sums, sums, rtol=1e-4, atol=1e-3)
        weights = bank._open("a").weight
        assert not rest.sums[rest.counts == 0].any() and (rest.counts.numpy()[loop_sums(bank, "a", used)[1] == 0] == 0).all()
        assert (rest.rows()[0] == rows_of(bank, "a")[used]).all() and (rest.rows()[1] == weights[used]).all()
        codes = codes_of(bank, np.concatenate([fresh, rest.old[len(drawn) :].astype(np.float32)]))
        bank.write(rest, fresh, codes, np.exp(rng.uniform(-5, 5, len(codes))).astype(np.float16), step)
        assert (bank.read("a", drawn)[0] == fresh.astype(np.float16)).all()
        assert_consistent(bank, rtol=1e-4)


@pytest.mark.parametrize("tiles", [76, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_bank_share_is_the_share_of_the_other_tiles_that_is_used(make_bank, tiles, share):
    bank, rng, drawn = make_bank({"a": tiles}), np.random.default_rng(1), np.arange(16)
    rests = [bank.rest("a", drawn, share, rng) for _ in range(100)]
    used = np.array([float(rest.counts.sum()) for rest in rests]) / (tiles - 16)
    assert abs(used.mean() - share) < 0.03
    if 0 < share < 1:
        assert len({tuple(rest.used) for rest in rests}) > 30, "others each time"
        assert used.std() < 0.1 + 1 / BLOCKS, "and no step far from it"


@pytest.mark.parametrize("tiles", [76, 700, 5000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rows_beside_the_drawn_ones_are_about_as_many_as_asked_for_where_there_are_so_many(make_bank, tiles, share):
    bank, rng, drawn = make_bank({"a": tiles}), np.random.default_rng(1), np.arange(16)
    for _ in range(30):
        rest = bank.rest("a", drawn, share, rng, 200)
        there = np.isin(block_of(np.arange(16, tiles)), rest.used).sum()
        assert 0.8 * min(200, there) <= len(rest.tiles) - 16 <= min(200, there)


def test_blocks_are_even_also_among_few_tiles():
    for tiles in (16, 76, 1000):
        sizes = np.bincount(block_of(np.arange(tiles)), minlength=BLOCKS)
        assert len(sizes) == BLOCKS and np.ptp(sizes) <= max(2, tiles // 50)


def test_two_thousand_writes_leave_sums_equal_to_a_recomputation(make_bank):
    bank, rng = make_bank({"a": 500}), np.random.default_rng(1)
    for step in range(2000):
        drawn = rng.choice(500, 16, replace=False)
        near = bank.read("a", drawn)[0].astype(np.float32) + 0.05 * unit(rng, 16)
        put(bank, "a", drawn, near / np.linalg.norm(near, axis=1, keepdims=True), step)
    sums, counts = sums_of(bank, "a")
    bank._rebuild(bank._open("a"))
    again, again_counts = sums_of(bank, "a")
    assert (counts == again_counts).all() and counts.max() > 0
    assert np.linalg.norm(sums - again) <= 1e-4 * np.linalg.norm(again)


def test_a_write_notes_its_step_and_returns_the_cosine_between_old_and_new_rows(make_bank):
    bank, drawn = make_bank({"a": 5}), np.array([1, 3])
    old = bank.read("a", drawn)[0].astype(np.float32)
    rest, cosine = put(bank, "a", drawn, np.stack([old[0], -old[1]]), step=7)
    assert np.allclose(cosine, [1, -1], atol=1e-3) and rest.age.tolist() == [0, 0]
    assert bank.rest("a", np.arange(5), 1.0, np.random.default_rng(0)).age.tolist() == [0, 7, 0, 7, 0]


def test_a_bank_of_another_encoder_or_width_is_refused_with_both_named(make_bank, tmp_path):
    make_bank({"a": 3})
    good = {"dim": D, "codewords": K, "encoder": "enc"}
    for key, asked, there in (("encoder", "other", "enc"), ("dim", 99, D), ("codewords", 8, K)):
        with pytest.raises(StoreError, match=f"{key} {there}, asked for {asked}"):
            MemoryBank(tmp_path / "bank", **good | {key: asked})
    header = json.loads((tmp_path / "bank" / "bank.json").read_text())
    damaged = ["{", "[]", "{}", "[1]", '"x"', '{"version": 1, "dim": 128}', '{"version": 2, "dim": [], "codewords": {}, "encoder": 3}']
    for text in (json.dumps(header | {"version": 9}), *damaged):
        (tmp_path / "bank" / "bank.json").write_text(text)
        with refused(StoreError, "version 9, asked for 3" if "9" in text else None):
            MemoryBank(tmp_path / "bank", **good)


def test_a_truncated_slide_counts_as_not_there_and_is_refused_when_used(make_bank, tmp_path):
    bank = make_bank({"a": 30})
    os.truncate(tmp_path / "bank" / "a.bank", 800)
    with pytest.raises(StoreError, match=r"a\.bank: 800 bytes are no whole slide"):
        bank._open("a")
    assert not MemoryBank(tmp_path / "bank", dim=D, codewords=K, encoder="enc").has("a", 30, "mark")


def test_wrong_features_and_a_full_disk_are_refused_and_leave_what_was_there(make_bank, tmp_path, monkeypatch):
    bank, rng = make_bank({"a": 4}), np.random.default_rng(0)
    before = rows_of(bank, "a").copy()
    for features, message in (
        (unit(rng, 3), "3 features for 4 tiles"),
        (unit(rng, 5), "5 features for 4 tiles"),
        (unit(rng, 4, D + 1), f"the bank has D {D}"),
        (np.full((4, D), np.nan, np.float32), "not finite"),
        (np.full((4, D), 1e6, np.float32), "not finite"),
    ):
        with pytest.raises((StoreError, ModelError), match=message):
            bank.fill("a", features, 4, "mark")
        assert [p.name for p in tmp_path.glob("bank/*")] != [] and not list(tmp_path.glob("bank/*.part"))
        assert bank.has("a", 4, "mark") and (rows_of(bank, "a") == before).all()
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with refused(DiskError, r"a\.bank: cannot be written \(No space left on device\); make room"):
        bank.fill("a", unit(rng, 4), 4, "mark")
    assert bank.has("a", 4, "mark") and not list(tmp_path.glob("bank/*.part"))


def test_slides_come_and_go_and_a_codebook_covers_those_filled_later(make_bank):
    bank, rng = make_bank({"a": 6, "b": 7}), np.random.default_rng(0)
    bank.fill("c", unit(rng, 8), 8, "mark")
    bank.set_codebook(unit(rng, K))
    bank.fill("a", unit(rng, 3), 3, "tiled anew")
    assert bank.has("a", 3, "tiled anew")
    assert_consistent(bank)


class Cut(np.ndarray):
    """Refuses to be written."""

    def __getitem__(self, key):
        return np.asarray(self)[key]

    def __setitem__(self, key, value):
        raise KeyboardInterrupt


@pytest.mark.parametrize("field", ["rows", "step", "code", "weight", "sums", "counts", "mean"])
def test_a_write_cut_short_is_put_right_when_the_slide_is_next_used(make_bank, field):
    bank, rng = make_bank({"a": 50, "b": 50}), np.random.default_rng(4)
    assert_consistent(bank)
    rest = bank.rest("b", np.arange(20), 1.0, rng)
    setattr(rest.slide, field, getattr(rest.slide, field).view(Cut))
    with pytest.raises(KeyboardInterrupt):
        bank.write(rest, unit(rng, 20), np.zeros(20, np.uint16), np.ones(20, np.float16), 1)
    assert_consistent(bank)


def test_a_sample_takes_the_same_number_from_each_slide_however_they_are_dealt(make_bank):
    bank = make_bank({"a": 3, "b": 100, "c": 50})
    sample = bank.sample(["a", "b", "c"], 8, seed=0)
    assert sample.shape == (3 + 8 + 8, D)
    assert (np.concatenate([bank.sample(["a"], 8, 0), bank.sample(["b", "c"], 8, 0)]) == sample).all()
    rows = {row.tobytes() for row in rows_of(bank, "b").astype(np.float32)}
    assert sum(row.tobytes() in rows for row in sample) == 8


def test_a_bank_many_times_a_memory_limit_is_used_without_rss_growing(tmp_path):
    """Steps on a 1 GB sparse bank; its slides are all zeros where not written."""

    def rss() -> float:
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmRSS")).split()[1]) / 1024

    rng, M, slides = np.random.default_rng(0), 125_000, [f"s{i}" for i in range(8)]
    bank = MemoryBank(tmp_path, dim=512, codewords=4, encoder="e")
    bank.create()
    bank.set_codebook(unit(rng, 4, 512))
    for slide in slides:
        with (tmp_path / f"{slide}.bank").open("wb") as file:
            file.truncate(slide_layout(M, 512, 4).itemsize)
        new = SlideFile(tmp_path / f"{slide}.bank", 512, 4)
        new.mark[0], new.codebook[0], new.counts[:, 0] = "m", bank.codebook, M / 8
        assert bank.has(slide, M, "m")
    start = peak = 0
    for step in range(240):
        for slide in rng.choice(slides, 2, replace=False):
            rest = bank.rest(str(slide), rng.choice(M, 64, replace=False), 0.5, rng)
            bank.write(rest, unit(rng, 64, 512), np.zeros(64, np.uint16), np.ones(64, np.float16), step)
        start = start or rss()
        peak = max(peak, rss())
    size = 8 * M * 1024 / 2**20
    assert peak - start < size / 10, f"RSS grew from {start} to {peak} MB with a bank of {size} MB"


def test_k_means_finds_clusters_leaves_no_codeword_empty_and_refuses_too_few_rows():
    rng = np.random.default_rng(0)
    centres = unit(rng, 4)
    rows = np.repeat(centres, 50, axis=0) + 0.01 * rng.normal(size=(200, D)).astype(np.float32)
    words = fit_codebook(rows, 4, seed=0)
    assert np.abs(np.sort(words, axis=0) - np.sort(centres, axis=0)).max() < 0.02
    assert (fit_codebook(rows, 4, seed=0) == words).all()
    lumpy = np.concatenate([np.repeat(rows[:1], 500, axis=0), rows[50:53]])
    assert len(np.unique(nearest_codeword(torch.from_numpy(lumpy), torch.from_numpy(fit_codebook(lumpy, 4, seed=0))))) == 4
    with pytest.raises(ConfigError, match="3 codewords asked for, but the 500 sampled tile features have 1 distinct values"):
        fit_codebook(lumpy[:500], 3, seed=0)
