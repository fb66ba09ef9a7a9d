"""Rows per second of the memory bank over a plain memory copy, cold reads, and RSS while the bank is 20 times as large.

    python tests/benchmarks/bank.py [--steps 150] [--work DIR] [--json]

- warm: gathers of 64 random rows (D = 384) from 400,000, over copying as many rows in memory; write-back; rebuilding the sums.
- cold: the same gather after the file's pages were dropped from the page cache, against rows taken from a plain mapping.
- rss: training steps (gather, residuals, aggregate, backward, write-back) on a sparse bank 20 times this process's RSS. Goal: flat.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step_cost import B, D, E, K, Step, T

from dreslcl.bank import CLEAN, MemoryBank
from dreslcl.config import ModelConfig
from dreslcl.residual import ResidualAggregator


def rss_mb() -> float:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def seconds(call: Callable[[], object], times: int) -> float:
    """Median time of a call."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def speeds(folder: Path, features: np.ndarray) -> dict[str, float]:
    """Rows per second, warm and cold."""
    rng, slides, tiles = np.random.default_rng(0), 8, 50_000
    bank = MemoryBank.create(folder, {f"s{i}": tiles for i in range(slides)}, D, K, encoder="benchmark", grids="benchmark")
    for slide in bank.slides:
        bank.fill(slide, (features[: min(len(features), tiles - i)] for i in range(0, tiles, len(features))))
    start = time.perf_counter()
    bank.set_codebook(features[:K].copy(), "benchmark")
    rebuilt = slides * tiles / (time.perf_counter() - start)

    source, target = features.astype(np.float16), np.empty((len(features), D), np.float16)
    copied = len(features) / seconds(lambda: np.copyto(target, source), 50)
    draw = lambda: (str(rng.choice(bank.slides)), rng.choice(tiles, T, replace=False))  # noqa: E731
    gathered = T / seconds(lambda: bank.gather(*draw()), 2000)
    drawn = T / seconds(draw, 2000)
    gathered = 1 / (1 / gathered - 1 / drawn)
    written = T / seconds(lambda: bank.write(*draw(), features[:T], 1), 500)

    bank.flush()
    path = folder / "rows.f16"
    plain = np.memmap(path, np.float16, "r").reshape(-1, D)

    def drop() -> None:
        bank._shards[0].touched(1 << 30)  # mapped pages cannot be dropped
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    drop()
    cold = T / seconds(lambda: bank.gather(*draw()), 20)
    drop()
    plainly = T / seconds(lambda: plain[rng.choice(len(plain), T, replace=False)], 5)
    return {
        "rows_per_s_over_memcpy": round(gathered / copied, 3),
        "memcpy_rows_per_s": round(copied),
        "gather_rows_per_s": round(gathered),
        "write_rows_per_s": round(written),
        "rebuild_rows_per_s": round(rebuilt),
        "cold_rows_per_s": round(cold),
        "cold_over_plain_mmap": round(cold / plainly, 1),
    }


def resident(folder: Path, features: np.ndarray, steps: int) -> dict[str, float]:
    """RSS over training steps on a sparse bank; its rows are zeros where not written."""
    aggregator = ResidualAggregator(D, E, ModelConfig(codewords=K))
    slides = 4 * B
    tiles = int(20 * 1.2 * rss_mb() * 2**20 / (2 * D * slides))
    bank = MemoryBank.create(folder, {f"s{i}": tiles for i in range(slides)}, D, K, encoder="benchmark", grids="benchmark", sparse=True)
    (home,) = bank._shards.values()
    home.set_codebook(features[:K].copy(), "benchmark")
    codeword = int((features[:K] ** 2).sum(1).argmin())  # zeros count as features: all with the shortest codeword
    home.step[:], home.code[:], home.state[:] = 0, codeword, CLEAN
    home.counts[:, codeword], home.sums[:, codeword] = tiles, -tiles * features[codeword]
    aggregator.set_codebook(features[:K].copy(), bank.slide_means())
    step = Step(bank, aggregator, features, 0)
    for _ in range(5):
        step()
    start = rss_mb()
    levels = []
    for _ in range(steps):
        step()
        levels.append(rss_mb())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return {
        "rss_start_mb": round(start),
        "rss_mb": round(max(levels)),
        "rss_end_mb": round(statistics.median(levels[-10:])),
        "bank_mb": round(size),
        "bank_over_rss": round(size / max(levels), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks (1 GB really used), removed afterwards")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    features = np.random.default_rng(0).normal(size=(8192, D)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = resident(Path(work) / "sparse", features, options.steps)
        result |= speeds(Path(work) / "bank", features)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
