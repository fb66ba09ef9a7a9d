"""Time of a training step outside the tile encoder, slides of 100,000 tiles over slides of 1,000. Goal: at most 1.10.

    python tests/benchmarks/step_cost.py [--rounds 60] [--work DIR] [--json]

A step fetches the old rows of B·T tiles, forms the residual sums, aggregates, goes backward to the fresh features and writes them back.
Both banks hold 800,000 rows (1.3 GB on disk together), so that memory and page cache treat them alike; steps on either alternate, and
the ratio is the median over these pairs: with `stale_dropout` as by default, which reads the rows that it leaves out
(256 here), without it, and with every bank row of a slide gathered (`bank_tiles` = M).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreslcl.bank import MemoryBank
from dreslcl.config import ModelConfig, TrainConfig
from dreslcl.residual import ResidualAggregator, refreshed_residuals

B, T, K, D, E = 8, 64, 32, 384, 256
ROWS = 800_000


def make_bank(folder: Path, tiles: int, features: np.ndarray) -> MemoryBank:
    """A bank of ROWS rows in slides of `tiles` tiles."""
    spans = {f"slide-{i}": tiles for i in range(ROWS // tiles)}
    bank = MemoryBank.create(folder, spans, D, K, encoder="benchmark", grids="benchmark")
    for slide in bank.slides:
        bank.fill(slide, (features[: min(len(features), tiles - i)] for i in range(0, tiles, len(features))))
    bank.set_codebook(features[:K].copy(), "benchmark")
    return bank


class Step:
    """One training step on random slides and tiles of a bank, without the tile encoder."""

    def __init__(self, bank: MemoryBank, aggregator: ResidualAggregator, features: np.ndarray, options: dict[str, Any]):
        self.bank, self.aggregator, self.features, self.options = bank, aggregator, features, options
        self.rng = np.random.default_rng(0)

    def __call__(self) -> float:
        """Seconds of the step."""
        slides = self.rng.choice(self.bank.slides, B, replace=False).tolist()
        tiles = [self.rng.choice(self.bank.tiles(slide), T, replace=False) for slide in slides]
        encoded = self.features[self.rng.integers(0, len(self.features), B * T)]
        start = time.perf_counter()
        fresh = torch.from_numpy(encoded).requires_grad_()
        words = self.aggregator.codewords
        sums, counts = refreshed_residuals(self.bank, slides, tiles, fresh, words, rngs=[self.rng] * B, **self.options)
        self.aggregator(sums, counts)[:, 0].sum().backward()
        assert fresh.grad is not None
        for slide, index, part in zip(slides, tiles, fresh.detach().split(T)):
            self.bank.write(slide, index, part.numpy(), 1)
        return time.perf_counter() - start


def alternate(small: Step, large: Step, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of large over small."""
    small(), large()
    pairs = [(small(), large()) for _ in range(rounds)]
    middle = [statistics.median(side) * 1e3 for side in zip(*pairs)]
    return middle[0], middle[1], statistics.median(b / a for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks (1.3 GB), removed afterwards")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    features = np.random.default_rng(0).normal(size=(8192, D)).astype(np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        banks = {tiles: make_bank(Path(work) / str(tiles), tiles, features) for tiles in (1_000, 100_000)}
        aggregator = ResidualAggregator(D, E, ModelConfig(codewords=K))
        aggregator.set_codebook(features[:K].copy(), banks[1_000].slide_means())
        result = {}
        kinds = {
            "step": {"stale_dropout": TrainConfig().stale_dropout},
            "no_stale_dropout": {"stale_dropout": 0.0},
            "gather_all": {"bank_tiles": ROWS},
        }
        for name, kind in kinds.items():
            small, large = (Step(bank, aggregator, features, kind) for bank in banks.values())
            ms = alternate(small, large, max(2, options.rounds // 40) if name == "gather_all" else options.rounds)
            result |= {f"{name}_1k_ms": round(ms[0], 2), f"{name}_100k_ms": round(ms[1], 2), f"{name}_100k_over_1k": round(ms[2], 3)}
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
