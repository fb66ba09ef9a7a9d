"""From a folder of scans to tile grids: which places of each scan are tissue, as files that any tool reads.

A slide's files are written in this order: grid, polygons, overlay, pack, and last `rows/<slide_id>.json` with its row and
the fingerprint of what made it. So a row means a finished slide; `slides.csv` is put together from the rows, under a lock,
which is what makes killed, repeated and shared-out runs end in the same files.
"""

import io
import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import simplejpeg
from jaxtyping import Bool, Float32, Int64
from PIL import Image, ImageDraw
from tifffile import TiffFile, TiffFileError, TiffWriter

from . import __version__
from .common import (
    ConfigError,
    DiskError,
    DreslclError,
    SlideError,
    StoreError,
    TableError,
    atomic,
    check_id,
    file_stamp,
    fingerprint,
    hdf5_file,
    hold,
    progress,
    rank_and_world,
    read_table,
    reason,
    slide_id,
    write_bytes,
    write_json,
    write_table,
)
from .config import TileConfig
from .slide import Slide
from .tissue import box_fractions, draw_overlay, draw_polygons, mask_polygons, polygons_to_geojson, read_geojson, sharpness, tissue_mask


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The M tiles of a slide; row m is row m of everything that is stored per tile."""

    slide_id: str
    xy: Int64[np.ndarray, "m 2"]
    """Top-left corners, level-0 pixels, row-major order."""
    tissue: Float32[np.ndarray, "m"]
    """Share of each tile that is tissue."""
    extent_px: int
    """Edge of a tile in level-0 pixels."""
    size: int
    """Edge of a tile as the encoder sees it, pixels."""
    mpp: float
    """Resolution of a tile, µm per pixel."""
    mpp_level0: float
    mpp_source: str
    level0_size: tuple[int, int]
    fingerprint: str
    """Of the parameters and of the scan's size and time of change."""
    overlap: int = 0

    def __len__(self) -> int:
        return len(self.xy)

    def save(self, path: Path) -> None:
        """Write TRIDENT's coordinate layout; resolutions as magnifications, 10 / mpp, which may be fractions and so stay exact."""
        with hdf5_file(path) as file:
            self.describe(file.create_dataset("coords", data=self.xy), path.parent.name)
            file.create_dataset("tissue_fraction", data=self.tissue)

    def describe(self, coords: h5py.Dataset, folder: str) -> None:
        """Put TRIDENT's attributes, and ours, on a dataset of this grid's corners; `folder` is the one that the file is in."""
        coords.attrs.update(
            patch_size=self.size, patch_size_level0=self.extent_px, level0_magnification=10 / self.mpp_level0,
            target_magnification=10 / self.mpp, overlap=self.overlap, name=self.slide_id, savetodir=folder,
            level0_width=self.level0_size[0], level0_height=self.level0_size[1], mpp_level0=self.mpp_level0, mpp=self.mpp,
            mpp_source=self.mpp_source, fingerprint=self.fingerprint, dreslcl_version=__version__,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "TileGrid":
        """Read what `save` wrote.

        Raises:
            StoreError: no such file, or not a whole grid.
        """
        try:
            with h5py.File(path, "r") as file:
                xy, tissue, at = file["coords"][:], file["tissue_fraction"][:], dict(file["coords"].attrs)
            return cls(
                slide_id=str(at["name"]), xy=xy, tissue=tissue, extent_px=int(at["patch_size_level0"]), size=int(at["patch_size"]),
                mpp=float(at["mpp"]), mpp_level0=float(at["mpp_level0"]), mpp_source=str(at["mpp_source"]),
                level0_size=(int(at["level0_width"]), int(at["level0_height"])), fingerprint=str(at["fingerprint"]),
                overlap=int(at["overlap"]),
            )  # fmt: skip
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: no tile grid of dreslcl ({error}); run `dreslcl tile` again") from error


def grid_corners(level0_size: tuple[int, int], extent: int, step: int) -> Int64[np.ndarray, "n 2"]:
    """Top-left corners, in row-major order, of all grid cells that lie wholly on the scan."""
    x, y = (np.arange(0, side - extent + 1, step, dtype=np.int64) for side in level0_size)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def hilbert_order(xy: Int64[np.ndarray, "m 2"], step: int) -> Int64[np.ndarray, "m"]:
    """The order that visits places along a Hilbert curve over cells of `step` pixels: neighbours in order are neighbours in place."""
    x, y = (xy // max(step, 1)).T.copy()
    bits = max(1, int(max(x.max(initial=0), y.max(initial=0))).bit_length())
    distance = np.zeros(len(xy), np.int64)
    for side in (1 << b for b in reversed(range(bits))):
        right, up = (x & side) > 0, (y & side) > 0
        distance += side * side * ((3 * right) ^ up)
        flip = ~up & right
        x, y = np.where(flip, side - 1 - (x & (side - 1)), x & (side - 1)), np.where(flip, side - 1 - (y & (side - 1)), y & (side - 1))
        x, y = np.where(up, x, y), np.where(up, y, x)
    return np.argsort(distance, kind="stable")


def thin_out(xy: Int64[np.ndarray, "m 2"], step: int, count: int) -> Int64[np.ndarray, "n"]:
    """Rows of `count` tiles drawn evenly over the slide: every so many along a Hilbert curve, given in rising order."""
    return np.sort(hilbert_order(xy, step)[np.linspace(0, len(xy) - 1, count).round().astype(np.int64)])


def aligned_extent(slide: Slide, config: TileConfig) -> int:
    """The tile edge, level-0 pixels, within 2 % of the one asked for, that is a whole number of stored tiles or a whole part of one.

    Then every tile needs the fewest stored tiles. Where there is none, the edge asked for; the first level that offers one is taken.
    """
    asked = slide.extent(config.size, config.mpp)
    for level in reversed(slide.levels) if not config.overlap else ():
        stored, height = slide._stored[level.index].edge
        if stored != height or level.downsample * config.size > asked * 1.02:
            continue
        wanted = asked / level.downsample
        whole = stored * max(1, round(wanted / stored)) if wanted > stored * 0.75 else stored / round(stored / wanted)
        if whole == int(whole) and abs(whole / wanted - 1) <= 0.02:
            return round(whole * level.downsample)
    return asked


def read_coords(path: Path, slide: Slide) -> tuple[Int64[np.ndarray, "m 2"], int, int]:
    """Coordinates that TRIDENT or CLAM wrote: corners and tile edge in level-0 pixels, and tile edge in pixels.

    Raises:
        SlideError: not such a file, or a place beyond the scan.
    """
    if not path.exists():
        raise SlideError(f"{path}: not there; coordinates that TRIDENT or CLAM wrote for this scan are needed")
    try:
        with h5py.File(path, "r") as file:
            xy, at = np.asarray(file["coords"], np.int64).reshape(-1, 2), dict(file["coords"].attrs)
        size = int(at["patch_size"])
        extent = int(at["patch_size_level0"]) if "patch_size_level0" in at else round(size * float(np.ravel(at["downsample"])[0]))
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SlideError(f"{path}: no coordinates as TRIDENT or CLAM write them ({error})") from error
    if len(xy) and (xy.min() < 0 or (xy.max(axis=0) >= slide.size).any()):
        raise SlideError(f"{path}: holds a tile at {tuple(xy.max(axis=0).tolist())}, but the scan has {slide.size[0]} x {slide.size[1]} px")
    return xy, extent, size


log = logging.getLogger(__name__)

QUALITY = 90
"""Of JPEG tiles that are encoded anew (without chroma subsampling)."""
CHUNK = 256
"""Tiles read at a time."""


def pack_path(work: Path, slide_id: str) -> Path:
    """Where the pack of a slide is kept."""
    return Path(work) / "packs" / f"{slide_id}.tiff"


def packed_corners(grid: TileGrid) -> Int64[np.ndarray, "m 2"]:
    """Top-left corners of the grid's tiles in its pack, pixels of the pack."""
    number = np.arange(len(grid), dtype=np.int64)
    columns = _columns(grid)
    return np.stack([number % columns, number // columns], axis=1) * _pitch(grid)


def _columns(grid: TileGrid) -> int:
    return max(1, math.isqrt(max(0, len(grid) - 1)) + 1)


def _pitch(grid: TileGrid) -> int:
    return -(-grid.size // 16) * 16  # TIFF's tiles are multiples of 16 px


def write_pack(slide: Slide, grid: TileGrid, path: Path) -> bool:
    """Write a grid's tiles; a grid without tiles gets no pack. Returns whether the scan's own bytes were copied.

    Raises:
        SlideError: the scan cannot be read.
        OSError: the pack cannot be written.
    """
    if not len(grid):
        path.unlink(missing_ok=True)
        return False
    columns, pitch = _columns(grid), _pitch(grid)
    rows = -(-len(grid) // columns)
    blank = [b""] * (rows * columns - len(grid))  # bytes of no length: a tile that is not stored
    copied = _stored_tiles(slide, grid)
    how: dict[str, Any] = {"photometric": "ycbcr", "subsampling": (1, 1)}
    tiles = _encoded_tiles(slide, grid)
    if copied is not None:
        tiles, how = copied
    says = {"dreslcl_pack": 1, "slide_id": grid.slide_id, "tiles": len(grid), "mpp": grid.mpp, "fingerprint": grid.fingerprint}
    with atomic(path) as part, TiffWriter(part, bigtiff=True) as writer:
        writer.write(
            (data for source in (tiles, blank) for data in source),
            shape=(rows * pitch, columns * pitch, 3),
            dtype=np.uint8,
            tile=(pitch, pitch),
            compression="jpeg",
            description=json.dumps(says),
            resolution=(1e4 / grid.mpp, 1e4 / grid.mpp),
            resolutionunit="CENTIMETER",
            metadata=None,
            **how,
        )
    return copied is not None


def _encoded_tiles(slide: Slide, grid: TileGrid) -> Iterator[bytes]:
    pitch = _pitch(grid)
    padded = np.full((pitch, pitch, 3), 255, np.uint8)
    for start in range(0, len(grid), CHUNK):
        for tile in slide.read_tiles(grid.xy[start : start + CHUNK], grid.size, grid.mpp):
            padded[: grid.size, : grid.size] = tile
            yield simplejpeg.encode_jpeg(padded, QUALITY, colorsubsampling="444")


def _stored_tiles(slide: Slide, grid: TileGrid) -> tuple[Iterator[bytes], dict[str, Any]] | None:
    """The bytes of the scan's own tiles and how to write them, if every tile of the grid is one JPEG tile of one level."""
    level = next((level for level in slide.levels if level.downsample * grid.size == grid.extent_px), None)
    if level is None or grid.size != _pitch(grid) or (grid.xy % grid.extent_px).any():
        return None
    try:
        with TiffFile(slide.path) as tif:
            pages = [part.keyframe for series in tif.series for part in series.levels]
            pages = [p for p in pages if p.is_tiled and (p.imagewidth, p.imagelength) == level.size and p.compression == 7]
            if len(pages) != 1 or (pages[0].tilewidth, pages[0].tilelength) != (grid.size, grid.size) or pages[0].samplesperpixel != 3:
                return None
            [page] = pages
            how = {"photometric": page.photometric, "jpegtables": page.jpegtables, "subsampling": page.subsampling}
            how["compressionargs"] = {"outcolorspace": page.photometric}  # else tifffile calls RGB YCbCr
            columns = -(-page.imagewidth // grid.size)
            index = (grid.xy // grid.extent_px @ [1, columns]).tolist()
            offsets, counts = page.dataoffsets, page.databytecounts
    except TiffFileError:  # a PNG or JPEG image
        return None
    if not all(counts[i] for i in index):
        return None

    def read() -> Iterator[bytes]:
        with slide.path.open("rb") as file:
            for i in index:
                file.seek(offsets[i])
                yield file.read(counts[i])

    return read(), how


def packed_fingerprint(path: Path) -> str:
    """The fingerprint of the grid that a pack was written for; empty where there is no whole pack."""
    try:
        with TiffFile(path) as tif:
            return str(json.loads(tif.pages.first.description)["fingerprint"])
    except Exception:  # a broken header makes tifffile raise anything
        return ""


def open_tiles(work: Path, scan: Path, grid: TileGrid) -> tuple[Slide, Int64[np.ndarray, "m 2"]]:
    """What to read a grid's tiles from, and where they lie in it: `slide.read_tiles(xy[rows], grid.size, grid.mpp)`.

    That is the pack, if there is one of this very grid, else the scan.

    Raises:
        SlideError: it cannot be opened.
    """
    path = pack_path(work, grid.slide_id)
    if path.exists():
        if packed_fingerprint(path) == grid.fingerprint:
            return Slide.open(path, mpp=grid.mpp), packed_corners(grid)
        log.warning("%s was written for another grid; reading the scan (run `dreslcl tile --pack` again)", path)
    return Slide.open(scan, mpp=grid.mpp_level0), grid.xy


log = logging.getLogger(__name__)

COLUMNS = "slide_id path status tiles mpp mpp_source width height vendor tissue_mm2 seconds error".split()
SCANS = set(".svs .tif .tiff .ndpi .scn .bif .qptiff .png .jpg .jpeg".split())  # what `Slide` reads
FOREIGN = set(".dcm .mrxs .vms .vmu .czi .isyntax .i2syntax .zvi .vsi .svslide .lif .sdpc .kfb".split())  # scans that get an error row
OVERRIDES: dict[str, Callable[[str], Any]] = {  # what a table may set per slide: the scan's own mpp, and knobs of TileConfig
    "mpp": float, "threshold": float, "min_tissue": float, "max_tiles": int, "min_sharpness": float, "mask_mpp": float,
    "drop_pen": lambda text: text.lower() in ("1", "true", "yes"),
}  # fmt: skip


def grid_path(work: Path, slide_id: str) -> Path:
    """Where the grid of a slide is kept."""
    return Path(work) / "tiles" / f"{slide_id}.h5"


def read_slides(work: Path) -> list[dict[str, str]]:
    """The rows of WORK/slides.csv, in the order of their ids.

    Raises:
        TableError: `work` holds none, or one with an id that cannot name a file.
    """
    path = Path(work) / "slides.csv"
    if not path.is_file():
        raise TableError(f"{path}: not there; run `dreslcl tile SLIDES --out {work}` first")
    rows = read_table(path, COLUMNS)
    rows = [{key: value[1:] if value[:1] == "'" and value[1:2] in tuple("=+-@") else value for key, value in row.items()} for row in rows]
    for row in rows:
        if row["status"] != "error":  # the failed ones may be there for their very name
            check_id(row["slide_id"], str(path))
    return rows


@dataclass(frozen=True)
class _Job:
    slide_id: str
    path: Path
    out: Path
    config: TileConfig
    mpp: float | None
    annotation: Path | None
    coords: Path | None
    pack: bool
    fingerprint: str


def _make_grid(job: _Job, slide: Slide, mask: Bool[np.ndarray, "h w"], mpp_source: str) -> TileGrid:
    config, size = job.config, job.config.size
    if job.coords is not None:
        xy, extent, size = read_coords(job.coords, slide)
        step, mpp = extent, extent * slide.mpp / size
        tissue = box_fractions(mask, xy, extent, slide.size)
    else:
        extent, mpp = slide.extent(size, config.mpp), config.mpp
        if False and (aligned := aligned_extent(slide, config)) != extent:
            extent, mpp = aligned, aligned * slide.mpp / size
        step = max(1, round(extent * (size - config.overlap) / size))
        xy = grid_corners(slide.size, extent, step)
        tissue = box_fractions(mask, xy, extent, slide.size)
        keep = (tissue >= config.min_tissue) & (tissue > 0)
        xy, tissue = xy[keep], tissue[keep]
    if config.min_sharpness:
        chunks = [xy[start : start + 256] for start in range(0, len(xy), 256)]
        sharp = [sharpness(slide.read_tiles(chunk, size, mpp)) >= config.min_sharpness for chunk in chunks]
        keep = np.concatenate([np.zeros(0, bool), *sharp])
        xy, tissue = xy[keep], tissue[keep]
    if 0 < config.max_tiles < len(xy):
        keep = thin_out(xy, step, config.max_tiles)
        xy, tissue = xy[keep], tissue[keep]
    overlap = 0 if job.coords is not None else config.overlap
    return TileGrid(job.slide_id, xy, tissue, extent, size, mpp, slide.mpp, mpp_source, slide.size, job.fingerprint, overlap)


def _open(job: _Job) -> tuple[Slide, str]:
    slide = Slide.open(job.path, mpp=job.mpp)
    if slide.mpp is None and job.config.default_mpp is not None:
        slide.close()
        return Slide.open(job.path, mpp=job.config.default_mpp), "default-mpp"
    return slide, slide.mpp_source if job.mpp is None else "mpp-csv"


def _tile(job: _Job, dry_run: bool) -> dict[str, Any]:
    """Tile one slide; whatever is wrong with the scan becomes its row. Only a fault of the output folder is raised."""
    start = time.perf_counter()
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"slide_id": job.slide_id, "path": str(job.path), "status": "error", "tiles": 0}
    try:
        slide, mpp_source = _open(job)
        with slide:
            row |= {
                "mpp": slide.mpp or "",
                "mpp_source": mpp_source,
                "vendor": slide.vendor,
                "width": slide.size[0],
                "height": slide.size[1],
            }
            row |= {"levels": len(slide.levels)} if dry_run else {}
            grid, mask, polygons, thumbnail = _examine(job, slide, mpp_source)
            row["tissue_mm2"] = round(float(mask.mean()) * slide.size[0] * slide.size[1] * slide.mpp**2 / 1e6, 4)
            small = grid.extent_px > min(slide.size)
            row |= {"tiles": len(grid), "status": "ok" if len(grid) else "empty"}
            row["error"] = "" if len(grid) else f"smaller than one tile of {grid.extent_px} px" if small else "no tissue found"
            if not dry_run:
                grid.save(grid_path(job.out, job.slide_id))
                write_json(job.out / "tissue" / f"{job.slide_id}.geojson", polygons_to_geojson(polygons))
                overlay = draw_overlay(thumbnail, polygons, grid.xy, grid.extent_px, slide.size)
                _save_jpeg(overlay, job.out / "overlays" / f"{job.slide_id}.jpg")
                if job.pack and write_pack(slide, grid, pack_path(job.out, job.slide_id)):
                    log.info("%s: packed without encoding anew", job.slide_id)
    except DiskError:  # not the scan's fault
        raise
    except (DreslclError, OSError, MemoryError) as error:
        row |= {"status": "error", "tiles": 0, "error": reason(error)}
    except Exception as error:
        log.debug("%s", job.path, exc_info=True)
        row |= {"status": "error", "tiles": 0, "error": f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"}
    row["seconds"] = round(time.perf_counter() - start, 2)
    if not dry_run:
        write_json(job.out / "rows" / f"{job.slide_id}.json", {"fingerprint": job.fingerprint, "row": row})
    return row


def _examine(job: _Job, slide: Slide, mpp_source: str) -> tuple[TileGrid, np.ndarray, list[list[np.ndarray]], np.ndarray]:
    """Grid, mask, polygons and thumbnail of a slide. The mask gets finer where tiles are small, coarser where it would be huge."""
    config = job.config
    slide.extent(config.size, config.mpp)  # raises where the scan says no resolution
    mask_mpp = min(8.0, config.size * config.mpp / 8)
    mask_mpp = max(mask_mpp, slide.mpp, max(slide.size) * slide.mpp / 8192)
    thumbnail = slide.thumbnail(mask_mpp)
    if job.annotation is not None:
        polygons = read_geojson(job.annotation)
        mask = draw_polygons(polygons, thumbnail.shape[:2], slide.size)
    else:
        mask = tissue_mask(thumbnail, mask_mpp, threshold=config.threshold, drop_pen=config.drop_pen)
        polygons = mask_polygons(mask, slide.size)
    return _make_grid(job, slide, mask, mpp_source), mask, polygons, thumbnail


def find_tiles(slide: Slide, config: TileConfig = TileConfig()) -> TileGrid:  # noqa: B008
    """The tissue tiles of an open scan, as `tile_slides` finds them; nothing is written.

    Raises:
        SlideError: the scan cannot be read, or says no resolution.
    """
    name = slide_id(slide.path, slide.path)
    job = _Job(name, slide.path, slide.path.parent, config, None, None, None, False, fingerprint(asdict(config), file_stamp(slide.path)))
    return _examine(job, slide, slide.mpp_source)[0]


def tile_slides(
    source: Path,
    out: Path,
    config: TileConfig = TileConfig(),  # noqa: B008
    *,
    workers: int = 0,
    force: bool = False,
    dry_run: bool = False,
    shard: tuple[int, int] | None = None,
    mpp_csv: Path | None = None,
    overrides: Path | None = None,
    tissue_geojson: Path | None = None,
    coords: Path | None = None,
    pack: bool = False,
) -> list[dict[str, Any]]:
    """Find the tissue tiles of a scan, or of every scan in a folder, and write grids, polygons, overlays and slides.csv.

    Does only what is missing or was made from other parameters or another version of the scan. A scan that fails gets a row
    with status "error" and the reason, and is tried again by the next run.

    Args:
        workers: slides at a time; 0: one per CPU, at most 8.
        force: do everything again.
        dry_run: write nothing; rows get a column `levels`, and `tiles` as it would be.
        shard: (i, n) does every n-th slide from the i-th, 0 <= i < n; none: as torchrun's RANK and WORLD_SIZE say.
        mpp_csv: table slide_id, mpp: the resolution of level 0, instead of what the scan says.
        overrides: table slide_id and any of mpp, threshold, min_tissue, max_tiles, drop_pen, min_sharpness, mask_mpp; empty: no override.
        tissue_geojson: folder of QuPath annotations `<slide_id>.geojson`, instead of our mask.
        coords: folder of coordinates that TRIDENT or CLAM wrote, instead of our grid.
        pack: also write packs, see pack.py.

    Returns:
        The rows of this run's slides (of its shard), those that were already there included.

    Raises:
        DreslclError: nothing to do, bad tables, the output folder is in use by another run, or cannot be written.
    """
    source, out = Path(os.path.abspath(source)), Path(out)  # noqa: PTH100  (links are kept: ids follow the names the user sees)
    index, count = shard or rank_and_world()
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: shards of {count} are numbered from 0 to {count - 1}")
    scans, unusable = _find_scans(source, out)
    every_job = _plan(scans, out, config, [table for table in (mpp_csv, overrides) if table], tissue_geojson, coords, pack)
    jobs, refused = every_job[index::count], unusable if index == 0 else []
    for row in refused:
        log.warning("%s (%s)", row["error"], row["path"])
    threads = workers or min(8, os.cpu_count() or 1)
    if dry_run:
        return refused + _run(jobs, threads, lambda job: _tile(job, dry_run=True), lambda: None)
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(out, shared=count > 1))
            if count > 1:
                stack.enter_context(hold(out, f".lock-{index}-of-{count}"))
            made = {} if force else _read_rows(out)
            rows = [made[job.slide_id]["row"] for job in jobs if _is_done(job, made.get(job.slide_id))]
            todo = [job for job in jobs if not _is_done(job, made.get(job.slide_id))]
            rows += _run(todo, threads, lambda job: _tile(job, dry_run=False), lambda: _gather(out, every_job, unusable))
            _gather(out, every_job, unusable)
            _contact_sheet(out)
        except OSError as error:
            raise StoreError(f"{out}: cannot be written ({error.strerror or error})") from error
    return sorted(refused + rows, key=lambda row: row["slide_id"])


def _find_scans(source: Path, out: Path) -> tuple[list[tuple[str, Path]], list[dict[str, Any]]]:
    """Ids and paths of the scans in a folder, by id; and rows for those whose name cannot be an id of their own."""
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder")
    if source.is_dir() and out.exists() and source.samefile(out):
        raise ConfigError(f"{out}: results cannot go among the scans; choose another folder for --out")
    paths = [source] if source.is_file() else []
    seen = {os.path.realpath(source), os.path.realpath(out)}
    for folder, subfolders, names in os.walk(source, followlinks=True):
        subfolders[:] = [s for s in sorted(subfolders) if not s.startswith(".") and os.path.realpath(Path(folder, s)) not in seen]
        seen.update(os.path.realpath(Path(folder, s)) for s in subfolders)  # no folder twice, nor the output folder
        paths += [Path(folder, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in SCANS | FOREIGN]
    if not paths:
        raise ConfigError(f"{source}: no scan in there; scans end in {' '.join(sorted(SCANS))}")
    by_id = defaultdict(list)
    for path in sorted(paths):
        by_id[slide_id(path, source)].append(path)
    scans, unusable = [], []
    for name, same in sorted(by_id.items()):
        reason = f"{' and '.join(p.name for p in same)} would share this id; rename or move one" if len(same) > 1 else ""
        try:
            check_id(name, str(same[0]))
        except TableError as error:
            reason = str(error)
        if len(os.fsencode(name)) > 200:
            reason = "the path is too long to name files after; shorten it"
        if reason:
            unusable.append(
                dict.fromkeys(COLUMNS, "") | {"slide_id": name, "path": str(same[0]), "status": "error", "tiles": 0, "error": reason}
            )
        else:
            scans.append((name, same[0]))
    return scans, unusable


def _plan(
    scans: list[tuple[str, Path]],
    out: Path,
    config: TileConfig,
    tables: list[Path],
    annotations: Path | None,
    coords: Path | None,
    pack: bool,
) -> list[_Job]:
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    for table in tables:
        for line, row in enumerate(read_table(table, ["slide_id"]), start=2):
            if unknown := [column for column in row if column not in ("slide_id", *OVERRIDES)]:
                raise TableError(f"{table}: unknown column {unknown[0]!r}; there can be slide_id, {', '.join(OVERRIDES)}")
            try:
                values[row["slide_id"]] |= {key: OVERRIDES[key](value) for key, value in row.items() if value and key != "slide_id"}
            except ValueError as error:
                raise TableError(f"{table}, line {line}: {error}") from error
    names = {s for s, _ in scans} | {path.name for _, path in scans}
    if lost := [name for name in values if name not in names]:
        log.warning("%d rows of %s name no scan here, the first is %r", len(lost), " and ".join(map(str, tables)), lost[0])
    jobs = []
    for name, path in scans:
        own = values.get(path.name, {}) | values.get(name, {})
        mpp = own.pop("mpp", None)
        annotation = annotations / f"{name}.geojson" if annotations else None
        theirs = _find_coords(coords, name, path) if coords else None
        settings = replace(config, **own)
        stamps = [file_stamp(p) if p and p.exists() else None for p in (path, annotation, theirs)]
        made_of = fingerprint(__version__, asdict(settings), mpp, bool(annotation), bool(theirs), stamps)
        jobs.append(_Job(name, path, out, settings, mpp, annotation, theirs, pack, made_of))
    return jobs


def _find_coords(folder: Path, name: str, path: Path) -> Path:
    for stem in (name, path.stem):
        for candidate in (folder / f"{stem}.h5", folder / f"{stem}_patches.h5", folder / "patches" / f"{stem}_patches.h5"):
            if candidate.exists():
                return candidate
    return folder / f"{name}.h5"


def _run(jobs: list[_Job], threads: int, work: Callable[[_Job], dict[str, Any]], pause: Callable[[], None]) -> list[dict[str, Any]]:
    """Do the jobs, several at a time, and show how far they are; `pause` is called now and then in between.

    Threads, since nearly all work releases the interpreter's lock: two processes were no faster (1.1 and 1.1 times one, on a busy machine).
    """
    rows: list[dict[str, Any]] = []
    last = time.monotonic()
    with progress("tiling", len(jobs), "slides") as bar, ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                rows.append(row := done.result())
                if row["status"] == "error":
                    log.warning("%s (%s)", row["error"], row["path"])
                log.debug("%s: %s, %d tiles", row["slide_id"], row["status"], row["tiles"])
                bar.advance(bar.task_ids[0])
                if time.monotonic() - last > 10:
                    pause()
                    last = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(rows, key=lambda row: row["slide_id"])


# ---------------------------------------------------------------------------------------------------------------------
# The rows of finished slides


def _read_rows(out: Path) -> dict[str, dict[str, Any]]:
    """What `_tile` left of each slide: {"fingerprint", "row"}; a damaged file counts as not there."""
    rows = {}
    for path in sorted((out / "rows").glob("*.json")):
        with suppress(ValueError, KeyError, TypeError):
            made = json.loads(path.read_bytes())
            rows[path.stem] = {"fingerprint": made["fingerprint"], "row": {column: made["row"][column] for column in COLUMNS}}
    return rows


def _is_done(job: _Job, made: dict[str, Any] | None) -> bool:
    if made is None or made["fingerprint"] != job.fingerprint or made["row"]["status"] == "error":
        return False
    packed = not job.pack or not made["row"]["tiles"] or packed_fingerprint(pack_path(job.out, job.slide_id)) == job.fingerprint
    return packed and grid_path(job.out, job.slide_id).exists() and made["row"]["path"] == str(job.path)


def _gather(out: Path, jobs: list[_Job], unusable: list[dict[str, Any]]) -> None:
    """Put slides.csv together from the rows of all runs and shards.

    Left out are rows that this run is about to replace, and failures of scans that are gone.
    """
    current = {job.slide_id: job.fingerprint for job in jobs}
    with hold(out, "rows/.lock", wait=True):
        rows = {row["slide_id"]: row for row in unusable}
        for name, made in _read_rows(out).items():
            fresh = made["fingerprint"] == current.get(name, made["fingerprint"])
            if fresh and name not in rows and (made["row"]["status"] != "error" or name in current or Path(made["row"]["path"]).exists()):
                rows[name] = made["row"]
        write_table(out / "slides.csv", COLUMNS, [[rows[name][column] for column in COLUMNS] for name in sorted(rows)])


def _contact_sheet(out: Path) -> None:
    """All overlays on one page, small, each under its id: what to look at first."""
    with hold(out, "rows/.lock", wait=True):
        paths = sorted((out / "overlays").glob("*.jpg"))
        if not paths:
            return
        columns = int(np.ceil(np.sqrt(len(paths))))
        cell = max(48, min(256, 4096 // columns))
        sheet = Image.new("RGB", (columns * cell, -(-len(paths) // columns) * (cell + 12)), "white")
        draw = ImageDraw.Draw(sheet)
        for n, path in enumerate(paths):
            x, y = n % columns * cell, n // columns * (cell + 12)
            with Image.open(path) as overlay:
                overlay.draft("RGB", (cell, cell))
                overlay.thumbnail((cell - 4, cell - 4))
                sheet.paste(overlay, (x, y + 12))
            draw.text((x, y), path.stem[-(cell // 6) :], fill="black")
        _save_jpeg(sheet, out / "contact_sheet.jpg")


def _save_jpeg(image: Image.Image, path: Path) -> None:
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=85)
    write_bytes(path, memory.getbuffer())
