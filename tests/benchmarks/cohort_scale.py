"""A pretraining run at the size of a real cohort: 11,000 slides of 12,000 tiles, whose bank is sparse files and whose encoder is a stub.

    python tests/benchmarks/cohort_scale.py [--slides 11000] [--visits 2000] [--work DIR] [--json]

There are no scans: pixels are noise, a tile's feature comes from a hash of its pixels, and the time of that is taken off.
`start_s`: opening the run, looking up what the bank holds, the first step. `epoch_overhead_per_slide_ms`: what steps take outside reading
and encoding, and what the end of an epoch takes (all slides' means, checkpoint), over the slides of an epoch; without held-out retrieval.
`rss_mb`: the largest resident memory while so many slides were visited; goal: at most 4,000. `held_out_over_epoch`: the encoder's work for
retrieval among the held-out slides (a tenth) over that of an epoch, a backward pass counted as two forward ones; goal: at most 0.1.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bank import rss_mb
from step_cost import sparse_bank
from torch import Tensor, nn

from dreslcl import trainer
from dreslcl.cohort import Cohort, SlideRecord, TileReader
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TrainConfig
from dreslcl.distributed import Ranks
from dreslcl.encoder import Encoder
from dreslcl.tiles import TileGrid

M, D, K, EDGE = 12_000, 384, 16, 16
spent = {"seconds": 0.0, "work": 0}  # in the stub; work: tiles encoded, three times with gradient


class Stub(nn.Module):
    """Stands in for Encoder: features by a hash of the pixels, moved by one parameter that learns."""

    dim, context, name, pretrained = D, 77, "stub", True
    save, set_trainable, train = (lambda *_, **__: None,) * 3
    fingerprint, tower_parameters, text_parameters = lambda _: "stub", lambda self: [self.move], lambda _: []
    learning_rates = lambda self, _: {self.move: 1.0}  # noqa: E731

    def __init__(self):
        super().__init__()
        self.move = nn.Parameter(torch.zeros(D))
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.table = nn.functional.normalize(torch.randn(4099, D), dim=1)

    def encode_tiles(self, tiles: Tensor, views: object = None) -> Tensor:
        start = time.perf_counter()
        found = self.table[(tiles.flatten(1)[:, ::37].long() * 31).sum(1) % len(self.table)]
        spent["seconds"] += time.perf_counter() - start
        spent["work"] += len(tiles) * (3 if torch.is_grad_enabled() else 1)
        return nn.functional.normalize(found + self.move, dim=1)


def make_cohort(work: Path, slides: int) -> Cohort:
    """Slides without scans, each of another patient, with vectors for reports."""
    rng, side = np.random.default_rng(0), int(np.ceil(M**0.5))
    xy = np.stack(np.divmod(np.arange(M), side), 1)[:, ::-1].astype(np.int64) * EDGE
    grid = TileGrid("s", xy, np.ones(M, np.float32), EDGE, EDGE, 0.5, 0.5, "stub", (side * EDGE,) * 2, "m")
    Cohort.grid, Cohort.mark = lambda *_: grid, lambda *_: "m"
    noise = rng.integers(0, 256, (4099, EDGE, EDGE, 3), dtype=np.uint8)
    TileReader.read = lambda _, member, index, *__: noise[(member * 7919 + index) % len(noise)]
    Encoder.create = lambda *_, **__: Stub()
    members = tuple(SlideRecord(f"s{i}", f"p{i}", M, work / "none.svs", i) for i in range(slides))
    return Cohort(members, tuple(rng.normal(size=(slides, 8, 256)).astype(np.float32)), (), work)


def measure(work: Path, slides: int, visits: int) -> dict[str, float]:
    """The four figures."""
    whole = make_cohort(work, slides)
    held_out, cohort = (whole.subset(part) for part in (whole.members[: slides // 10], whole.members[slides // 10 :]))
    config = RunConfig(EncoderConfig("stub"), ModelConfig(codewords=K), TrainConfig(epochs=2, workers=1, cache_gb=0))
    words = nn.functional.normalize(torch.randn(K, D), dim=1)
    sparse_bank(work / "run" / "bank", slides, M, words.numpy(), encoder="stub")
    start = time.perf_counter()
    run = trainer.open_run(cohort, held_out, config, work / "run", Ranks())
    trainer.fill_bank(run)
    trainer.read_reports(run)
    run.model.aggregator.codewords.copy_(words)
    run.model.aggregator.set_statistics(trainer.slide_means(run))
    run.weigher.load_state_dict(run.model.aggregator.state_dict())
    trainer.set_codebook(run, refit=False)  # rows that are all zero have no codewords
    plan, peak = trainer.plan_steps(run), 0.0

    def step(members: list[np.ndarray]) -> None:
        trainer.train_step(run, [trainer.draw_sample(run, int(m)) for m in members[0]], members)

    step(plan[0])
    result, done = {"slides": slides, "start_s": round(time.perf_counter() - start, 2)}, 0
    spent.update(seconds=0.0, work=0)
    start = time.perf_counter()
    for members in plan[1:]:
        step(members)
        done, peak = done + len(members[0]), max(peak, rss_mb())
        if done >= visits:
            break
    steps, epoch = (time.perf_counter() - start - spent["seconds"]) / done, spent["work"] / done * len(cohort)
    retrieval, trainer.held_out_retrieval = trainer.held_out_retrieval, lambda _: {}
    start = time.perf_counter()
    trainer.end_epoch(run, {"seconds": 0.0, "loss": 0.0})
    end = (time.perf_counter() - start) / len(cohort)
    spent.update(work=0)
    retrieval(run)
    result |= {"visited": done, "epoch_overhead_per_slide_ms": round((steps + end) * 1e3, 2), "of_it_end_of_epoch_ms": round(end * 1e3, 3)}
    return result | {"rss_mb": round(max(peak, rss_mb())), "held_out_over_epoch": round(spent["work"] / epoch, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag, default in {"--slides": 11_000, "--visits": 2_000}.items():
        parser.add_argument(flag, type=int, default=default)
    parser.add_argument("--work", type=Path, default=None, help="folder for the sparse bank (2 GB really used), removed afterwards")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        result = measure(Path(work), options.slides, options.visits)
    print(json.dumps(result) if options.json else "\n".join(f"{key:28} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
