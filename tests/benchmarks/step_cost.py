"""Time of a training step outside the tile encoder, slides of 100,000 tiles over slides of 1,000. Goal: at most 1.10.

    python tests/benchmarks/step_cost.py [--rounds 60] [--work DIR] [--json]

A step asks the bank for the rest of B slides and some rows beside it, weighs these and T fresh tiles each, adds their residuals,
aggregates, goes backward to the fresh features and the weights, and writes both back. Both banks hold 16 slides in sparse files, zeros
where nothing was written, with sums to match; of each slide eight sets of T tiles are drawn, and all are written and all rows read
before time is taken, so that no page is new. Steps on either bank alternate, and the ratio is the median over these pairs: with
bank_share as by default and with 1; and with every row of the slides read, as an aggregator with `needs_rows` does.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from dreslcl.bank import MemoryBank, SlideFile, slide_layout
from dreslcl.config import ModelConfig, TrainConfig
from dreslcl.model import Bag, ResidualAggregator, nearest_codeword, residual_sums
from dreslcl.trainer import ROWS_BESIDE

B, T, K, D, E = 8, 64, 32, 384, 256
SLIDES, SETS = 16, 8


def unit_rows(count: int) -> np.ndarray:
    """Random features."""
    features = np.random.default_rng(0).normal(size=(count, D)).astype(np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def sparse_bank(folder: Path, slides: int, tiles: int, words: np.ndarray, encoder: str = "benchmark") -> MemoryBank:
    """A bank whose rows are zeros that take no disk; zeros count as features, all with the shortest codeword."""
    bank = MemoryBank(folder, dim=words.shape[1], codewords=len(words), encoder=encoder)
    bank.create()
    bank.set_codebook(words)
    nearest = int((words**2).sum(1).argmin())
    for slide in (f"s{i}" for i in range(slides)):
        with bank._path(slide).open("wb") as file:
            file.truncate(slide_layout(tiles, *words.shape[::-1]).itemsize)
        new = SlideFile(bank._path(slide), *words.shape[::-1])
        new.mark[0], new.weight[:], new.code[:], new.counts[:, nearest] = "m", 1, nearest, tiles / len(new.counts)
        new.sums[:, nearest] = -words[nearest] * tiles / len(new.counts)
        new.codebook[0] = bank.codebook
        assert bank.has(slide, tiles, "m")
    return bank


class Step:
    """One training step on random slides and tiles of a bank, without the tile encoder."""

    def __init__(self, bank: MemoryBank, aggregator: ResidualAggregator, features: np.ndarray, share: float, *, rows: bool = False):
        self.bank, self.aggregator, self.features, self.share, self.rows = bank, aggregator, features, share, rows
        self.rng = np.random.default_rng(0)
        self.slides = sorted(path.stem for path in bank.folder.glob("*.bank"))
        self.draws = {s: [self.rng.choice(bank._open(s).tiles, T, replace=False) for _ in range(SETS)] for s in self.slides}

    def __call__(self) -> float:
        """Seconds of the step."""
        slides = self.rng.choice(self.slides, B, replace=False).tolist()
        return self.on(slides, [self.draws[slide][self.rng.integers(SETS)] for slide in slides])

    def on(self, slides: list[str], tiles: list[np.ndarray]) -> float:
        """Seconds of the step on these."""
        encoded = self.features[self.rng.integers(0, len(self.features), B * T)].reshape(B, T, D)
        start = time.perf_counter()
        rests = [self.bank.rest(slide, index, self.share, self.rng, ROWS_BESIDE) for slide, index in zip(slides, tiles)]
        if self.rows:
            for rest in rests:
                rest.rows()
        rows = [np.concatenate([new, rest.old[T:].astype(np.float32)]) for new, rest in zip(encoded, rests)]
        part, words = np.concatenate([b + B * (np.arange(len(r)) >= T) for b, r in enumerate(rows)]), self.aggregator.codewords
        fresh = torch.from_numpy(np.concatenate(rows)).requires_grad_()
        codes, weights = nearest_codeword(fresh, words), self.aggregator.weigh(fresh)
        sums, counts = residual_sums(fresh, codes, words, weights=weights, part_of=torch.from_numpy(part), parts=2 * B)
        drawn, beside = Bag(sums[:B], counts[:B]), Bag(sums[B:], counts[B:])
        stored = Bag(torch.stack([rest.sums for rest in rests]), torch.stack([rest.counts for rest in rests]))
        self.aggregator(drawn + beside + stored)[:, 0].sum().backward()
        ends = np.cumsum([len(r) for r in rows])[:-1]
        kinds = (codes.numpy().astype(np.uint16), weights.detach().half().numpy())
        for rest, new, found, weight in zip(rests, encoded, *(np.split(kind, ends) for kind in kinds)):
            self.bank.write(rest, new, found, weight, 1)
        return time.perf_counter() - start

    def warm_up(self) -> None:
        """Write every row that is ever drawn, once, and read all others."""
        for slide in self.slides:
            deque(self.bank._open(slide).stream(), maxlen=0)
        for number in range(SETS):
            for first in range(0, len(self.slides), B):
                some = self.slides[first : first + B]
                self.on(some, [self.draws[slide][number] for slide in some])


def alternate(small: Step, large: Step, rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of large over small."""
    small(), large()
    pairs = [(small(), large()) for _ in range(rounds)]
    middle = [statistics.median(side) * 1e3 for side in zip(*pairs)]
    return middle[0], middle[1], statistics.median(b / a for a, b in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--work", type=Path, default=None, help="folder for the banks, removed afterwards")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    features, result = unit_rows(8192), {}
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        banks = {tiles: sparse_bank(Path(work) / str(tiles), SLIDES, tiles, features[:K].copy()) for tiles in (1_000, 100_000)}
        aggregator = ResidualAggregator(D, E, ModelConfig(codewords=K))
        aggregator.codewords.copy_(torch.from_numpy(features[:K]))
        share = TrainConfig.bank_share
        for name, kind in {"step": {"share": share}, "share_1": {"share": 1.0}, "needs_rows": {"share": share, "rows": True}}.items():
            small, large = (Step(bank, aggregator, features, **kind) for bank in banks.values())
            for step in (small, large):
                step.warm_up()
            ms = alternate(small, large, max(2, options.rounds // 20) if name == "needs_rows" else options.rounds)
            result |= {f"{name}_1k_ms": round(ms[0], 2), f"{name}_100k_ms": round(ms[1], 2), f"{name}_100k_over_1k": round(ms[2], 3)}
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
