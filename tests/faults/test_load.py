"""Load: many slides, long tables; `-m slow -s` prints figures. The bank: tests/benchmarks/bank.py."""

import os
import resource
import time

import numpy as np
import pytest
from attack import dreslcl, in_child

from dreslcl.common import read_table, write_table
from dreslcl.demo import write_scan
from dreslcl.embedding import Embeddings

pytestmark = pytest.mark.slow


def measured(function, *arguments):
    """What a function returns, its seconds, and by how many MB it raised the peak of this process's memory."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before, start = peak(), time.monotonic()
    value = function(*arguments)
    return value, time.monotonic() - start, peak() - before


def test_two_thousand_slides_are_tiled_and_embedded_in_flat_memory(tmp_path):
    (tmp_path / "drawn").mkdir()
    for i in range(20):
        image = np.full((320, 320, 3), 244, np.uint8)
        image[32:288, 32:288] = np.random.default_rng(i).integers(60, 160, (256, 256, 3)) // (1, 2, 1)
        write_scan(tmp_path / "drawn" / f"{i}.svs", image, mpp=1.0)
    grown = {}
    for count in (200, 2000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            os.link(tmp_path / "drawn" / f"{i % 20}.svs", folder / f"s{i:04}.svs")
        tile = ("tile", folder, "--size", 64, "--mpp", 2.0, "--out", tmp_path / f"work{count}")
        embed = ("embed", tmp_path / f"work{count}", "--out", tmp_path / f"emb{count}")
        for arguments in (tile, embed):
            done, seconds, mb = in_child(measured, dreslcl, *arguments, seconds=3000)
            assert done.code == 0, done
            grown[arguments[0], count] = mb
            print(f"\n{count} slides, {arguments[0]}: {seconds:.0f} s, {count / seconds:.0f} slides/s, {mb:.0f} MB more memory")
        assert len(Embeddings.load(tmp_path / f"emb{count}")) == count
        assert {row["status"] for row in read_table(tmp_path / f"work{count}" / "slides.csv")} == {"ok"}
    for name in ("tile", "embed"):
        assert grown[name, 2000] < grown[name, 200] + 100


def test_a_table_of_200_000_rows_is_evaluated(tmp_path):
    rng = np.random.default_rng(0)
    ids = [f"s{i}" for i in range(2000)]
    vectors = rng.normal(size=(2000, 16)).astype(np.float32)
    vectors[::2, 0] += 1
    Embeddings(tuple(ids), tuple(ids), vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).save(tmp_path / "embeddings.h5")
    rows = [(f"s{i}", f"s{i}", "ab"[i % 2], ("train", "test")[i % 3 == 0], "x" * 200) for i in rng.permutation(200_000).tolist()]
    write_table(tmp_path / "labels.csv", ["slide_id", "patient_id", "subtype", "split", "note"], rows)
    arguments = ("eval", tmp_path, "--labels", tmp_path / "labels.csv", "--task", "subtype", "--split", "split", "--out", tmp_path / "e")
    done, seconds, mb = in_child(measured, dreslcl, *arguments, seconds=1000)
    assert done.code == 0 and "198000 of 200000 ids have no embedding" in done.err, done
    print(f"\n200,000 rows, {(tmp_path / 'labels.csv').stat().st_size / 1e6:.0f} MB: eval takes {seconds:.0f} s, {mb:.0f} MB more memory")
    assert mb < 800
