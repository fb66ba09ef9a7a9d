"""Rows per second of the memory bank over a plain memory copy, cold reads, and RSS while the bank is 20 times as large.

    python tests/benchmarks/bank.py [--steps 150] [--work DIR] [--json]

- warm: gathers of 64 random rows (D = 384) from 50,000 of a slide, over copying as many rows in memory; write-back; rebuilding the sums.
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
from step_cost import SLIDES, B, D, E, K, Step, T, sparse_bank, unit_rows

from dreslcl.bank import MemoryBank
from dreslcl.config import ModelConfig, TrainConfig
from dreslcl.model import ResidualAggregator


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
    rng, slides, tiles = np.random.default_rng(0), [f"s{i}" for i in range(8)], 50_000
    bank = MemoryBank(folder, dim=D, codewords=K, encoder="benchmark")
    bank.create()
    for slide in slides:
        bank.fill(slide, (features[: min(len(features), tiles - i)] for i in range(0, tiles, len(features))), tiles, "m")
    bank.set_codebook(features[:K].copy())
    start = time.perf_counter()
    for slide in slides:
        bank._open(slide)  # builds them
    rebuilt = len(slides) * tiles / (time.perf_counter() - start)
    files = [bank._open(slide) for slide in slides]

    def draw() -> np.ndarray:
        return rng.choice(tiles, T, replace=False)

    def write() -> None:
        bank.write(bank.rest(str(rng.choice(slides)), draw(), 1.0, rng), features[:T], np.zeros(T, np.uint16), np.ones(T, np.float16), 1)

    source, target = features.astype(np.float16), np.empty((len(features), D), np.float16)
    copied = len(features) / seconds(lambda: np.copyto(target, source), 50)
    gathered = T / seconds(lambda: files[rng.integers(8)].gather(draw()), 2000)
    gathered = 1 / (1 / gathered - seconds(draw, 2000) / T)
    written = T / seconds(write, 300)
    (first, _), paths = files[0].layout.fields["rows"][1::-1], [file.path for file in files]
    del files

    def drop() -> None:
        for path in paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def plainly() -> None:
        np.memmap(paths[rng.integers(8)], np.float16, "r", first, (tiles, D))[draw()]

    drop()
    cold = T / seconds(lambda: bank.sample([str(rng.choice(slides))], T, int(rng.integers(1 << 30))), 20)
    drop()
    return {
        "rows_per_s_over_memcpy": round(gathered / copied, 3),
        "memcpy_rows_per_s": round(copied),
        "gather_rows_per_s": round(gathered),
        "write_rows_per_s": round(written),
        "rebuild_rows_per_s": round(rebuilt),
        "cold_rows_per_s": round(cold),
        "cold_over_plain_mmap": round(cold * seconds(plainly, 5) / T, 1),
    }


def resident(folder: Path, features: np.ndarray, steps: int) -> dict[str, float]:
    """RSS over training steps on a sparse bank; its rows are zeros where not written."""
    aggregator = ResidualAggregator(D, E, ModelConfig(codewords=K))
    aggregator.codewords.copy_(torch.from_numpy(features[:K]))
    tiles = int(20 * 1.2 * rss_mb() * 2**20 / (2 * D * SLIDES))
    bank = sparse_bank(folder, SLIDES, tiles, features[:K].copy())
    step = Step(bank, aggregator, features, TrainConfig.bank_share)
    levels = []
    for _ in range(5 + steps):
        slides = step.rng.choice(step.slides, B, replace=False).tolist()
        step.on(slides, [step.rng.choice(tiles, T, replace=False) for _ in slides])
        levels.append(rss_mb())
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return {
        "rss_start_mb": round(levels[4]),
        "rss_mb": round(max(levels[5:])),
        "rss_end_mb": round(statistics.median(levels[-10:])),
        "bank_mb": round(size),
        "bank_over_rss": round(size / max(levels), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks (0.4 GB really used), removed afterwards")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    features = unit_rows(8192)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = resident(Path(work) / "sparse", features, options.steps)
        result |= speeds(Path(work) / "bank", features)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
