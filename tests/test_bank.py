import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl.bank import DIRTY, MemoryBank, Shard, bank_bytes, nearest
from dreslcl.common import StoreError

D, K = 16, 5


def unit(rng, n, d=D):
    rows = rng.normal(size=(n, d)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def make_bank(tmp_path):
    """A bank filled with random features, with random codewords."""

    def make(spans, seed=0, codebook=True, **options):
        rng = np.random.default_rng(seed)
        bank = MemoryBank.create(tmp_path / "bank", spans, D, K, encoder="enc", grids="grid", **options)
        for slide, tiles in spans.items():
            bank.fill(slide, unit(rng, tiles))
        if codebook:
            bank.set_codebook(unit(rng, K), "words")
        return bank

    return make


def loop_sums(bank, slide):
    """The definition, in float64, tile by tile."""
    codewords = bank._find(slide)[0].codewords.astype(np.float64)
    sums, counts = np.zeros(codewords.shape), np.zeros(len(codewords), int)
    for row in bank.gather(slide, np.arange(bank.tiles(slide))).astype(np.float64):
        k = ((codewords - row) ** 2).sum(1).argmin()
        sums[k] += row - codewords[k]
        counts[k] += 1
    return sums, counts


def assert_consistent(bank, rtol=1e-5):
    for slide in bank.slides:
        sums, counts = bank.residuals(slide)
        expected, expected_counts = loop_sums(bank, slide)
        assert (counts == expected_counts).all()
        assert np.abs(sums - expected).max() <= rtol * np.abs(expected).max()
        assert (sums[counts == 0] == 0).all()


def test_what_is_filled_comes_back_rounded_to_float16_after_reopening(make_bank, tmp_path):
    spans = {"007": 9, "b (1)": 1, "c": 40}
    make_bank(spans, seed=3)
    rng = np.random.default_rng(3)
    bank = MemoryBank.open(tmp_path / "bank", encoder="enc", grids="grid", dim=D, codewords=K)
    assert bank.slides == list(spans) and bank.codebook == "words"
    for slide, tiles in spans.items():
        order = np.random.default_rng(1).permutation(tiles)
        assert (bank.gather(slide, order) == unit(rng, tiles).astype(np.float16)[order]).all()
    assert_consistent(bank)


def test_features_given_in_parts_fill_like_features_given_whole(make_bank):
    bank = make_bank({"a": 30})
    features = unit(np.random.default_rng(9), 30)
    bank.fill("a", (features[i : i + 7] for i in range(0, 30, 7)), step=4)
    assert (bank.gather("a", np.arange(30)) == features.astype(np.float16)).all()
    assert_consistent(bank)


@settings(deadline=None, max_examples=40)
@given(tiles=st.integers(1, 60), data=st.data())
def test_writing_keeps_sums_equal_to_the_definition_and_without_leaves_the_rest(tmp_path_factory, tiles, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    bank = MemoryBank.create(tmp_path_factory.mktemp("b") / "bank", {"a": tiles, "z": 3}, D, K, encoder="e", grids="g")
    codewords = unit(rng, K).astype(np.float16).astype(np.float32)
    for slide in bank.slides:
        bank.fill(slide, unit(rng, bank.tiles(slide)))
    bank.set_codebook(codewords, "w")
    for step in range(3):
        drawn = rng.permutation(tiles)[: data.draw(st.integers(1, tiles))]
        fresh = unit(rng, len(drawn))
        fresh[: len(fresh) // 3] = codewords[0]  # exactly on a codeword
        rest, rest_counts = bank.residuals("a", without=drawn)
        others, other_counts = bank.residuals("a", np.setdiff1d(np.arange(tiles), drawn))
        assert (rest_counts == other_counts).all() and np.allclose(rest, others, atol=1e-5)
        assert (rest[rest_counts == 0] == 0).all()
        bank.write("a", drawn, fresh, step)
        assert (bank.gather("a", drawn) == fresh.astype(np.float16)).all()
        assert_consistent(bank, rtol=1e-4)


def test_taking_out_every_tile_leaves_exactly_nothing(make_bank):
    bank = make_bank({"a": 77})
    sums, counts = bank.residuals("a", without=np.arange(77)[::-1])
    assert not sums.any() and not counts.any()


def test_two_thousand_writes_leave_sums_equal_to_a_recomputation(make_bank):
    bank = make_bank({"a": 500})
    rng = np.random.default_rng(1)
    for step in range(2000):
        drawn = rng.choice(500, 16, replace=False)
        near = bank.gather("a", drawn).astype(np.float32) + 0.05 * unit(rng, 16)
        bank.write("a", drawn, near / np.linalg.norm(near, axis=1, keepdims=True), step)
    sums, counts = bank.residuals("a")
    bank.rebuild("a")
    again, again_counts = bank.residuals("a")
    assert (counts == again_counts).all() and counts.max() > 0
    assert np.linalg.norm(sums - again) <= 1e-4 * np.linalg.norm(again)


def test_write_returns_the_cosine_between_old_and_new_rows(make_bank):
    bank = make_bank({"a": 5})
    old = bank.gather("a", np.array([1, 3])).astype(np.float32)
    cosine = bank.write("a", np.array([1, 3]), np.stack([old[0], -old[1]]), 1)
    assert np.allclose(cosine, [1, -1], atol=1e-3)


def test_a_bank_of_another_encoder_grid_or_width_is_refused_with_both_named(make_bank, tmp_path):
    make_bank({"a": 3})
    for key, asked, there in (("encoder", "other", "enc"), ("grids", "g2", "grid"), ("dim", 99, D), ("codewords", 8, K)):
        with pytest.raises(StoreError, match=f"{key} {there}, asked for {asked}"):
            MemoryBank.open(tmp_path / "bank", **{key: asked})


def test_a_missing_a_newer_or_a_truncated_bank_is_refused(make_bank, tmp_path):
    with pytest.raises(StoreError, match="no bank here"):
        MemoryBank.open(tmp_path / "nowhere")
    make_bank({"a": 3})
    header = json.loads((tmp_path / "bank" / "bank.json").read_text())
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(header | {"version": 2}))
    with pytest.raises(StoreError, match="version 2, asked for 1"):
        MemoryBank.open(tmp_path / "bank")
    (tmp_path / "bank" / "bank.json").write_text(json.dumps(header))
    os.truncate(tmp_path / "bank" / "sums.f32", 8)
    with pytest.raises(StoreError, match=r"should hold .* bytes, has 8"):
        MemoryBank.open(tmp_path / "bank")


def test_wrong_features_are_refused_and_leave_the_slide_unfilled(make_bank):
    bank = make_bank({"a": 4}, codebook=False)
    rng = np.random.default_rng(0)
    for features, message in (
        (unit(rng, 3), "3 features for 4 tiles"),
        (unit(rng, 5), "more features than its 4"),
        (unit(rng, 4, D + 1), f"the bank has D {D}"),
        (np.full((4, D), np.nan, np.float32), "not finite"),
        (np.full((4, D), 1e6, np.float32), "not finite"),
    ):
        with pytest.raises(StoreError, match=message):
            bank.fill("a", features)
        assert not bank.is_filled("a")
    with pytest.raises(StoreError, match="leave empty slides out"):
        MemoryBank.create(bank.folder, {"a": 0}, D, K, encoder="e", grids="g")


def test_filling_resumes_per_slide_and_the_codebook_covers_slides_filled_later(tmp_path):
    rng = np.random.default_rng(0)
    bank = MemoryBank.create(tmp_path / "bank", {"a": 6, "b": 7}, D, K, encoder="e", grids="g")
    bank.fill("a", unit(rng, 6))
    bank = MemoryBank.open(tmp_path / "bank")
    assert bank.is_filled("a") and not bank.is_filled("b") and bank.codebook == ""
    bank.set_codebook(unit(rng, K), "w")
    bank.fill("b", unit(rng, 7))
    assert_consistent(bank)


def test_a_write_cut_short_is_repaired_when_the_bank_is_opened(make_bank, tmp_path, monkeypatch):
    bank = make_bank({"a": 50, "b": 50})
    shard = bank._shards[0]

    class Cut(np.ndarray):
        def __getitem__(self, key):
            return np.asarray(self)[key]

        def __setitem__(self, key, value):
            raise KeyboardInterrupt

    for field in ("step", "code", "sums", "counts"):  # rows first, then these in turn
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shard, field, getattr(shard, field).view(Cut))
            bank.write("b", np.arange(20), unit(np.random.default_rng(4), 20), 1)
        assert shard.state.tolist() == [1, DIRTY]
        reopened = MemoryBank.open(tmp_path / "bank")
        assert_consistent(reopened)
        assert reopened._shards[0].state.tolist() == [1, 1]


def test_a_codebook_change_cut_short_opens_with_the_new_codebook_and_right_sums(make_bank, tmp_path, monkeypatch):
    bank = make_bank({"a": 20, "b": 20})
    codewords = unit(np.random.default_rng(8), K)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shard, "rebuild", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        bank.set_codebook(codewords, "new")
    bank = MemoryBank.open(tmp_path / "bank")
    assert bank.codebook == "new"
    assert (bank.codes("b", np.arange(20)) == nearest(bank.gather("b", np.arange(20)), codewords)).all()
    assert_consistent(bank)


KILL_LOOP = """
    import sys
    import numpy as np
    from dreslcl.bank import MemoryBank
    bank = MemoryBank.open(sys.argv[1])
    rng = np.random.default_rng(int(sys.argv[2]))
    features = rng.normal(size=(2, 1500, 256)).astype(np.float32) / 16
    drawn = [rng.choice(3000, 1500, replace=False) for _ in range(8)]
    step = 0
    while True:
        step += 1
        bank.write("a" if step % 2 else "b", drawn[step % 8], features[step % 2], step)
        if step == 2:
            print("go", flush=True)
"""


def kill_while_writing(folder, times):
    """SIGKILL a writer at random moments, every other time soon after it began a write; returns how many writes were cut short."""
    rng = np.random.default_rng(0)
    bank = MemoryBank.create(folder, {"a": 3000, "b": 3000}, 256, K, encoder="e", grids="g")
    for slide in bank.slides:
        bank.fill(slide, unit(rng, 3000, 256))
    bank.set_codebook(unit(rng, K, 256), "w")
    del bank
    moments, cut = random.Random(0), 0
    for attempt in range(times):
        command = [sys.executable, "-c", textwrap.dedent(KILL_LOOP), folder, str(attempt)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
        assert writer.stdout.readline() == b"go\n"
        state, end = np.memmap(folder / "state.u8", np.uint8, "r"), time.monotonic() + 10
        while attempt % 2 and DIRTY not in state and time.monotonic() < end:
            pass
        time.sleep(moments.uniform(0, 1e-4 if attempt % 2 else 0.02))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        cut += DIRTY in state
        bank = MemoryBank.open(folder)
        for slide in bank.slides:
            sums, counts = bank.residuals(slide)
            bank.rebuild(slide)
            again, again_counts = bank.residuals(slide)
            assert (counts == again_counts).all()
            assert np.linalg.norm(sums - again) <= 1e-4 * np.linalg.norm(again)
    return cut


def test_a_killed_writer_leaves_a_bank_that_opens_with_right_sums(tmp_path):
    kill_while_writing(tmp_path / "bank", 4)


@pytest.mark.slow
def test_fifty_killed_writers_leave_a_bank_that_opens_with_right_sums(tmp_path):
    assert kill_while_writing(tmp_path / "bank", 50) >= 5  # some were cut in the middle, else this shows nothing


def test_a_disk_too_small_for_the_bank_is_an_error_before_any_row(tmp_path):
    code = """
    import resource, signal, sys
    from pathlib import Path
    from dreslcl.bank import MemoryBank
    from dreslcl.common import StoreError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a file may not grow beyond this
    try:
        MemoryBank.create(Path(sys.argv[1]), {"a": 10_000}, 16, 5, encoder="e", grids="g")
    except StoreError as error:
        print(error)
    print(*Path(sys.argv[1]).iterdir())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "bank"], capture_output=True, text=True, check=True)
    assert "the bank needs 0.00038 GB" in done.stdout and "make room" in done.stdout
    assert done.stdout.splitlines()[1] == ""  # nothing is left behind


def test_a_disk_full_during_fill_is_an_error_and_filling_resumes_with_room(tmp_path):
    """A sparse bank on a real full disk: a tmpfs of 1 MB in a user namespace."""
    code = """
    import sys
    import numpy as np
    from pathlib import Path
    from dreslcl.bank import MemoryBank
    from dreslcl.common import StoreError
    disk = Path(sys.argv[1])
    bank = MemoryBank.create(disk / "bank", {s: 10_000 for s in "abc"}, 16, 5, encoder="e", grids="g", sparse=True)
    (disk / "ballast").write_bytes(bytes(200_000))
    rows = np.ones((10_000, 16), np.float32) / 4
    try:
        for slide in bank.slides:
            bank.fill(slide, rows)
    except StoreError as error:
        print(error)
    bank = MemoryBank.open(disk / "bank")
    print([bank.is_filled(slide) for slide in bank.slides])
    (disk / "ballast").unlink()
    for slide in bank.slides:
        if not bank.is_filled(slide):
            bank.fill(slide, rows)
    print([bank.is_filled(slide) for slide in bank.slides], bank.gather("c", np.array([9_999])).sum())
    """
    mount = 'mount -t tmpfs -o size=1228k none "$1" && "$0" -c "$2" "$1"'
    command = ["unshare", "-rm", "sh", "-c", mount, sys.executable, tmp_path, textwrap.dedent(code)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no unshare here: cannot make a small disk")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"cannot make a small disk here: {done.stderr.strip()}")
    lines = done.stdout.splitlines()
    assert "cannot write the rows of slide c (No space left on device" in lines[0] and "make room" in lines[0], done.stderr
    assert lines[1:] == ["[True, True, False]", "[True, True, True] 4.0"]


@pytest.mark.parametrize("dealt", [1, 2, 4, {"a": 1, "b": 0, "c": 1, "d": 1, "e": 0}])
def test_resharding_moves_every_slide_unchanged_and_leaves_no_old_file(make_bank, tmp_path, dealt):
    spans = {"a": 10, "b": 33, "c": 1, "d": 20, "e": 5}
    bank = make_bank(spans, shards=3)
    bank.write("b", np.array([4, 2]), unit(np.random.default_rng(5), 2), 6)
    before = {s: (bank.gather(s, np.arange(m)), bank.codes(s, np.arange(m)), *bank.residuals(s)) for s, m in spans.items()}
    sample, age = bank.sample(4, seed=2), bank.age(6)
    del bank
    MemoryBank.reshard(tmp_path / "bank", dealt)
    bank = MemoryBank.open(tmp_path / "bank", encoder="enc")
    for slide, expected in before.items():
        index = np.arange(spans[slide])
        found = (bank.gather(slide, index), bank.codes(slide, index), *bank.residuals(slide))
        assert all((x == y).all() for x, y in zip(found, expected))
    assert (bank.sample(4, seed=2) == sample).all() and bank.age(6) == age and bank.codebook == "words"
    assert bank.shard_of("c") == (dealt["c"] if isinstance(dealt, dict) else 2 % dealt)
    assert len(list((tmp_path / "bank").rglob("rows.f16"))) == len({bank.shard_of(s) for s in spans})


def test_a_process_opens_only_its_own_shards(make_bank, tmp_path):
    make_bank({"a": 3, "b": 4, "c": 5}, shards=2)
    mine = MemoryBank.open(tmp_path / "bank", shards=[1])
    assert mine.slides == ["b"] and mine.shard_of("c") == 0
    with pytest.raises(StoreError, match="slide a is not in the shards opened here"):
        mine.residuals("a")


def test_the_oldest_rows_come_first_and_never_the_excluded(make_bank):
    bank = make_bank({"a": 6})
    for step, tile in enumerate([3, 0, 5], start=1):
        bank.write("a", np.array([tile]), unit(np.random.default_rng(step), 1), step)
    assert bank.oldest("a", 6).tolist() == [1, 2, 4, 3, 0, 5]
    assert bank.oldest("a", 3, exclude=np.array([2, 4])).tolist() == [1, 3, 0]
    assert bank.oldest("a", 9, exclude=np.array([0, 1, 2, 3, 4, 5])).tolist() == []


def test_ages_are_counted_in_steps_and_a_row_from_the_future_has_age_zero(make_bank):
    bank = make_bank({"a": 10, "b": 10})
    bank.write("a", np.arange(10), unit(np.random.default_rng(0), 10), 100)
    assert bank.age(100) == {"mean": 50.0, "p95": 100.0, "max": 100.0}
    assert bank.age(5000)["max"] == 5000 and abs(bank.age(5000)["p95"] - 5000) < 10
    assert bank.age(50)["mean"] == 25.0


def test_a_sample_takes_the_same_number_from_each_slide(make_bank):
    bank = make_bank({"a": 3, "b": 100, "c": 50})
    sample = bank.sample(8, seed=0)
    assert sample.shape == (3 + 8 + 8, D) and (bank.sample(8, seed=0) == sample).all()
    rows = {row.tobytes() for row in bank.gather("b", np.arange(100)).astype(np.float32)}
    assert sum(row.tobytes() in rows for row in sample) == 8


def test_slide_means_equal_the_mean_of_the_rows(make_bank):
    bank = make_bank({"a": 3, "b": 100})
    expected = np.stack([bank.gather(s, np.arange(bank.tiles(s))).astype(np.float64).mean(0) for s in bank.slides])
    assert np.allclose(bank.slide_means(), expected, atol=1e-6)
    assert np.allclose(bank.mean(), expected.mean(0), atol=1e-6)


def test_the_forecast_equals_the_files(make_bank, tmp_path):
    make_bank({"a": 30, "b": 4}, codebook=False)
    files = [f for f in (tmp_path / "bank").iterdir() if f.name != "bank.json"]
    assert bank_bytes({"a": 30, "b": 4}, D, K) == sum(f.stat().st_size for f in files)


def test_a_bank_twenty_times_a_memory_limit_is_used_without_rss_growing(tmp_path):
    """Gathers and writes on a 1 GB sparse bank; its slides are all zeros where not written."""
    code = """
    import sys
    from pathlib import Path
    import numpy as np
    from dreslcl import bank
    from dreslcl.bank import MemoryBank
    shard.RESIDENT = 256  # 16 MB
    def rss():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024
    rng = np.random.default_rng(0)
    bank = MemoryBank.create(Path(sys.argv[1]), {f"s{i}": 125_000 for i in range(8)}, 512, 4, encoder="e", grids="g", sparse=True)
    home = bank._shards[0]
    home.set_codebook(rng.normal(size=(4, 512)).astype(np.float32), "w")
    home.state[:] = shard.CLEAN  # zeros count as features
    home.counts[:, 0], home.sums[:, 0] = 125_000, -125_000 * home.codewords[0]
    start = peak = 0
    for step in range(240):
        for slide in rng.choice(bank.slides, 2, replace=False):
            drawn = rng.choice(125_000, 64, replace=False)
            bank.residuals(slide, without=drawn)
            if step % 8 == 0:
                bank.write(slide, drawn, rng.normal(size=(64, 512)).astype(np.float32), step)
        start = start or rss()
        peak = max(peak, rss())
    print(start, peak, home.rows.nbytes / 2**20)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "bank"], capture_output=True, text=True, check=True)
    start, peak, size = map(float, done.stdout.split())
    assert peak - start < size / 20, f"RSS grew from {start} to {peak} MB with a bank of {size} MB"


def test_the_bank_loads_no_torch():
    code = "import sys, dreslcl.bank; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
