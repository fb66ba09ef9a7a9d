"""The whole path on a scan of 100,000 x 80,000 px at 0.25 µm/px, and a cohort of 200 of them; the encoder is a stub without cost.

    python tests/benchmarks/gigapixel.py [--work DIR] [--only NAME,...] [--json]

The scan is an SVS-like BigTIFF (levels 1, 4, 16; JPEG 4:2:2, quality 80, 256 px tiles), a third of it tissue: blocks of 1,024 px of the
real tiles in DRESLCL_TEST_DATA/tiles_crc (else drawn), encoded once and written one after another. Tiles: 256 px at 0.5 µm/px, so each
needs four stored ones. What is measured runs in a process of its own, whose peak resident memory stands beside it (goal: at most 1,500 MB).
The decode floor is the decoding alone of just those stored tiles, from memory into one buffer. Ratios to it are of processor time and
medians over short rounds in turn (floor, ours, floor), so that a busy machine slows both.

- tile: `tile_slides` on the scan, and openslide's loop of tiling.py. read: 64 tiles in raster order, 16 at random; the same from a pack;
  raster order, were the scan of 0.2527 µm/px (not_twice).
- fill: the bank's first pass. steps: 200 training steps of two slides, 16 random tiles of each, reading in turn with the step.
- embed, heatmap: all tiles of the scan. cohort: three epochs of 200 such scans (hard links; sparse bank), one thread reading.
- threads: decoding on two threads, and in two processes, over one; the share of it that holds the interpreter's lock.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
import torch
from bank import rss_mb
from cohort_scale import Stub, spent
from PIL import Image
from step_cost import sparse_bank
from tiling import CONTENDERS, START
from torch import Tensor, nn
from train_overhead import clocks, make_run, write_reports

from dreslcl import trainer
from dreslcl.cohort import Cohort, TileReader
from dreslcl.common import write_table
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TrainConfig
from dreslcl.embedding import embed
from dreslcl.encoder import Encoder
from dreslcl.formats import Embeddings
from dreslcl.heatmaps import draw_heatmaps
from dreslcl.slide import Slide
from dreslcl.tiles import COLUMNS, TileGrid, TilePixels, grid_path, pack_path, read_slides, write_pack

WIDTH, HEIGHT, BLOCK, STORED, BLOCKS, D, K = 100_000, 80_000, 1024, 256, 60, 384, 16
SIZE, MPP, FEW = 256, 0.5, 16
Clock = Callable[[], float]


# the scan


def tissue_block(rng: np.random.Generator) -> np.ndarray:
    """A block of tissue: (1024, 1024, 3)."""
    files = sorted(Path(os.environ.get("DRESLCL_TEST_DATA", "none"), "tiles_crc").glob("*/*.jpg"))
    image = np.empty((BLOCK, BLOCK, 3), np.uint8)
    for y in range(0, BLOCK, 205):
        for x in range(0, BLOCK, 205):
            if files:
                tile = Image.open(files[rng.integers(len(files))]).convert("RGB").resize((205, 205))
            else:
                small = Image.fromarray(rng.integers(60, 230, (24, 24, 3), np.uint8) // np.array([1, 2, 1], np.uint8))
                tile = small.resize((205, 205), Image.Resampling.BICUBIC)
            image[y : y + 205, x : x + 205] = np.asarray(tile)[: BLOCK - y, : BLOCK - x]
    return image if files else np.clip(image + rng.normal(0, 12, (BLOCK, BLOCK, 1)), 0, 255).astype(np.uint8)


def build(path: Path) -> None:
    """Write the scan; the blocks lie in an ellipse on glass."""
    rng, (across, down) = np.random.default_rng(0), (-(-WIDTH // BLOCK), -(-HEIGHT // BLOCK))
    blocks = [*(tissue_block(rng) for _ in range(BLOCKS)), np.full((BLOCK, BLOCK, 3), 243, np.uint8)]
    y, x = np.mgrid[:down, :across]
    inside = ((x - across / 2) / (0.33 * across)) ** 2 + ((y - down / 2) / (0.33 * down)) ** 2 < 1
    place = np.where(inside, rng.integers(0, BLOCKS, (down, across)), BLOCKS)
    text = f"Aperio Image Library v12.0.15 \r\n{WIDTH}x{HEIGHT} (256x256) JPEG/RGB Q=80|AppMag = 40|MPP = 0.25"
    shared = {
        "photometric": "ycbcr",
        "compression": "jpeg",
        "subsampling": (2, 1),
        "dtype": np.uint8,
        "metadata": None,
        "description": text,
    }
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for factor in (1, 4, 16):
            w, h, edge = WIDTH // factor, HEIGHT // factor, BLOCK // factor
            small = [np.asarray(Image.fromarray(block).reduce(factor)) for block in blocks]
            if edge < STORED:  # a stored tile shows several blocks
                side = STORED // edge
                padded = np.pad(place, ((0, side), (0, side)), constant_values=BLOCKS)
                whole = np.concatenate([np.concatenate([small[k] for k in row], axis=1) for row in padded])
                cut = [whole[y : y + STORED, x : x + STORED] for y in range(0, h, STORED) for x in range(0, w, STORED)]
                streams = (simplejpeg.encode_jpeg(np.ascontiguousarray(c), 80, colorsubsampling="422") for c in cut)
            else:
                n = edge // STORED
                coded = [
                    simplejpeg.encode_jpeg(np.ascontiguousarray(s[y : y + STORED, x : x + STORED]), 80, colorsubsampling="422")
                    for s in small
                    for y in range(0, edge, STORED)
                    for x in range(0, edge, STORED)
                ]
                cells = ((y, x) for y in range(-(-h // STORED)) for x in range(-(-w // STORED)))
                streams = (coded[(place[y // n, x // n] * n + y % n) * n + x % n] for y, x in cells)
            writer.write(streams, shape=(h, w, 3), tile=(STORED, STORED), **shared)
            if factor == 1:  # Aperio's order: baseline, thumbnail in strips, levels
                thumbnail = {"photometric": "rgb", "compression": "jpeg", "rowsperstrip": 16, "metadata": None, "description": text}
                writer.write(np.asarray(Image.fromarray(blocks[0]).resize((1024, 819))), **thumbnail)


def make_cohort(work: Path, slides: int) -> Cohort:
    """So many slides that are the scan, each of another patient with a report; on disk they are hard links."""
    grid, (row,) = TileGrid.load(grid_path(work / "work", "s")), read_slides(work / "work")
    folder = work / f"cohort{slides}"
    if not folder.exists():
        folder.mkdir()
        for i in range(slides):
            os.link(row["path"], folder / f"s{i}.svs")
            replace(grid, slide_id=f"s{i}").save(grid_path(folder, f"s{i}"))
        rows = [row | {"slide_id": f"s{i}", "path": str(folder / f"s{i}.svs")} for i in range(slides)]
        write_table(folder / "slides.csv", COLUMNS, [[r[column] for column in COLUMNS] for r in rows])
        write_reports(folder / "reports.csv", slides)
    return Cohort.load(folder).with_reports(folder / "reports.csv")


class Free(Stub):
    """An encoder that looks at four pixels of a tile."""

    reads = False

    def encode_tiles(self, tiles: Tensor, views: object = None) -> Tensor:
        return super().encode_tiles(tiles[:, 64::128, 64::128].repeat_interleave(37, -1))


def floor_s(slide: Slide, xy: np.ndarray) -> float:
    """Processor seconds of decoding alone, of the stored tiles that tiles at `xy` show."""
    stored = slide._parts[0][0][1]  # the benchmark may look inside
    needed = stored._plan(xy, np.array([2 * SIZE, 2 * SIZE]))[0].tolist()
    streams = [os.pread(slide._file.fileno(), int(stored.counts[i]), int(stored.offsets[i])) for i in needed]
    buffer = np.empty((STORED, STORED, 3), np.uint8)
    start = time.thread_time()
    for i, data in zip(needed, streams):
        stored.decode(data, i, buffer)
    return time.thread_time() - start


def against_floor(slide: Slide, places: list[np.ndarray], read: Callable[[np.ndarray], object]) -> dict[str, float]:
    """ms per tile of a read, and the floor over it."""
    ratios, each = [], []
    for xy in places:
        before, start = floor_s(slide, xy), time.thread_time()
        read(xy)
        taken = time.thread_time() - start
        ratios.append((before + floor_s(slide, xy)) / 2 / taken)
        each.append(1e3 * taken / len(xy))
    return {"ms_per_tile": round(statistics.median(each), 3), "over_floor": round(statistics.median(ratios), 3)}


# what is measured, one process each


def bare(work: Path, contender: str) -> dict[str, float]:
    """One of tiling.py's contenders in a process that has loaded nothing else."""
    imports, code = CONTENDERS[contender]
    command = [sys.executable, "-c", START.format(imports=imports, code=code), str(work / "scans/s.svs"), str(work / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, cpu, megabytes, tiles = map(float, done.stdout.split()[-4:])
    return {"s": round(wall, 2), "cpu_s": round(cpu, 2), "tiles": round(tiles), "peak_mb": round(megabytes)}


def tile(work: Path) -> dict[str, float]:
    shutil.rmtree(work / "work", ignore_errors=True)
    ours, loop = bare(work, "ours_files"), bare(work, "openslide_loop")
    compared = {"openslide_loop_s": loop["s"], "openslide_loop_cpu_s": loop["cpu_s"]}
    return ours | compared | {"over_openslide": round(loop["s"] / ours["s"], 1)}


def read(work: Path) -> dict[str, float]:
    """Ours over the floor in raster order and at random, from the scan and from its pack, and what the pack costs."""
    grid, rng, result = TileGrid.load(grid_path(work / "work", "s")), np.random.default_rng(0), {}
    slide = grid.open_scan(work / "scans/s.svs")
    raster = np.split(grid.xy[1000:5096], 64)
    drawn = [grid.xy[np.sort(rng.choice(len(grid), 16, replace=False))] for _ in range(64)]
    orders = {"raster": raster, "random": drawn}
    for name, places in orders.items():
        found = against_floor(slide, places, lambda xy: slide.read_tiles(xy, SIZE, MPP))
        result |= {f"{name}_{key}": value for key, value in found.items()}
    with Slide.open(slide.path, mpp=0.2527) as other:
        found = against_floor(other, raster, lambda xy: other.read_tiles(xy, SIZE, MPP))
    result |= {f"not_twice_{key}": value for key, value in found.items()}
    path, start = pack_path(work, grid.slide_id), clocks()
    write_pack(slide, grid, path)
    wall, cpu = clocks() - start
    result |= {"pack_s": round(wall, 1), "pack_cpu_s": round(cpu, 1), "pack_gb": round(path.stat().st_size / 1e9, 3)}
    result |= {"scan_gb": round((work / "scans/s.svs").stat().st_size / 1e9, 3)}
    pack, row = TilePixels(work, work / "scans/s.svs", grid), {place: n for n, place in enumerate(map(tuple, grid.xy.tolist()))}
    assert pack.slide.path == path
    for name, places in orders.items():
        ratios = []
        for xy in places:
            start = time.thread_time()
            slide.read_tiles(xy, SIZE, MPP)
            scan = time.thread_time() - start
            rows, start = np.array([row[place] for place in map(tuple, xy.tolist())]), time.thread_time()
            pack.read(rows)
            ratios.append(scan / (time.thread_time() - start))
        result[f"{name}_pack_over_scan"] = round(statistics.median(ratios), 2)
    path.unlink()
    return result


def fill(work: Path) -> dict[str, float]:
    Encoder.create = lambda *_, **__: Free()
    cohort = make_cohort(work, FEW)
    config = RunConfig(EncoderConfig("stub"), ModelConfig(codewords=K), TrainConfig(workers=1, cache_gb=0))
    run = trainer.open_run(cohort, Cohort(()), config, work / "fill", trainer.Ranks())
    run.bank.create()
    run.cohort, run.rank_of = run.cohort.subset(run.cohort.members[:1]), [0]
    grid = run.reader.grid(0)
    sample = grid.xy[np.linspace(0, len(grid) - 1, 512).astype(int)]
    slide = grid.open_scan(cohort.members[0].source)
    before, start = floor_s(slide, sample), clocks()
    trainer.fill_bank(run)
    wall, cpu = clocks() - start
    floor = (before + floor_s(slide, sample)) / 2 / len(sample) * len(grid)
    return {
        "s": round(wall, 1),
        "tiles_per_s": round(len(grid) / wall),
        "tiles_per_cpu_s": round(len(grid) / cpu),
        "over_floor": round(floor / cpu, 3),
    }


def steps(work: Path) -> dict[str, float]:
    Encoder.create = lambda *_, **__: Free()
    run, reading = make_run(make_cohort(work, FEW), work / "steps", "stub", 2, 16, 128), []
    plain, slide = run.reader.read, run.reader.grid(0).open_scan(run.cohort.members[0].source)

    def timed(member: int, index: np.ndarray) -> np.ndarray:
        xy, whole = run.reader.grid(member).xy[index], time.thread_time()
        before, start = floor_s(slide, xy), time.thread_time()
        pixels = plain(member, index)
        taken, after = time.thread_time() - start, floor_s(slide, xy)
        reading.append((taken, (before + after) / 2, time.thread_time() - whole, len(xy)))
        return pixels

    run.reader.read = timed
    run.model.train()
    start = clocks()
    for _ in range(200):
        plan = trainer.plan_steps(run)[0]
        trainer.train_step(run, [trainer.draw_sample(run, int(m)) for m in plan[0]], plan)
        run.epoch += 1  # other tiles
        run.step += 1
    _, cpu = clocks() - start
    taken, floor, spent_on_both, count = np.array(reading).T
    step = cpu - spent_on_both.sum() + taken.sum()
    return {
        "tiles": int(count.sum()),
        "ms_per_tile": round(1e3 * step / count.sum(), 2),
        "of_it_reading_ms": round(1e3 * taken.sum() / count.sum(), 2),
        "reading_over_floor": round(float(np.median(floor / taken)), 3),
        "step_over_floor": round(floor.sum() / step, 3),
    }


def embed_all(work: Path) -> dict[str, float]:
    """Saves a model first; its time is not counted."""
    Encoder.create = lambda *_, **__: Free()
    cohort = make_cohort(work, FEW)
    run = make_run(cohort, work / "embed", "stub", 2, 16, 128)
    run.model.save(work / "model")
    start = clocks()
    embed(cohort.subset(cohort.members[:1]), work / "emb", model=work / "model", settings=TrainConfig(workers=1))
    wall, cpu = clocks() - start
    return {"s": round(wall, 1), "cpu_s": round(cpu, 1)}


def heatmap(work: Path) -> dict[str, float]:
    Encoder.create = lambda *_, **__: Free()
    start = clocks()
    embedded = Embeddings.load(work / "emb/embeddings.h5")
    failed = draw_heatmaps(make_cohort(work, FEW), embedded, work / "maps", text="gland vessel", settings=TrainConfig(workers=1))
    wall, cpu = clocks() - start
    assert not failed
    return {"s": round(wall, 1), "cpu_s": round(cpu, 1)}


def cohort(work: Path, slides: int = 200) -> dict[str, object]:
    Encoder.create, Cohort.mark = lambda *_, **__: Free(), lambda *_: "m"
    many, M = make_cohort(work, slides), len(TileGrid.load(grid_path(work / "work", "s")))
    words = nn.functional.normalize(torch.randn(K, D), dim=1).numpy()
    sparse_bank(work / "run/bank", slides, M, words, encoder="stub")
    trainer.fit_codebook = lambda *_, **__: words  # of zeros there is none to fit
    reading, epochs, plain, run_epoch, opened = [0.0], [], TileReader.read, trainer.run_epoch, Slide.open.__func__

    def read_timed(self: TileReader, member: int, index: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        start = time.thread_time()
        pixels = plain(self, member, index, out)
        reading[0] += time.thread_time() - start
        return pixels

    def epoch_timed(run: trainer.Run) -> dict[str, float]:
        reading[0], spent["seconds"], start = 0.0, 0.0, clocks()
        values = run_epoch(run)
        wall, cpu = clocks() - start
        outside = cpu - reading[0] - spent["seconds"]
        files, megabytes = len(list(Path("/proc/self/fd").iterdir())), rss_mb()
        own = int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # the rest are pages of the bank's files
        figures = {
            "s": wall,
            "reading_cpu_s": reading[0],
            "outside_cpu_s": outside,
            "open_files": files,
            "rss_mb": megabytes,
            "own_mb": own,
        }
        epochs.append({name: round(value, 1) for name, value in figures.items()})
        return values

    TileReader.read, trainer.run_epoch = read_timed, epoch_timed
    start = time.perf_counter()
    with opened(Slide, many.members[0].source):
        open_ms = 1e3 * (time.perf_counter() - start)
    config = RunConfig(EncoderConfig("stub"), ModelConfig(codewords=K), TrainConfig(epochs=3, workers=1, cache_gb=0))
    trainer.pretrain(many, work / "run", config)
    return {"slides": slides, "open_a_scan_ms": round(open_ms, 1), "epochs": epochs}


def decode_part(work: Path, part: int, parts: int) -> None:
    """Read every so many of 48 groups of 32 tiles."""
    grid = TileGrid.load(grid_path(work / "work", "s"))
    with grid.open_scan(work / "scans/s.svs") as slide:
        for xy in np.split(grid.xy[2000:3536], 48)[part::parts]:
            slide.read_tiles(xy, SIZE, MPP)


def threads(work: Path) -> dict[str, float]:
    """The last figures: each stored tile's decoding replaced by a sleep of its length, as if each thread had a core.

    All that is not decoding (an upper bound of what holds the interpreter's lock), and the speed of 16 threads over one.
    """
    grid, ratios = TileGrid.load(grid_path(work / "work", "s")), []
    with multiprocessing.get_context("fork").Pool(2) as processes, ThreadPoolExecutor(16) as pool:
        for _ in range(6):
            times = []
            for run in (
                lambda: decode_part(work, 0, 1),
                lambda: list(pool.map(lambda part: decode_part(work, part, 2), range(2))),
                lambda: processes.starmap(decode_part, [(work, part, 2) for part in range(2)]),
            ):
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
            ratios.append((times[0] / times[1], times[0] / times[2], times[2] / times[1]))
        two, forked, relative = np.median(ratios[1:], axis=0).round(2).tolist()
        slide, speeds = grid.open_scan(work / "scans/s.svs"), []
        ((at, half),) = slide._halves[0]
        blank = np.zeros((STORED, STORED, 3), np.uint8)

        def asleep(data: bytes, index: int, buffer: np.ndarray) -> np.ndarray:
            time.sleep(350e-6)
            return blank

        slide._halves[0] = [(at, replace(half, whole=replace(half.whole, decode=asleep)))]
        sys.modules["dreslcl.segments"].halve = lambda pixels: pixels[: STORED // 2, : STORED // 2]
        for workers in (1, 16):
            jobs, start = np.split(grid.xy[1000:5096], 128), clocks()
            with ThreadPoolExecutor(workers) as some:
                list(some.map(lambda xy: len(slide.read_tiles(xy, SIZE, MPP)), jobs))
            speeds.append((clocks() - start) / 4096)
    (wall, cpu), (together, _) = speeds
    asleep_figures = {"besides_decoding_ms_per_tile": round(1e3 * cpu, 3), "threads16_asleep": round(wall / together, 1)}
    return {"threads2": two, "processes2": forked, "threads_over_processes": relative} | asleep_figures


PARTS = {f.__name__: f for f in (tile, read, fill, steps, embed_all, heatmap, cohort, threads)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=None, help="keep the scan and what was made of it here; 3 GB")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.one:
        result = PARTS[options.one](options.work)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # not ru_maxrss, which starts at the parent's
        print(json.dumps({"peak_mb": round(int(peak[1]) / 1024)} | result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        scan, found = work / "scans/s.svs", {}
        if not scan.exists():
            scan.parent.mkdir(parents=True)
            start = time.perf_counter()
            build(scan)
            found["build"] = {"s": round(time.perf_counter() - start, 1), "gb": round(scan.stat().st_size / 1e9, 2)}
        for name in options.only.split(","):
            done = subprocess.run([sys.executable, __file__, "--work", work, "--one", name], stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            if not options.json:
                print(name, found[name], flush=True)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
