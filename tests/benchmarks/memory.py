"""Peak memory of training with 64 times as many tiles in a step, gradient caching on. Goal: at most 1.2 times as much.

    python tests/benchmarks/memory.py [--encoder ViT-S-32] [--work DIR] [--json]

Two runs in processes of their own, the same cohort, encoder and micro-batch (`tile_batch` 4): steps of 2 slides with 2 tiles, and of
16 slides with 16 tiles. Peak resident memory (ru_maxrss; on a GPU the peak of its allocator) holds all there is: libraries, weights,
optimiser, activations, the pixels of the step and those read ahead for the next. No cache of decoded tiles.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from train_overhead import make_run, write_reports

from dreslcl import trainer
from dreslcl.cohort import Cohort
from dreslcl.common import prefetch
from dreslcl.config import TileConfig
from dreslcl.tiles import tile_slides

SLIDES, TILE_BATCH = 32, 4
STEPS = {"1x": (2, 2), "64x": (16, 16)}  # B, T


def make_cohort(work: Path) -> None:
    """32 scans of 49 tiles of 224 px."""
    import numpy as np

    from dreslcl.demo import write_scan

    (work / "slides").mkdir(parents=True)
    edge = 224 * 7
    for i in range(SLIDES):
        small = np.random.default_rng(i).integers(60, 160, (edge // 8, edge // 8, 3), np.uint8) // (1, 2, 1)
        write_scan(work / "slides" / f"s{i}.svs", small.repeat(8, 0).repeat(8, 1).astype(np.uint8), mpp=0.5)
    tile_slides(work / "slides", work / "work", TileConfig(size=224, mpp=0.5, threshold=0.05))
    write_reports(work / "reports.csv", SLIDES)


def run(work: Path, encoder: str, size: str) -> None:
    """One step in this process, with the optimiser's state in place and the next step's tiles on their way; prints the peak."""
    torch.set_num_threads(1)
    cohort = Cohort.load(work / "work").with_reports(work / "reports.csv")
    state = make_run(cohort, work / f"run-{size}", encoder, *STEPS[size], TILE_BATCH)
    for p in state.model.parameters():
        p.grad = torch.zeros_like(p)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    plan = trainer.plan_steps(state) * 3
    flow = prefetch(partial(trainer.draw_sample, state), (int(m) for step in plan for m in step[0]), 1, ahead=len(plan[0][0]))
    samples = [next(flow) for _ in plan[0][0]]
    state.model.train()
    trainer.train_step(state, samples, plan[0])
    cuda = state.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"peak": peak, "tiles": sum(len(s.tiles) for s in samples)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="ViT-S-32")
    parser.add_argument("--work", type=Path, default=None, help="folder for a temporary cohort and banks")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(Path(options.run[0]), options.encoder, options.run[1])
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        make_cohort(Path(folder))
        command = [sys.executable, __file__, "--encoder", options.encoder, "--run", folder]
        found = {size: json.loads(subprocess.run([*command, size], check=True, stdout=subprocess.PIPE, text=True).stdout) for size in STEPS}
    result = {"peak_64x_over_1x": round(found["64x"]["peak"] / found["1x"]["peak"], 3)}
    result |= {f"peak_mb_{size}": round(value["peak"] / 1e6) for size, value in found.items()}
    result |= {f"tiles_{size}": value["tiles"] for size, value in found.items()}
    print(json.dumps(result) if options.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
