"""Tiles per second of `Slide.read_tiles`, over openslide's and over bare JPEG decoding. Goals: 3.0 and 0.85 (one thread), 5.0 (two).

    python tests/benchmarks/tile_reading.py [SLIDE] [--work DIR] [--json]

256 px tissue tiles of level 0 in raster order. For every two tile rows, ours, openslide (one thread) and the floor (decoding only the
segments that the rows need anew, from memory, into one reused buffer) are timed in turn, so that a busy machine slows all of them; the
ratios are medians over these rounds. All pixels are compared with openslide's. Without SLIDE three scans of 20,000 x 20,000 px are built:
pixels of the CMU slide, mirrored (DRESLCL_TEST_DATA), else a drawn texture; 240 px tiles as RGB 4:4:4, YCbCr 4:2:2 and YCbCr 4:2:0.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
from PIL import Image

from dreslcl.common import atomic
from dreslcl.slide import Slide

EDGE, STORED, TILE = 20_000, 240, 256
VARIANTS = {"rgb444": ("rgb", (1, 1)), "ycbcr422": ("ycbcr", (2, 1)), "ycbcr420": ("ycbcr", (2, 2))}


def source() -> np.ndarray:
    """Tissue to tile the scans with: (h, w, 3), mirrored so that its borders meet."""
    folder = os.environ.get("DRESLCL_TEST_DATA")
    if folder:
        with Slide.open(Path(folder) / "slides/CMU-1-Small-Region.svs") as slide:
            image = slide.read_region((0, 0), 0, slide.size)
    else:
        rng = np.random.default_rng(0)
        blobs = Image.fromarray(rng.integers(90, 240, (128, 128, 3), np.uint8)).resize((2048, 2048), Image.Resampling.BICUBIC)
        image = np.clip(np.asarray(blobs) + rng.normal(0, 12, (2048, 2048, 1)), 0, 255).astype(np.uint8)
    image = np.concatenate([image, image[::-1]])
    return np.concatenate([image, image[:, ::-1]], axis=1)


def build(path: Path, image: np.ndarray, space: str, subsampling: tuple[int, int]) -> None:
    """Write an SVS-like scan of one level."""

    def tiles() -> Iterator[np.ndarray]:
        for y in range(0, EDGE, STORED):
            rows = np.take(image, range(y, y + STORED), axis=0, mode="wrap")
            for x in range(0, EDGE, STORED):
                yield np.ascontiguousarray(np.take(rows, range(x, x + STORED), axis=1, mode="wrap"))

    with atomic(path) as part, tifffile.TiffWriter(part, bigtiff=True) as writer:
        writer.write(
            tiles(),
            shape=(EDGE, EDGE, 3),
            dtype=np.uint8,
            tile=(STORED, STORED),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 70, "outcolorspace": space},
            subsampling=subsampling,
            description="Aperio Image Library dreslcl benchmark|AppMag = 20|MPP = 0.5",
            metadata=None,
            maxworkers=2,
        )


def tissue_rows(slide: Slide) -> list[np.ndarray]:
    """Corners of tissue tiles, one array (n, 2) per row of the grid."""
    thumbnail = np.asarray(Image.fromarray(slide.thumbnail(slide.mpp * 32)).convert("L"))
    rows = []
    for y in range(0, slide.size[1] - TILE + 1, TILE):
        xs = [x for x in range(0, slide.size[0] - TILE + 1, TILE) if thumbnail[y // 32 : y // 32 + 8, x // 32 : x // 32 + 8].mean() < 235]
        if xs:
            rows.append(np.array([(x, y) for x in xs], np.int64))
    return rows


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(path: Path, rounds: int) -> dict[str, float]:
    """Ratios of one scan: consecutive rounds of two tile rows, so that each reader keeps what it has cached."""
    theirs = openslide.OpenSlide(path)
    with Slide.open(path, mpp=0.5) as slide, Slide.open(path, mpp=0.5) as second:
        rows = tissue_rows(slide)
        rows = rows[max(0, len(rows) // 2 - rounds) :]
        stored = slide._parts[0][0][1]  # the benchmark may look inside: the floor decodes exactly the segments that are new in a round
        out = np.zeros((2 * max(map(len, rows)), TILE, TILE, 3), np.uint8)
        buffer = np.empty((stored.edge[1], stored.edge[0], 3), np.uint8)
        samples, wrong, count, seen = [], 0, 0, set()

        def one(xy: np.ndarray) -> None:
            nonlocal wrong, count
            tiles = out[: len(xy)]
            needed = [i for i in stored._plan(xy, np.array([TILE, TILE]))[0].tolist() if i not in seen]
            seen.update(needed)
            streams = [(os.pread(slide._file.fileno(), int(stored.counts[i]), int(stored.offsets[i])), i) for i in needed]
            floor, _ = timed(lambda: [stored.decode(data, i, buffer) for data, i in streams])
            ours, _ = timed(lambda: slide.read_tiles(xy, TILE, slide.mpp, out=tiles))
            floor_again, _ = timed(lambda: [stored.decode(data, i, buffer) for data, i in streams])
            openslide_s, reference = timed(lambda: [theirs.read_region((x, y), 0, (TILE, TILE)).convert("RGB") for x, y in xy.tolist()])
            two, _ = timed(lambda: second.read_tiles(xy, TILE, second.mpp, threads=2, out=tiles))
            wrong += sum(not np.array_equal(mine, their) for mine, their in zip(tiles, reference))
            count += len(xy)
            samples.append((openslide_s / ours, openslide_s / two, (floor + floor_again) / 2 / ours, len(xy) / ours))

        for start in range(0, min(2 * rounds, len(rows)), 2):
            one(np.concatenate(rows[start : start + 2]))
    names = ("vs_openslide", "vs_openslide_2threads", "vs_decode_floor", "tiles_per_s")
    medians = [statistics.median(values) for values in zip(*(samples[1:] or samples))]  # the first round warms up
    return {name: round(value, 3) for name, value in zip(names, medians)} | {"tiles": count, "wrong_tiles": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slide", nargs="?", type=Path, help="measure this JPEG scan instead of built ones")
    parser.add_argument("--work", type=Path, help="keep the built scans here for the next run")
    parser.add_argument("--rounds", type=int, default=16, help="measurements per scan (default 16)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.slide:
            scans = {args.slide.stem: args.slide}
        else:
            scans = {name: (args.work or Path(temporary)) / f"{name}.svs" for name in VARIANTS}
            missing = {name: path for name, path in scans.items() if not path.exists()}
            image = source() if missing else None
            for name, path in missing.items():
                build(path, image, *VARIANTS[name])
        variants = {name: measure(path, args.rounds) for name, path in scans.items()}
    ratios = ("vs_openslide", "vs_openslide_2threads", "vs_decode_floor")
    result = {key: min(v[key] for v in variants.values()) for key in ratios}
    result |= {"pixels_equal": not any(v["wrong_tiles"] for v in variants.values()), "variants": variants}
    if args.json:
        print(json.dumps(result))
    else:
        for name, values in variants.items():
            print(f"{name:10s}", "  ".join(f"{key} {value:g}" for key, value in values.items()))
        print("minimum   ", "  ".join(f"{key} {result[key]:g}" for key in ratios), f" pixels equal: {result['pixels_equal']}")


if __name__ == "__main__":
    main()
