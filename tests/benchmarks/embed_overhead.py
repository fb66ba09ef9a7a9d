"""Time of `embed` over the encoder's forward on the same tiles (goal: at most 1.10), and its memory against a slide's size (1.2).

    python tests/benchmarks/embed_overhead.py [--rounds 3] [--slides 2] [--work DIR] [--json]

Time: synthetic JPEG scans, 224 px tiles at 0.5 µm/px, OpenCLIP's ViT-B-32 with random weights. `embed` reads, encodes and writes; loading
the encoder and looking up what is done, a cost per run, is measured by a second call that finds everything done, and taken off
(`setup_s`). The encoder alone gets the tiles from memory in the same batches. Both alternate; the ratio is the median over rounds.
`embed_cpu_over_encoder` is the same ratio of processor time, all threads together: what wall time would tend to without a spare core to
read on, and steady on a busy machine. The encoder runs on one thread: on a busy machine threads wait for each other.
Memory: peak resident set of a process that embeds one slide of 5,000 or of 50,000 tiles (64 px, the tiny encoder).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dreslcl.cohort import Cohort, TileReader
from dreslcl.config import EncoderConfig, TileConfig, TrainConfig
from dreslcl.demo import write_cohort, write_scan
from dreslcl.embedding import embed
from dreslcl.encoder import Encoder, inference
from dreslcl.tiles import tile_slides

BATCH = 128
ENCODER, SETTINGS = EncoderConfig("ViT-B-32"), TrainConfig(tile_batch=BATCH, workers=2)


def overhead(folder: Path, slides: int, rounds: int) -> dict[str, float]:
    """Seconds of both, and the ratio."""
    write_cohort(folder, slides=6, side=(12, 12))
    tile_slides(folder / "slides", folder / "work", TileConfig(size=224, mpp=0.5))
    cohort = Cohort.load(folder / "work")
    cohort = replace(cohort, members=cohort.members[:slides])
    reader = TileReader(cohort)
    tiles = [torch.from_numpy(reader.read(m, np.arange(member.tiles))) for m, member in enumerate(cohort.members)]
    encoder, ours, alone, setup = Encoder.create(ENCODER), [], [], []
    with inference(encoder):
        encoder.encode_tiles(tiles[0][:BATCH])  # the first call allocates
    for number in range(rounds):
        with inference(encoder):
            start = clocks()
            for part in (part for slide in tiles for part in slide.split(BATCH)):
                encoder.encode_tiles(part)
            alone.append(clocks() - start)
        times = []
        for _ in range(2):
            start = clocks()
            embed(cohort, folder / f"out-{number}", encoder=ENCODER, settings=SETTINGS)
            times.append(clocks() - start)
        ours.append(times[0] - times[1])
        setup.append(times[1])
    wall, processor = np.median(np.stack(ours) / np.stack(alone), axis=0).round(3).tolist()
    seconds = {
        name: round(float(np.median(np.stack(times)[:, 0])), 2) for name, times in (("encoder", alone), ("embed", ours), ("setup", setup))
    }
    result = {"tiles": sum(map(len, tiles))} | {f"{name}_s": value for name, value in seconds.items()}
    return result | {"embed_over_encoder": wall, "embed_cpu_over_encoder": processor}


def clocks() -> np.ndarray:
    """Wall time and processor time of all threads, s."""
    return np.array([time.perf_counter(), time.process_time()])


def memory(folder: Path) -> dict[str, float]:
    """Peak MB for a slide of 5,000 and one of 50,000 tiles of the same scan, and what each further tile takes."""
    rng = np.random.default_rng(0)
    image = np.full((3840, 3840, 3), 244, np.uint8)
    image[64:-64, 64:-64] = rng.integers(60, 160, (3712, 3712, 3)) // (1, 2, 1)
    (folder / "scans").mkdir()
    write_scan(folder / "scans" / "s.svs", image, mpp=2.0)
    peaks = []
    for tiles in (5_000, 50_000):
        work = folder / str(tiles)
        tile_slides(folder / "scans", work, TileConfig(size=64, mpp=2.0, overlap=48, max_tiles=tiles))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, __file__, "--one", work], capture_output=True, text=True, check=True, env=environment)
        made, peak = map(float, done.stdout.split())
        assert made == tiles, f"{made:,.0f} tiles in place of {tiles:,}"
        peaks.append(peak)
    return {
        "rss_5k_mb": round(peaks[0]),
        "rss_50k_mb": round(peaks[1]),
        "rss_50k_over_5k": round(peaks[1] / peaks[0], 3),
        "bytes_per_tile": round((peaks[1] - peaks[0]) * 1e6 / 45_000),
    }


def one(work: Path) -> None:
    """In a process of its own: embed the slide, print its tiles and the peak resident set, MB."""
    cohort = Cohort.load(work)
    embed(cohort, work / "out", encoder=EncoderConfig(), settings=SETTINGS)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # not ru_maxrss, which starts at the parent's
    print(cohort.members[0].tiles, int(peak[1]) / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slides", type=int, default=2, help="scans of about 90 tiles, at most 6")
    parser.add_argument("--work", type=Path, default=None, help="folder for the scans, removed afterwards")
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        result = memory(Path(folder)) | overhead(Path(folder) / "cohort", options.slides, options.rounds)
    print(json.dumps(result) if options.json else "\n".join(f"{key:24} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
