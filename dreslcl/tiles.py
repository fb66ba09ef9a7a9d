"""From a folder of scans to tile grids: which places of each scan are tissue, as files that any tool reads.

`find_tiles(slide, config)` answers it for one open scan and writes nothing. `tile_slides` does so for a folder: per slide it writes
grid, polygons, overlay, pack, and last `rows/<slide_id>.json` with its row and the fingerprint of what made it. So a row means a
finished slide; `slides.csv` is put together from the rows, under a lock, which is what makes killed, repeated and shared-out runs end
in the same files. Which pixels is tile m? `TilePixels` says it: those of the pack where there is one, else those of the scan.
"""

import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import simplejpeg
from jaxtyping import Bool, Float32, Int64, Integer, UInt8
from PIL import Image, ImageDraw
from tifffile import TiffFile, TiffWriter

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
    cores,
    encoded,
    file_stamp,
    fingerprint,
    hdf5_file,
    hold,
    one_value,
    prefetch,
    rank_and_world,
    read_table,
    reason,
    same_name,
    slide_id,
    track,
    write_bytes,
    write_json,
    write_table,
)  # fmt: skip
from .config import TileConfig
from .slide import OPENSLIDE, Slide
from .tissue import box_fractions, draw_overlay, draw_polygons, mask_polygons, polygons_to_geojson, read_geojson, sharpness, tissue_mask

log = logging.getLogger(__name__)

MASK_MPP = 8.0  # resolution of the tissue mask, µm per pixel; finer where tiles are small, coarser where the mask would be huge
QUALITY = 90  # of the JPEG tiles in packs (without chroma subsampling)
CHUNK = 256  # tiles read at a time
SAMPLE = 256  # stored tiles per level that a check decodes

