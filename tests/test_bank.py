"""The memory bank: sums follow their definition through fills, writes and new codebooks; what is cut short is put right; bank_share."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import numpy as np
import pytest
import torch
from folders import sums_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl.bank import BLOCKS, MemoryBank, SlideFile, block_of, fit_codebook, slide_layout
from dreslcl.common import ConfigError, ModelError, StoreError
from dreslcl.model import nearest_codeword

D, K = 16, 5


def unit(rng, n, d=D):
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def filled(folder, spans, seed=0, codebook=True):
    """A bank filled with random features, with random codewords."""
    rng = np.random.default_rng(seed)
    bank = MemoryBank(folder, dim=D, codewords=K, encoder="enc")
    bank.create()
    for slide, tiles in spans.items():
        bank.fill(slide, unit(rng, tiles), tiles, "mark")
    if codebook:
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
    bank, rng = MemoryBank(tmp_path / "bank", dim=D, codewords=K, encoder="enc"), np.random.default_rng(3)
    assert [bank.has(slide, tiles, "mark") for slide, tiles in spans.items()] == [True] * 3
    assert not bank.has("007", 9, "another grid") and not bank.has("007", 8, "mark") and not bank.has("nobody", 3, "mark")
    bank.set_codebook(words)
    for slide, tiles in spans.items():
        order = np.random.default_rng(1).permutation(tiles)
        assert (bank.read(slide, order)[0] == unit(rng, tiles).astype(np.float16)[order]).all()
    assert_consistent(bank)


def test_features_given_in_parts_fill_like_features_given_whole(make_bank):
    bank, features = make_bank({"a": 30}), unit(np.random.default_rng(9), 30)
    bank.fill("a", (features[i : i + 7] for i in range(0, 30, 7)), 30, "mark", step=4)
    assert (rows_of(bank, "a") == features.astype(np.float16)).all()
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
        assert rest.left_out.item() == pytest.approx(weights[np.setdiff1d(others, used)].sum(dtype=float), rel=1e-4, abs=1e-3)
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


def test_blocks_are_even_also_among_few_tiles():
    for tiles in (16, 76, 1000):
        sizes = np.bincount(block_of(np.arange(tiles)), minlength=BLOCKS)
        assert len(sizes) == BLOCKS and np.ptp(sizes) <= max(2, tiles // 50)


def test_a_step_reads_the_drawn_rows_once_and_no_other(make_bank, monkeypatch):
    bank, read = make_bank({"a": 500}), []
    gather = SlideFile.gather
    bank._open("a")  # built
    monkeypatch.setattr(SlideFile, "gather", lambda self, index: read.extend(index.tolist()) or gather(self, index))
    monkeypatch.setattr(SlideFile, "stream", lambda self: pytest.fail("reads all rows"))
    put(bank, "a", np.arange(0, 32, 2), unit(np.random.default_rng(0), 16), share=0.5)
    assert read == list(range(0, 32, 2))


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
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(header | {"version": 9}))
    with pytest.raises(StoreError, match="version 9, asked for 3"):
        MemoryBank(tmp_path / "bank", **good)
    (tmp_path / "bank" / "bank.json").write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        MemoryBank(tmp_path / "bank", **good)


def test_a_truncated_slide_counts_as_not_there_and_is_refused_when_used(make_bank, tmp_path):
    bank = make_bank({"a": 30})
    os.truncate(tmp_path / "bank" / "a.bank", 800)
    with pytest.raises(StoreError, match=r"a\.bank: 800 bytes are no whole slide"):
        bank._open("a")
    assert not MemoryBank(tmp_path / "bank", dim=D, codewords=K, encoder="enc").has("a", 30, "mark")


def test_wrong_features_are_refused_and_leave_what_was_there(make_bank, tmp_path):
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


KILL_LOOP = """
    import sys
    import numpy as np
    import torch
    from dreslcl.bank import MemoryBank
    torch.set_num_threads(1)
    bank = MemoryBank(sys.argv[1], dim=256, codewords=5, encoder="e")
    assert all(bank.has(s, 3000, "m") for s in "ab")
    bank.set_codebook(np.load(sys.argv[3]))
    rng = np.random.default_rng(int(sys.argv[2]))
    features = rng.normal(size=(2, 1500, 256)).astype(np.float32) / 16
    drawn = [rng.choice(3000, 1500, replace=False) for _ in range(8)]
    step = 0
    while True:
        step += 1
        rest = bank.rest("a" if step % 2 else "b", drawn[step % 8], 1.0, rng)
        bank.write(rest, features[step % 2], np.zeros(1500, np.uint16), np.ones(1500, np.float16), step)
        if step == 2:
            print("go", flush=True)
