"""Wall time of whole training steps over forward and backward of the same tiles alone. Goal: at most 1.10.

    python tests/benchmarks/train_overhead.py [--rounds 3] [--encoder ViT-B-32] [--tiles 4] [--work DIR] [--json]

A step reads B·T tiles of 224 px from JPEG scans on a thread, augments, encodes, takes residuals from the bank, aggregates, contrasts with
frozen report vectors, goes backward, clips, updates the weights and writes the fresh features back. Against it stands the encoder on
the pixels of those very steps, already in memory: normalisation, forward, backward. Epochs and encoder passes alternate, and the ratio is
the median over these pairs. One micro-batch holds a whole step, so neither side encodes a tile twice. The same in CPU seconds of all
threads stands beside it: it counts reading in full, as on a machine of one core, and bears a busy machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dreslcl import trainer
from dreslcl.cohort import Cohort
from dreslcl.common import write_table
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TileConfig, TrainConfig
from dreslcl.demo import write_scan
from dreslcl.distributed import Ranks
from dreslcl.encoder import autocast
from dreslcl.formats import unit
from dreslcl.tiles import tile_slides
from dreslcl.trainer import Run

SLIDES, B, EDGE = 8, 4, 224 * 7


def make_cohort(work: Path) -> Cohort:
    """Scans of coloured noise, about 36 tiles each, every one of another patient with a report of its own."""
    rng = np.random.default_rng(0)
    (work / "slides").mkdir(parents=True)
    for i in range(SLIDES):
        image = np.full((EDGE, EDGE, 3), 244, np.uint8)
        small = rng.integers(60, 160, (EDGE // 4, EDGE // 4, 3), np.uint8) // (1, 2, 1)
        image[100:-100, 100:-100] = small.repeat(4, 0).repeat(4, 1)[100:-100, 100:-100]
        write_scan(work / "slides" / f"s{i}.svs", image, mpp=0.5)
    tile_slides(work / "slides", work / "work", TileConfig(size=224, mpp=0.5))
    write_reports(work / "reports.csv", SLIDES)
    return Cohort.load(work / "work").with_reports(work / "reports.csv")


def write_reports(path: Path, slides: int) -> None:
    """A report of its own for each slide: some of seven words that many reports share."""
    words = "gland stroma necrosis mucin keratin vessel nodule".split()
    texts = ["tissue " + " ".join(word for n, word in enumerate(words) if i >> n & 1) for i in range(slides)]
    write_table(path, ["slide_id", "report"], [(f"s{i}", text) for i, text in enumerate(texts)])


def make_run(cohort: Cohort, out: Path, encoder: str, batch: int, tiles: int, tile_batch: int) -> Run:
    """A run before its first step, whose bank holds random features in place of a first pass over all tiles."""
    train = TrainConfig(batch=batch, tiles=tiles, tile_batch=tile_batch, workers=1, cache_gb=0.0, epochs=1000)
    run = trainer.open_run(cohort, Cohort(()), RunConfig(EncoderConfig(encoder), ModelConfig(), train), out, Ranks())
    run.bank.create()
    rng = np.random.default_rng(0)
    for i, member in enumerate(cohort.members):
        rows = unit(rng.normal(size=(member.tiles, run.model.dim)).astype(np.float32))
        run.bank.fill(member.slide_id, rows, member.tiles, cohort.mark(i))
    trainer.read_reports(run)
    trainer.set_codebook(run, refit=True)
    return run


def clocks() -> np.ndarray:
    """Wall and CPU seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def epoch_and_encoder(run: Run) -> tuple[np.ndarray, np.ndarray, int]:
    """Wall and CPU seconds of an epoch's steps, of the encoder alone on the same tiles, and how many tiles."""
    tiles = [[(int(m), trainer.draw_sample(run, int(m)).tiles) for m in step[0]] for step in trainer.plan_steps(run)]
    start = clocks()
    trainer.run_epoch(run)
    whole = clocks() - start
    steps = [np.concatenate([run.reader.read(m, index) for m, index in step]) for step in tiles]
    start = clocks()
    for pixels in steps:
        with autocast(run.device, run.config.train.precision):
            features = run.model.encoder.encode_tiles(torch.from_numpy(pixels).to(run.device))
        features.sum().backward()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    alone = clocks() - start
    run.model.encoder.zero_grad(set_to_none=True)
    run.epoch += 1
    return whole, alone, sum(map(len, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--encoder", default="ViT-B-32")
    parser.add_argument("--tiles", type=int, default=4, help="T; a step has 4 times as many tiles")
    parser.add_argument("--work", type=Path, default=None, help="folder for a temporary cohort")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)  # on a busy machine threads wait for each other
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        run = make_run(make_cohort(Path(work)), Path(work) / "run", options.encoder, B, options.tiles, B * options.tiles)
        pairs = [epoch_and_encoder(run) for _ in range(options.rounds + 1)][1:]  # the first warms up
    ratios = np.array([whole / alone for whole, alone, _ in pairs])  # (rounds, wall and CPU)
    wall, cpu = np.median(ratios, axis=0)
    result = {
        "step_over_encoder": round(wall, 3),
        "spread": [round(float(f(ratios[:, 0])), 3) for f in (min, max)],
        "step_over_encoder_cpu": round(cpu, 3),
        "tiles_per_s": round(statistics.median(count / whole[0] for whole, _, count in pairs), 2),
        "encoder_tiles_per_s": round(statistics.median(count / alone[0] for _, alone, count in pairs), 2),
        "device": str(run.device),
    }
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