COLUMNS = "slide_id path status tiles mpp mpp_source width height levels regions vendor reader tissue_mm2 seconds warning error".split()
SCANS = set(".svs .tif .tiff .ndpi .scn .bif .qptiff .png .jpg .jpeg".split()) | {s for s in OPENSLIDE if isinstance(s, str)}
"""Suffixes of what `Slide` reads."""
UNREAD = set(".isyntax .i2syntax .zvi .vsi .lif .sdpc .kfb".split())  # scans that get an error row
SERIES = re.compile(rb"\x20\0\x0d\0(?:UI..|....)[0-9.]+\0?\x20\0\x0e\0(?:UI..|....)([0-9.]+)", re.DOTALL)
"""DICOM's StudyInstanceUID, then SeriesInstanceUID, with explicit or implicit types; nested references never have one after the other."""
OVERRIDES: dict[str, Callable[[str], Any]] = {  # what a table may set per slide: the scan's own mpp, and settings of TileConfig
    "mpp": float, "threshold": float, "min_tissue": float, "max_tiles": int, "min_sharpness": float,
    "drop_pen": lambda text: text.lower() in ("1", "true", "yes"),
}  # fmt: skip
ATTRIBUTES = {  # field of a grid -> its name in the file, TRIDENT's where it has one
    "slide_id": "name", "size": "patch_size", "extent_px": "patch_size_level0", "overlap": "overlap", "mpp": "mpp",
    "mpp_level0": "mpp_level0", "mpp_source": "mpp_source", "fingerprint": "fingerprint", "settings": "settings",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class TileGrid:
    """The M tiles of a slide; row m is row m of everything that is stored per tile."""

    slide_id: str
    xy: Int64[np.ndarray, "m 2"]  # top-left corners, level-0 pixels, row-major order
    tissue: Float32[np.ndarray, "m"]  # share of each tile that is tissue
    extent_px: int  # edge of a tile in level-0 pixels
    size: int  # edge of a tile as the encoder sees it, pixels
    mpp: float  # resolution of a tile, µm per pixel
    mpp_level0: float
    mpp_source: str
    level0_size: tuple[int, int]
    fingerprint: str = ""  # of the parameters and of the scan's size and time of change
    overlap: int = 0
    settings: str = "{}"  # those of TileConfig, as JSON

    def __len__(self) -> int:
        return len(self.xy)

    def open_scan(self, path: Path) -> Slide:
        """The scan that the grid lies on, with the resolution that was taken for it. Raises SlideError as `Slide.open` does."""
        return Slide.open(path, mpp=self.mpp_level0)

    def save(self, path: Path) -> None:
        """Write TRIDENT's coordinate layout; resolutions as magnifications, 10 / mpp, which may be fractions and so stay exact."""
        with hdf5_file(path) as file:
            self.describe(file.create_dataset("coords", data=self.xy), path.parent.name)
            file.create_dataset("tissue_fraction", data=self.tissue)

    def describe(self, coords: h5py.Dataset, folder: str) -> None:
        """Put TRIDENT's attributes, and ours, on a dataset of this grid's corners; `folder` is the one that the file is in."""
        width, height = self.level0_size
        theirs = {"level0_magnification": 10 / self.mpp_level0, "target_magnification": 10 / self.mpp, "savetodir": folder}
        ours = {"level0_width": width, "level0_height": height, "dreslcl_version": __version__}
        coords.attrs.update({name: getattr(self, field) for field, name in ATTRIBUTES.items()} | theirs | ours)

    @classmethod
    def load(cls, path: Path) -> "TileGrid":
        """Read what `save` wrote. Raises StoreError where there is no such file, or not a whole grid."""
        try:
            with h5py.File(path, "r") as file:
                xy, tissue, at = file["coords"][:], file["tissue_fraction"][:], dict(file["coords"].attrs)
            values = {field: np.asarray(at[name]).item() for field, name in ATTRIBUTES.items()}
            return cls(xy=xy, tissue=tissue, level0_size=(int(at["level0_width"]), int(at["level0_height"])), **values)
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: no tile grid of dreslcl ({error}); run `dreslcl tile` again") from error


# One scan: its tissue and its tiles


@dataclass(frozen=True, eq=False)
class Tissue:
    """Where tissue is on a scan: the thumbnail, the mask of its pixels, and rings of (x, y) level-0 pixels as `mask_polygons` gives."""

    thumbnail: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"]
    polygons: list[list[np.ndarray]]


def find_tissue(slide: Slide, config: TileConfig, annotation: Path | None = None) -> Tissue:
    """The tissue of an open scan: as we find it, or as an annotation (GeoJSON) draws it.

    Raises SlideError: the scan or the annotation cannot be read, or the scan says no resolution, or one too coarse for the tiles.
    """
    slide.extent(config.size, config.mpp)  # raises
    mpp = max(min(MASK_MPP, config.size * config.mpp / 8), slide.mpp, max(slide.size) * slide.mpp / 8192)
    thumbnail = slide.thumbnail(mpp)
    if annotation is not None:
        polygons = read_geojson(annotation)
        return Tissue(thumbnail, draw_polygons(polygons, thumbnail.shape[:2], slide.size), polygons)
    mask = np.zeros(thumbnail.shape[:2], bool)
    for left, top, right, bottom in np.rint(np.array(slide.regions) * slide.mpp / mpp).astype(int).tolist():  # each on its own glass
        left = min(left, mask.shape[1] - 1)
        box = np.s_[top : max(bottom, top + 1), left : max(right, left + 1)]
        mask[box] = tissue_mask(thumbnail[box], mpp, threshold=config.threshold, drop_pen=config.drop_pen)
    return Tissue(thumbnail, mask, mask_polygons(mask, slide.size))


def find_tiles(slide: Slide, config: TileConfig = TileConfig(), tissue: Tissue | None = None, coords: Path | None = None) -> TileGrid:  # noqa: B008
    """The tissue tiles of an open scan; nothing is written.

    `tissue` says where tissue is (none: as `find_tissue` says), `coords` is a file of tiles that TRIDENT or CLAM wrote, in place of
    our grid. Raises SlideError as `find_tissue` does, or if `coords` cannot be read.
    """
    mask, size, mpp, overlap = (tissue or find_tissue(slide, config)).mask, config.size, config.mpp, config.overlap
    if coords is not None:
        xy, extent, size = read_coords(coords, slide)
        step, mpp, overlap = extent, extent * slide.mpp / size, 0
    else:
        extent = slide.extent(size, mpp)
        step = max(1, round(extent * (size - overlap) / size))
        xy = grid_corners(slide.size, extent, step)
    share = box_fractions(mask, xy, extent, slide.size)
    whole = [((xy >= box[:2]) & (xy + extent <= box[2:])).all(axis=1) for box in slide.regions]  # no tile shows two regions
    rows = np.flatnonzero((share >= config.min_tissue) & (share > 0) & np.any(whole, axis=0) if coords is None else np.ones(len(xy), bool))
    if config.min_sharpness:
        chunks = (slide.read_tiles(xy[rows[start : start + CHUNK]], size, mpp) for start in range(0, len(rows), CHUNK))
        rows = rows[np.concatenate([np.zeros(0, bool), *(sharpness(tiles) >= config.min_sharpness for tiles in chunks)])]
    if 0 < config.max_tiles < len(rows):
        rows = rows[thin_out(xy[rows], step, config.max_tiles)]
    name = slide_id(slide.path, slide.path)
    about = {"mpp_level0": slide.mpp, "mpp_source": slide.mpp_source, "level0_size": slide.size, "settings": json.dumps(asdict(config))}
    return TileGrid(name, xy[rows], share[rows], extent, size, mpp, overlap=overlap, **about)


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


def read_coords(path: Path, slide: Slide) -> tuple[Int64[np.ndarray, "m 2"], int, int]:
    """Coordinates that TRIDENT or CLAM wrote: corners and tile edge in level-0 pixels, and tile edge in pixels. Raises SlideError."""
    try:
        with h5py.File(path, "r") as file:
            xy, at = np.asarray(file["coords"], np.int64).reshape(-1, 2), dict(file["coords"].attrs)
        size = int(at["patch_size"])
        extent = int(at["patch_size_level0"]) if "patch_size_level0" in at else round(size * float(np.ravel(at["downsample"])[0]))
    except (OSError, KeyError, ValueError, TypeError) as error:
        why = error if path.exists() else "not there"
        raise SlideError(f"{path}: no coordinates as TRIDENT or CLAM write them for a scan ({why})") from error
    if len(xy) and (xy.min() < 0 or (xy.max(axis=0) >= slide.size).any()):
        raise SlideError(f"{path}: holds a tile at {tuple(xy.max(axis=0).tolist())}, but the scan has {slide.size[0]} x {slide.size[1]} px")
    return xy, extent, size


# The pixels of tiles: of the scan, or of its pack, a BigTIFF of the grid's tiles alone, one below the other, at their own resolution


class TilePixels:
    """The pixels of a grid's tiles: read from its pack, if there is one of this very grid in WORK, else from the scan.

    Raises SlideError if that cannot be opened.
    """

    def __init__(self, work: Path, scan: Path, grid: TileGrid):
        self.grid, path = grid, pack_path(work, grid.slide_id)
        if path.exists() and packed_fingerprint(path) == grid.fingerprint:
            self.slide, self.xy = Slide.open(path, mpp=grid.mpp), np.arange(len(grid))[:, None] * np.array([0, _pitch(grid)])
        else:
            self.slide, self.xy = grid.open_scan(scan), grid.xy
            if path.exists():
                log.warning("%s was written for another grid; reading the scan (run `dreslcl tile --pack` again)", path)

    def read(self, rows: Integer[np.ndarray, "n"], out: UInt8[np.ndarray, "n H W 3"] | None = None) -> UInt8[np.ndarray, "n H W 3"]:
        """Pixels of the tiles in those rows of the grid. Raises SlideError as `Slide.read_tiles` does."""
        return self.slide.read_tiles(self.xy[rows], self.grid.size, self.grid.mpp, out=out)


def grid_path(work: Path, slide_id: str) -> Path:
    """Where the grid of a slide is kept."""
    return Path(work) / "tiles" / f"{slide_id}.h5"


def pack_path(work: Path, slide_id: str) -> Path:
    """Where the pack of a slide is kept."""
    return Path(work) / "packs" / f"{slide_id}.tiff"


def packed_fingerprint(path: Path) -> str:
    """The fingerprint of the grid that a pack was written for; empty where there is no whole pack."""
    with suppress(Exception), TiffFile(path) as tif:  # a broken header makes tifffile raise anything
        return str(json.loads(tif.pages.first.description)["fingerprint"])
    return ""


def _pitch(grid: TileGrid) -> int:
    return -(-grid.size // 16) * 16  # TIFF's tiles are multiples of 16 px


def write_pack(slide: Slide, grid: TileGrid, path: Path) -> None:
    """Write a grid's tiles as JPEG; a grid without tiles gets no pack. Raises SlideError (reading) and DiskError (writing).

    From the pack of a scan of 0.25 µm/px without a level of 0.5, tiles of 0.5 µm/px are read 2.7 times as fast, in any order.
    """
    if not len(grid):
        return path.unlink(missing_ok=True)
    pitch = _pitch(grid)

    def tiles() -> Iterator[bytes]:
        padded = np.full((pitch, pitch, 3), 255, np.uint8)
        for start in range(0, len(grid), CHUNK):
            for tile in slide.read_tiles(grid.xy[start : start + CHUNK], grid.size, grid.mpp):
                padded[: grid.size, : grid.size] = tile
                yield simplejpeg.encode_jpeg(padded, QUALITY, colorsubsampling="444")

    says = json.dumps({"dreslcl_pack": 2, "slide_id": grid.slide_id, "mpp": grid.mpp, "fingerprint": grid.fingerprint})
    with atomic(path) as part, TiffWriter(part, bigtiff=True) as writer:
        writer.write(tiles(), shape=(len(grid) * pitch, pitch, 3), dtype=np.uint8, tile=(pitch, pitch), description=says, metadata=None,
                     photometric="ycbcr", compression="jpeg", subsampling=(1, 1))  # fmt: skip


# A folder of scans


@dataclass(frozen=True)
class Given:
    """Files about the scans that take the place of what the scans say or we find."""

    overrides: Path | None = None  # table slide_id and any of OVERRIDES; empty: as for all slides
    tissue_geojson: Path | None = None  # folder of QuPath annotations <slide_id>.geojson, in place of our mask
    coords: Path | None = None  # folder of coordinates that TRIDENT or CLAM wrote, in place of our grid


@dataclass(frozen=True)
class _Job:
    """One slide to tile: what of, how, and the fingerprint of all that."""

    slide_id: str
    path: Path
    config: TileConfig
    mpp: float | None
    annotation: Path | None
    coords: Path | None
    fingerprint: str


def tile_slides(
    source: Path,
    out: Path,
    config: TileConfig = TileConfig(),  # noqa: B008
    *,
    given: Given = Given(),
    workers: int = 0,
    shard: tuple[int, int] | None = None,
    write: Literal["nothing", "grids", "packs"] = "grids",
    check: Literal["", "sample", "full"] = "",
) -> list[dict[str, Any]]:
    """Find the tissue tiles of a scan, or of every scan in a folder, and write grids, polygons, overlays and slides.csv.

    Does only what is missing or was made from other parameters or another version of the scan. A scan that fails gets a row
    with status "error" and the reason, and is tried again by the next run.

    Args:
        given: files about the scans.
        workers: slides at a time; 0: one per CPU, at most 8.
        shard: (i, n) does every n-th slide from the i-th, 0 <= i < n; none: as torchrun's RANK and WORLD_SIZE say.
        write: "nothing" is a dry run: rows as they would be; "packs" also writes packs.
        check: decode a sample of each scan's stored tiles, or all, of finished slides too: a scan with a damaged one fails.

    Returns the rows of this run's slides (of its shard), those that were already there included.

    Raises DreslclError: nothing to do, bad tables, the output folder is in use by another run, or cannot be written.
    """
    source, out = Path(os.path.abspath(source)), Path(out)  # noqa: PTH100  (links are kept: ids follow the names the user sees)
    index, count = shard or rank_and_world()
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: shards of {count} are numbered from 0 to {count - 1}")
    scans, unusable = _find_scans(source, out)
    every_job = _plan(scans, config, given)
    jobs, refused = every_job[index::count], unusable if index == 0 else []
    for row in refused:
        log.warning("%s (%s)", row["error"], row["path"])
    if write == "nothing":
        return refused + _run(jobs, workers, lambda job: _tile(job, check))
    with hold(out, shared=count > 1), hold(out, f".lock-{index}-of-{count}"):
        made = _read_rows(out)
        finished = (job for job in jobs if not check and job.slide_id in made)
        done = {job.slide_id for job in finished if _is_done(job, *made[job.slide_id], out, write == "packs")}
        try:
            rows = _run([job for job in jobs if job.slide_id not in done], workers, lambda job: _tile(job, check, out, write == "packs"))
        finally:  # also when it is stopped
            _gather(out, every_job, unusable)
        _contact_sheet(out)
    return sorted(refused + rows + [made[name][0] for name in done], key=lambda row: row["slide_id"])


def _find_scans(source: Path, out: Path) -> tuple[list[tuple[str, list[Path]]], list[dict[str, Any]]]:
    """Ids and files of the scans in a folder, by id; and rows for those whose name cannot be an id of their own."""
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder")
    if source.is_dir() and out.exists() and source.samefile(out):
        raise ConfigError(f"{out}: results cannot go among the scans; choose another folder for --out")
    found = [files for files in _group_files(source.parent.iterdir()) if source in files] if source.is_file() else []
    seen = {os.path.realpath(source), os.path.realpath(out)}
    for folder, subfolders, names in os.walk(source, followlinks=True):
        subfolders[:] = [s for s in sorted(subfolders) if not s.startswith(".") and os.path.realpath(Path(folder, s)) not in seen]
        seen.update(os.path.realpath(Path(folder, s)) for s in subfolders)  # no folder twice, nor the output folder
        found += _group_files(Path(folder, n) for n in names if not n.startswith(".") and Path(n).suffix.lower() in SCANS | UNREAD)
    if not found:
        raise ConfigError(f"{source}: no scan in there; scans end in {' '.join(sorted(SCANS))}")
    root, by_id = source if source.is_dir() else source.parent, defaultdict(list)
    for files in sorted(found):
        by_id[same_name(_id(files, root))].append(files)
    scans, unusable = [], []
    for name, files, *more in sorted((_id(same[0], root), *same) for same in by_id.values()):
        try:
            check_id(name, str(files[0]))
            if more:
                raise TableError(f"{' and '.join(f[0].name for f in (files, *more))} would share this id; rename or move one")
            if len(os.fsencode(name)) > 200:
                raise TableError("the path is too long to name files after; shorten it")
            scans.append((name, files))
        except TableError as error:
            unusable.append(_row(name, files[0]) | {"error": str(error)})
    return scans, unusable


def _group_files(paths: Iterable[Path]) -> list[list[Path]]:
    """The files of each scan, the one to open it by first, of the files of one folder.

    One scan are: a .mrxs and the folder of its name; a .vms or .vmu and the files that it names; the .dcm files of one DICOM series.
    """
    scans, series = [], defaultdict(list)
    for path in sorted(paths):
        suffix, others = path.suffix.lower(), []
        if suffix == ".mrxs":
            others = sorted(p for p in path.with_suffix("").rglob("*") if p.is_file())
        elif suffix in (".vms", ".vmu"):
            named = {path.parent / text.strip() for text in re.findall(r"=\s*([^\r\n/]{1,80})", _head(path).decode(errors="replace"))}
            others = sorted(p for p in named if p.is_file())
        elif suffix == ".dcm" and (found := SERIES.search(_head(path))):
            series[found[1]].append(path)
            continue
        scans.append([path, *others])
    scans += series.values()
    parts = {path for files in scans for path in files[1:]}
    return [files for files in scans if files[0] not in parts]


def _head(path: Path) -> bytes:
    """The first 64 kB of a file; nothing of one that cannot be read, which opening the scan tells."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(1 << 16)
    return b""


def _id(files: list[Path], root: Path) -> str:
    """The id of a scan: after its folder for a DICOM series of several files, else after the file to open."""
    if len(files) == 1 or files[0].suffix.lower() != ".dcm":
        return slide_id(files[0], root)
    folder = files[0].parent  # not by `slide_id`: folders are named 1.2.840 and have no suffix
    return "__".join(folder.relative_to(root).parts) or folder.name


def _row(name: str, path: Path) -> dict[str, Any]:
    """The row of a slide of which nothing is known yet."""
    return dict.fromkeys(COLUMNS, "") | {"slide_id": name, "path": str(path), "status": "error", "tiles": 0}


def _plan(scans: list[tuple[str, list[Path]]], config: TileConfig, given: Given) -> list[_Job]:
    values = _read_overrides(given.overrides) if given.overrides else {}
    if lost := values.keys() - {same_name(text) for name, files in scans for text in (name, files[0].name)}:
        log.warning("%d rows of %s name no scan here, the first is %r", len(lost), given.overrides, min(lost))
    areas, places = _named(given.tissue_geojson, "*.geojson"), _named(given.coords, "*.h5", "patches/*.h5")
    jobs = []
    for name, files in scans:
        keys = same_name(name), same_name(files[0].name)
        own = values.get(keys[1], {}) | values.get(keys[0], {})
        mpp = own.pop("mpp", None)
        annotation = given.tissue_geojson and (areas.get(keys[0]) or areas.get(keys[1]) or given.tissue_geojson / f"{name}.geojson")
        coords = given.coords and (places.get(keys[0]) or places.get(keys[1]) or given.coords / f"{name}.h5")
        settings = replace(config, **own)
        stamps = [file_stamp(p) if p and p.exists() else None for p in (*files, annotation, coords)]
        made_of = fingerprint(__version__, asdict(settings), mpp, bool(annotation), bool(coords), stamps)
        jobs.append(_Job(name, files[0], settings, mpp, annotation, coords, made_of))
    return jobs


def _read_overrides(table: Path) -> dict[str, dict[str, Any]]:
    """What a table sets for each slide, by `same_name`."""
    values: dict[str, dict[str, Any]] = defaultdict(dict)
    rows = read_table(table, ["slide_id"])
    for column in (column for column in (rows[0] if rows else ()) if column != "slide_id"):
        if column not in OVERRIDES:
            raise TableError(f"{table}: unknown column {column!r}; there can be slide_id, {', '.join(OVERRIDES)}")
        for name, text in one_value(table, rows, "slide_id", column).items():
            try:
                values[name][column] = OVERRIDES[column](text)
            except ValueError as error:
                raise TableError(f"{table}: {column} of {name}: {error}") from error
    return values


def _named(folder: Path | None, *patterns: str) -> dict[str, Path]:
    """The files of a folder by `same_name`, without TRIDENT's `_patches`; those of the first pattern win."""
    paths = [path for pattern in reversed(patterns) for path in sorted(folder.glob(pattern))] if folder else []
    return {same_name(path.stem.removesuffix("_patches")): path for path in paths}


def _run(jobs: list[_Job], workers: int, work: Callable[[_Job], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the jobs. On threads, since nearly all work releases the interpreter's lock: processes were no faster."""
    rows = []
    for row in track(prefetch(work, jobs, workers or min(8, cores()), len(jobs)), "tiling", "slides", len(jobs)):
        for text in filter(None, (row["error"] if row["status"] == "error" else "", row["warning"])):
            log.warning("%s (%s)", text, row["path"])
        log.debug("%s: %s, %d tiles", row["slide_id"], row["status"], row["tiles"])
        rows.append(row)
    return rows


def _tile(job: _Job, check: str, out: Path | None = None, pack: bool = False) -> dict[str, Any]:
    """Tile one slide and, with `out`, write its files; whatever is wrong with the scan becomes its row. Only a fault of `out` is raised."""
    start, row = time.perf_counter(), _row(job.slide_id, job.path)
    try:
        with Slide.open(job.path, job.mpp, job.config.default_mpp) as slide:
            row |= {"mpp": slide.mpp or "", "mpp_source": slide.mpp_source, "vendor": slide.vendor, "reader": slide.reader}
            row["warning"] = "; ".join(slide.warnings)
            row |= {"width": slide.size[0], "height": slide.size[1], "levels": len(slide.levels), "regions": len(slide.regions)}
            if check:
                slide.check(SAMPLE if check == "sample" else 0)
            tissue = find_tissue(slide, job.config, job.annotation)
            grid = find_tiles(slide, job.config, tissue, job.coords)
            row["tissue_mm2"] = round(float(tissue.mask.mean()) * slide.size[0] * slide.size[1] * slide.mpp**2 / 1e6, 4)
            small = f"smaller than one tile of {grid.extent_px} px ({job.config.size} px at {grid.mpp:g} µm/px, the scan has {slide.mpp:g})"
            why = small if grid.extent_px > min(slide.size) else "no tissue found"
            row |= {"tiles": len(grid), "status": "ok" if len(grid) else "empty", "error": "" if len(grid) else why}
            if out:
                grid = replace(grid, slide_id=job.slide_id, fingerprint=job.fingerprint)
                grid.save(grid_path(out, job.slide_id))
                write_json(out / "tissue" / f"{job.slide_id}.geojson", polygons_to_geojson(tissue.polygons))
                overlay = draw_overlay(tissue.thumbnail, tissue.polygons, grid.xy, grid.extent_px, slide.size)
                write_bytes(out / "overlays" / f"{job.slide_id}.jpg", encoded(overlay))
                if pack:
                    write_pack(slide, grid, pack_path(out, job.slide_id))
    except DiskError:  # not the scan's fault
        raise
    except Exception as error:
        log.debug("%s", job.path, exc_info=True)
        known = isinstance(error, (DreslclError, OSError, MemoryError))
        row |= {"status": "error", "tiles": 0, "error": ("" if known else f"unexpected {type(error).__name__}: ") + reason(error)}
    row["seconds"] = round(time.perf_counter() - start, 2)
    if out:
        write_json(out / "rows" / f"{job.slide_id}.json", {"fingerprint": job.fingerprint, "row": row})
    return row


# The rows of finished slides


def read_slides(work: Path) -> list[dict[str, str]]:
    """The rows of WORK/slides.csv, in the order of their ids. Raises TableError for none, or for an id that cannot name a file."""
    path = Path(work) / "slides.csv"
    if not path.is_file():
        raise TableError(f"{path}: not there; run `dreslcl tile SLIDES --out {work}` first")
    rows = read_table(path, COLUMNS)
    rows = [{key: value[1:] if value[:1] == "'" and value[1:2] in tuple("=+-@") else value for key, value in row.items()} for row in rows]
    for row in rows:
        if row["status"] != "error":  # the failed ones may be there for their very name
            check_id(row["slide_id"], str(path))
    return rows


def _read_rows(out: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """What `_tile` left of each slide: its row and fingerprint; a damaged file counts as not there."""
    rows = {}
    for path in sorted((out / "rows").glob("*.json")):
        with suppress(ValueError, KeyError, TypeError, OSError):
            made = json.loads(path.read_bytes())
            rows[path.stem] = {column: made["row"][column] for column in COLUMNS}, made["fingerprint"]
    return rows


def _is_done(job: _Job, row: dict[str, Any], made_of: str, out: Path, pack: bool) -> bool:
    if made_of != job.fingerprint or row["status"] == "error" or row["path"] != str(job.path):
        return False
    packed = not (pack and row["tiles"]) or packed_fingerprint(pack_path(out, job.slide_id)) == job.fingerprint
    return packed and grid_path(out, job.slide_id).exists()


def _gather(out: Path, jobs: list[_Job], unusable: list[dict[str, Any]]) -> None:
    """Put slides.csv together from the rows of all runs; not those that this one will replace, nor failures of scans that are gone."""
    current = {job.slide_id: job.fingerprint for job in jobs}
    with hold(out, "rows/.lock", wait=True):
        rows = {row["slide_id"]: row for row in unusable}
        for name, (row, made_of) in _read_rows(out).items():
            there = row["status"] != "error" or name in current or Path(row["path"]).exists()
            if name not in rows and there and made_of == current.get(name, made_of):
                rows[name] = row
        write_table(out / "slides.csv", COLUMNS, [[rows[name][column] for column in COLUMNS] for name in sorted(rows)])


def _contact_sheet(out: Path) -> None:
    """All overlays on one page, small, each under its id: what to look at first."""
    with hold(out, "rows/.lock", wait=True):
        paths = sorted((out / "overlays").glob("*.jpg"))
        columns = max(1, math.ceil(math.sqrt(len(paths))))
        cell = max(48, min(256, 4096 // columns))
        sheet = Image.new("RGB", (columns * cell, -(-len(paths) // columns) * (cell + 12)), "white")
        draw = ImageDraw.Draw(sheet)
        for n, path in enumerate(paths):
            x, y = n % columns * cell, n // columns * (cell + 12)
            with suppress(OSError), Image.open(path) as overlay:  # a damaged one stays blank
                overlay.thumbnail((cell - 4, cell - 4))
                sheet.paste(overlay, (x, y + 12))
            draw.text((x, y), path.stem[-(cell // 6) :], fill="black")
        if paths:
            write_bytes(out / "contact_sheet.jpg", encoded(sheet))