"""


def kill_while_writing(folder, times):
    """SIGKILL a writer at random moments, every other time soon after it began a write; returns how many writes were cut short."""
    rng, words = np.random.default_rng(0), folder.parent / "words.npy"
    bank = MemoryBank(folder, dim=256, codewords=K, encoder="e")
    bank.create()
    for slide in "ab":
        bank.fill(slide, unit(rng, 3000, 256), 3000, "m")
    np.save(words, unit(rng, K, 256))
    bank.set_codebook(np.load(words))
    moments, cut = random.Random(0), 0
    for attempt in range(times):
        command = [sys.executable, "-c", textwrap.dedent(KILL_LOOP), folder, str(attempt), words]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
        assert writer.stdout.readline() == b"go\n"
        files, end = [SlideFile(folder / f"{s}.bank", 256, K) for s in "ab"], time.monotonic() + 10
        while attempt % 2 and all(f.codebook[0] for f in files) and time.monotonic() < end:
            pass
        time.sleep(moments.uniform(0, 1e-4 if attempt % 2 else 0.02))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        cut += not all(f.codebook[0] for f in files)
        for slide in "ab":
            file = bank._open(slide)  # repairs
            by_code = [file.rows[file.code == k].astype(np.float64) - bank.codewords[k].numpy() for k in range(K)]
            assert file.counts.sum(0).tolist() == [len(rows) for rows in by_code]
            expected = np.stack([rows.sum(0) for rows in by_code])
            assert np.linalg.norm(file.sums.sum(0) - expected) <= 1e-4 * np.linalg.norm(expected)
    return cut


def test_a_killed_writer_leaves_a_bank_with_right_sums(tmp_path):
    kill_while_writing(tmp_path / "bank", 4)


@pytest.mark.slow
def test_fifty_killed_writers_leave_a_bank_with_right_sums(tmp_path):
    assert kill_while_writing(tmp_path / "bank", 50) >= 5  # some were cut in the middle, else this shows nothing


def test_a_disk_full_during_fill_is_an_error_and_filling_goes_on_with_room(tmp_path):
    """On a real full disk: a tmpfs of 1 MB in a user namespace."""
    code = """
    import sys
    import numpy as np
    from pathlib import Path
    from dreslcl.bank import MemoryBank
    from dreslcl.common import DiskError
    disk = Path(sys.argv[1])
    bank = MemoryBank(disk / "bank", dim=16, codewords=5, encoder="e")
    bank.create()
    (disk / "ballast").write_bytes(bytes(200_000))
    rows = np.ones((10_000, 16), np.float32) / 4
    def fill():
        for slide in "abc":
            if not bank.has(slide, 10_000, "m"):
                bank.fill(slide, rows, 10_000, "m")
    try:
        fill()
    except DiskError as error:
        print(error)
    print([bank.has(slide, 10_000, "m") for slide in "abc"])
    (disk / "ballast").unlink()
    fill()
    print([bank.has(slide, 10_000, "m") for slide in "abc"], bank.mean("c")[0], *sorted(p.name for p in (disk / "bank").iterdir()))
    """
    mount = 'mount -t tmpfs -o size=1300k none "$1" && "$0" -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, tmp_path, textwrap.dedent(code)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here: cannot make a small disk")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"cannot make a small disk here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert "c.bank: cannot be written (No space left on device); make room" in lines[0], done.stderr
    assert lines[1:] == ["[True, True, False]", "[True, True, True] 0.25 a.bank b.bank bank.json c.bank"]


def test_a_sample_takes_the_same_number_from_each_slide_however_they_are_dealt(make_bank):
    bank = make_bank({"a": 3, "b": 100, "c": 50})
    sample = bank.sample(["a", "b", "c"], 8, seed=0)
    assert sample.shape == (3 + 8 + 8, D)
    assert (np.concatenate([bank.sample(["a"], 8, 0), bank.sample(["b", "c"], 8, 0)]) == sample).all()
    rows = {row.tobytes() for row in rows_of(bank, "b").astype(np.float32)}
    assert sum(row.tobytes() in rows for row in sample) == 8


def test_the_forecast_equals_the_files(make_bank, tmp_path):
    make_bank({"a": 30, "b": 4}, codebook=False)
    assert sum(slide_layout(tiles, D, K).itemsize for tiles in (30, 4)) == sum(f.stat().st_size for f in tmp_path.glob("bank/*.bank"))


def test_a_bank_many_times_a_memory_limit_is_used_without_rss_growing(tmp_path):
    """Steps on a 1 GB sparse bank; its slides are all zeros where not written."""
    code = """
    import sys
    import numpy as np
    import torch
    from dreslcl.bank import MemoryBank, SlideFile, slide_layout
    torch.set_num_threads(1)
    def rss():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
    rng, M = np.random.default_rng(0), 125_000
    bank = MemoryBank(sys.argv[1], dim=512, codewords=4, encoder="e")
    bank.create()
    bank.set_codebook(rng.normal(size=(4, 512)).astype(np.float32))
    slides = [f"s{i}" for i in range(8)]
    for slide in slides:
        with open(f"{sys.argv[1]}/{slide}.bank", "wb") as file:
            file.truncate(slide_layout(M, 512, 4).itemsize)
        new = SlideFile(bank._path(slide), 512, 4)
        new.mark[0], new.codebook[0], new.counts[:, 0] = "m", bank.codebook, M / 8
        assert bank.has(slide, M, "m")
    start = peak = 0
    for step in range(240):
        for slide in rng.choice(slides, 2, replace=False):
            drawn = rng.choice(M, 64, replace=False)
            rest = bank.rest(slide, drawn, 0.5, rng)
            bank.write(rest, rng.normal(size=(64, 512)).astype(np.float32), np.zeros(64, np.uint16), np.ones(64, np.float16), step)
        start = start or rss()
        peak = max(peak, rss())
    print(start, peak, M * 8 * 1024 / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "bank"], capture_output=True, text=True, check=True)
    start, peak, size = map(float, done.stdout.split())
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
