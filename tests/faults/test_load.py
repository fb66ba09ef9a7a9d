"""Load: many slides, long tables, a slide of half a million tiles; `-m slow -s` prints figures."""

import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
from attack import dreslcl, in_child

from dreslcl.bank import MemoryBank
from dreslcl.common import read_table, write_table
from dreslcl.config import ModelConfig
from dreslcl.demo import write_scan
from dreslcl.embedding import Embeddings
from dreslcl.tiles import TileGrid, grid_corners, hilbert_order

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


def steps(folder: Path, tiles: int, count: int) -> tuple[float, float]:
    """Fill a bank with slides of so many tiles and take training steps; seconds of the fill and of a step (median)."""
    import torch

    from dreslcl.model import Bag, ResidualAggregator, nearest_codeword, residual_sums

    D, K, T, B = 384, 16, 16, 2
    rng, bank = np.random.default_rng(0), MemoryBank(folder, dim=D, codewords=K, encoder="e")
    bank.create()
    start = time.monotonic()
    for slide in "ab":
        bank.fill(slide, (rng.standard_normal((min(4096, tiles - at), D), np.float32) / 20 for at in range(0, tiles, 4096)), tiles, "m")
    aggregator = ResidualAggregator(D, 64, ModelConfig(codewords=K))
    aggregator.codewords.copy_(torch.from_numpy(rng.standard_normal((K, D), np.float32) / 20))
    bank.set_codebook(aggregator.codewords.numpy())
    assert [bank.sums(slide)[1].sum() for slide in "ab"] == [tiles] * B  # built
    filled, taken = time.monotonic() - start, []
    for step in range(count):
        start = time.monotonic()
        rests = [bank.rest(slide, np.sort(rng.choice(tiles, T, replace=False)), 0.5, rng) for slide in "ab"]
        fresh = torch.from_numpy(rng.standard_normal((B * T, D), np.float32) / 20).requires_grad_()
        codes = nearest_codeword(fresh, aggregator.codewords)
        drawn = Bag(*residual_sums(fresh, codes, aggregator.codewords, part_of=torch.arange(B).repeat_interleave(T), parts=B))
        stored = Bag(*(torch.stack([getattr(rest, name) for rest in rests]) for name in ("sums", "counts")))
        aggregator(drawn + stored).sum().backward()
        for rest, rows, found in zip(rests, fresh.detach().numpy().reshape(B, T, D), codes.numpy().astype(np.uint16).reshape(B, T)):
            bank.write(rest, rows, found, np.ones(T, np.float16), step)
        taken.append(time.monotonic() - start)
    return filled, float(np.median(taken))


def test_a_slide_of_half_a_million_tiles_goes_through_grid_bank_and_step_in_flat_memory(tmp_path):
    found = {}
    for tiles in (5_000, 500_000):
        (filled, step), _, mb = in_child(measured, steps, tmp_path / str(tiles), tiles, 200, seconds=2000)
        found[tiles] = mb, step
        print(f"\n2 slides of {tiles:,} tiles: fill {filled:.1f} s, step {step * 1e3:.1f} ms, {mb:.0f} MB more memory")
    size = sum(p.stat().st_size for p in (tmp_path / "500000").iterdir()) / 1e6
    assert found[500_000][0] < found[5_000][0] + 200 < size, f"memory grew with a bank of {size:.0f} MB"
    xy = grid_corners((1000 * 512, 500 * 512), 512, 512)
    grid = TileGrid("a", xy, np.ones(len(xy), np.float32), 512, 256, 0.5, 0.25, "x", (512_000, 256_000), "f")
    start = time.monotonic()
    grid.save(tmp_path / "a.h5")
    order = hilbert_order(TileGrid.load(tmp_path / "a.h5").xy, 512)
    print(f"\ngrid of {len(xy):,} tiles: saved, loaded and ordered along a Hilbert curve in {time.monotonic() - start:.1f} s")
    assert len(xy) == len(np.unique(order)) == 500_000
