"""Slide: open a scan, know its resolution, read tiles of any µm/px fast.

Several scanned regions of one file (SCN, OME-TIFF) lie side by side in one coordinate system, the largest at the left; its places
are those of the region alone.

tifffile parses the file once, in the opening thread; pixels are then read on our own descriptor (segments.py), so one slide serves many
threads and forked processes. What tifffile does not read, or would not stitch (Trestle), openslide reads, if it is installed: which of
the two reads a file depends on the file alone, so a grid fits its scan on every machine. Only the pyramid is kept: label and macro images
hold patient data and are never exposed.
"""

import html
import logging
import math
import re
from collections import deque
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from tifffile import TiffFile

from .common import SlideError
from .segments import DAMAGED, JPEG2000, DecodeCache, Segments, from_image, from_openslide, from_page, shrink

Real = float | int
Parts = list[tuple[np.ndarray, Segments]]  # of a level: where the segments of each region lie, level pixels
log = logging.getLogger(__name__)

PLAUSIBLE_MPP = 0.01, 40.0  # µm per pixel; what a file states outside of it (72 dpi is 353) is not believed
MICROSCOPE_MPP = 0.05, 20.0  # the same, outside of which it is warned of: no light microscope has it, so a unit is wrong
SPREAD = 1.05  # a scan coarser than asked for by up to this is enlarged: scanners differ so much around one magnification
CHUNK_BYTES = 64 << 20  # most bytes of level pixels held at once while tiles are resampled
BLOCK = 2048  # edge of the pieces that a thumbnail is read in, level pixels
REGION_STEP = 4096  # regions start at multiples of this, level-0 pixels, so at whole pixels of each level

CONVERT = "convert it to a tiled pyramidal TIFF (for example: bfconvert, or vips tiffsave --tile --pyramid)"
OVERVIEW = re.compile(r"^(label|macro|thumbnail|overview|probability)", re.IGNORECASE | re.MULTILINE)
OPENSLIDE: dict[str | tuple[int, bytes], str] = {  # what openslide reads: suffix, or bytes at a place -> what it is
    ".mrxs": "a MIRAX scan", ".vms": "a Hamamatsu VMS scan", ".vmu": "a Hamamatsu VMU scan", ".dcm": "a DICOM file",
    ".svslide": "a Sakura scan", ".czi": "a Zeiss CZI file",
    (128, b"DICM"): "a DICOM file", (0, b"ZISRAWFILE"): "a Zeiss CZI file", (0, b"SQLite format 3"): "an SQLite file (Sakura?)",
}  # fmt: skip
FOREIGN: dict[str | tuple[int, bytes], str] = {  # what nothing here reads
    ".vsi": "an Olympus VSI scan",
    (0, b"PK\x03\x04"): "a ZIP archive", (0, b"\x1f\x8b"): "a gzip archive", (0, b"%PDF"): "a PDF file", (0, b"\x89HDF"): "an HDF5 file",
    (0, b"\x00\x00\x00\x0cjP"): "a JPEG 2000 image", (0, b"BM"): "a BMP image", (0, b"GIF8"): "a GIF image",
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """One stored resolution."""

    index: int
    size: tuple[int, int]  # (w, h), pixels of this level
    downsample: float  # level-0 pixels per pixel of this level


class Slide(AbstractContextManager["Slide"]):
    """A scan, open for reading. Places are level-0 pixels (x, y), resolutions µm per pixel, pixels 8-bit RGB, white outside the scan.

    Reads may run in many threads at once. A pickled slide opens its file again; a forked one reads on.
    """

    def __init__(self, path: Path, regions: list[list[Segments]], said: "Said"):
        self.path, self.vendor, self.reader, self.mpp_source = path, said.vendor, said.reader, said.source
        self._file = said.file or FileIO(path)
        self.levels, self.regions, self._parts = _lay_out(regions)
        self._halves = [_halved(parts) for parts in self._parts]
        self.size = self.levels[0].size
        self.mpp_xy = said.mpp or None
        self.mpp = sum(said.mpp) / 2 if said.mpp else None
        self.warnings = tuple(said.warnings)  # what a user should know of the file, each in a few words
        self._caches: deque[tuple[Segments, DecodeCache]] = deque(maxlen=2)  # (of what, what its last read left); a read takes one out

    @classmethod
    def open(cls, path: Path | str, mpp: Real | None = None, default_mpp: Real | None = None) -> "Slide":
        """Open an SVS, NDPI, SCN, Philips, Ventana, QPTIFF, OME or plain TIFF, or a PNG or JPEG image; with openslide what it reads.

        Of a DICOM series any file that lies with the others opens it all, of a MIRAX scan the .mrxs beside its folder.
        `mpp`, the resolution of level 0 in µm per pixel, overrides what the file says; `default_mpp` is for files that say none.
        Raises SlideError: no such file, another format, damaged, not 8-bit RGB, or openslide is needed and not installed.
        """
        path = Path(path)
        low, high = PLAUSIBLE_MPP
        for asked in (value for value in (mpp, default_mpp) if value is not None and not low <= value <= high):
            raise SlideError(f"{path.name}: {asked} µm/px is no resolution of a scan; give one from {low} to {high:g}")
        try:
            with path.open("rb") as file:
                head, file_bytes = file.read(512), path.stat().st_size
        except OSError as error:
            raise SlideError(f"{path.name}: cannot be opened ({error.strerror})") from error
        known = path.suffix.lower() not in OPENSLIDE.keys() | FOREIGN.keys()
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and known:
            regions, said = _open_tiff(path)
        elif (head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n") and known:
            regions, said = [[from_image(path.read_bytes(), path.name)]], Said("image", reader="image")
        elif head and (what := _named(path, head, OPENSLIDE)):
            regions, said = _open_with_openslide(path, what)
        else:
            raise SlideError(f"{path.name}: {_what(path, head)}")
        for level in (level for stored in regions for level in stored):
            level.check_inside(file_bytes)
        if mpp or (default_mpp and not said.mpp):
            said.mpp, said.source = (mpp or default_mpp,) * 2, "given" if mpp else "default"
        elif said.mpp and not MICROSCOPE_MPP[0] <= min(said.mpp) <= max(said.mpp) <= MICROSCOPE_MPP[1]:
            said.warnings += [f"no light microscope has {min(said.mpp):g} µm/px; give the right one with --overrides"]
        if said.mpp and max(said.mpp) > 1.01 * min(said.mpp):
            said.warnings += ["{:g} µm/px across and {:g} down; tiles take the mean".format(*said.mpp)]
        return cls(path, regions, said)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path, *(self.mpp if self.mpp_source == source else None for source in ("given", "default")))

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Slide({self.path.name!r}, {self.size[0]} x {self.size[1]} px, {self.mpp} µm/px, {len(self.levels)} levels, {self.vendor})"

    def close(self) -> None:
        """Close the file; reading raises SlideError from then on."""
        self._file.close()
        self._caches.clear()

    def release(self) -> None:
        """Let go of decoded pieces that reading on from the last tiles would use."""
        self._caches.clear()

    def extent(self, size: int, mpp: Real) -> int:
        """Edge of a tile of `size` pixels at `mpp`, in level-0 pixels.

        A stored level that differs from `mpp` by less than one pixel over the tile, and 2 %, counts as equal: it is not resampled.
        """
        level, step = self._choose(size, mpp)
        return round(size * step * level.downsample)

    def read_tiles(
        self, xy: Integer[np.ndarray, "N 2"], size: int, mpp: Real, *, threads: int = 1,
        out: UInt8[np.ndarray, "N size size 3"] | None = None,
    ) -> UInt8[np.ndarray, "N size size 3"]:  # fmt: skip
        """Tiles of `size` pixels at `mpp`, in the order of their top-left corners `xy` (level-0 pixels).

        Each stored segment is decoded once over all tiles, so many tiles in one call, or calls in raster order, are faster than single
        ones. The coarsest level that is not coarser than `mpp` is read and resampled by area (Pillow's box filter, or means of 2 x 2).
        Raises SlideError: no resolution known, `mpp` finer than the scan, the slide is closed, or stored data is damaged.
        """
        level, step = self._choose(size, mpp)
        edge = size if step == 1 else round(size * step * level.downsample) / level.downsample
        out = np.empty((len(xy), size, size, 3), np.uint8) if out is None else out
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            self._read(level, xy / level.downsample, edge, out, pool)
        return out

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        """`size` (w, h) pixels of a stored level, right and below of `location` (x, y; level-0 pixels): openslide's arguments.

        Raises SlideError: the slide is closed, or stored data is damaged.
        """
        out = np.empty((1, size[1], size[0], 3), np.uint8)
        self._fill(self._parts[level], np.rint(np.array([location]) / self.levels[level].downsample).astype(np.int64), out, None)
        return out[0]

    def thumbnail(self, mpp: Real) -> UInt8[np.ndarray, "h w 3"]:
        """The whole scan at `mpp` (or at its own resolution where that is coarser). Raises SlideError as `read_tiles` does."""
        scale = max(mpp / self._known_mpp(), 1.0)
        w, h = (max(1, round(side / scale)) for side in self.size)
        level, step = self._choose(max(w, h), scale * self._known_mpp())
        if step == 1:
            return self.read_region((0, 0), level.index, (w, h))
        block = max(1, min(int(BLOCK / step), w, h))
        out, across = np.empty((h, w, 3), np.uint8), np.arange(0, w, block)
        row = np.empty((len(across), block, block, 3), np.uint8)
        for top in range(0, h, block):
            self._read(level, np.stack([across, np.full(len(across), top)], axis=1) * step, block * step, row, None)
            out[top : top + block] = np.concatenate(row, axis=1)[: h - top, :w]
        return out

    def check(self, most: int = 0) -> None:
        """Decode `most` stored tiles of each level, drawn evenly over it (0: all). Raises SlideError for one that is damaged."""
        for stored in (stored for parts in self._parts for _, stored in parts):
            count, buffer = stored.grid[0] * stored.grid[1], DecodeCache().buffer(stored.edge)
            for index in np.unique(np.linspace(0, count - 1, min(most or count, count)).round().astype(int)).tolist():
                stored.load(self._file.fileno(), index, buffer)

    def _known_mpp(self) -> float:
        if self.mpp is None or max(self.mpp_xy) > SPREAD * min(self.mpp_xy):
            unequal = self.mpp_xy and "says {:g} µm/px across and {:g} down; give one with --overrides".format(*self.mpp_xy)
            unknown = "does not say its resolution; give it with --overrides or --default-mpp"
            raise SlideError(f"{self.path.name}: the file {unequal or unknown}")
        return self.mpp

    def _choose(self, size: int, mpp: Real) -> tuple[Level, float]:
        """The level to read for `size` pixels at `mpp`, and its pixels per output pixel (exactly 1: no resampling)."""
        scale = mpp / self._known_mpp()  # level-0 pixels per output pixel
        for level in reversed(self.levels):
            step = scale / level.downsample
            if abs(step - 1) < min(0.02, 1 / size):
                return level, 1.0
            if step >= 1 or (level.index == 0 and step * SPREAD >= 1):
                return level, step
        todo = f"use --mpp {self.mpp:.4g} or larger" if self.mpp <= MICROSCOPE_MPP[1] else "give the right one with --overrides"
        raise SlideError(f"{self.path.name}: asked for {mpp:g} µm/px but the scan has {self.mpp:g}; {todo}")

    def _read(self, level: Level, corners: Float[np.ndarray, "N 2"], edge: Real, out: np.ndarray, pool: Executor | None) -> None:
        """Fill square `out` (N, h, w, 3) from squares of `edge` level pixels at `corners` (level pixels), resampling where sizes differ."""
        size = out.shape[1]
        if edge == size:
            return self._fill(self._parts[level.index], np.rint(corners).astype(np.int64), out, pool)
        if edge == 2 * size and self._halves[level.index] and not (corners % 2).any():  # the same pixels as below, faster
            return self._fill(self._halves[level.index], corners.astype(np.int64) // 2, out, pool)
        low = np.floor(corners + 1e-6).astype(np.int64)
        inset, kernel = np.maximum(corners - low, 0.0), Image.Resampling.BOX if edge > size else Image.Resampling.BILINEAR
        reach = math.ceil(edge + float(inset.max(initial=0.0)) - 1e-6)
        order = np.lexsort((low[:, 0], low[:, 1]))  # raster order lets one chunk leave segments for the next
        chunk = max(1, CHUNK_BYTES // (3 * reach * reach))
        windows = np.empty((min(chunk, len(order)), reach, reach, 3), np.uint8)

        def resample(item: tuple[int, np.ndarray]) -> None:
            tile, window = item
            x, y = inset[tile]
            if size < edge <= 2 * size:
                out[tile] = shrink(window, (x, y), edge, size)
            else:
                area = (x, y, min(x + edge, reach), min(y + edge, reach))
                out[tile] = Image.fromarray(window).resize((size, size), kernel, box=area)

        for start in range(0, len(order), chunk):
            tiles = order[start : start + chunk]
            self._fill(self._parts[level.index], low[tiles], windows[: len(tiles)], pool)
            for _ in (pool.map if pool else map)(resample, zip(tiles.tolist(), windows)):
                pass

    def _fill(self, parts: Parts, corners: np.ndarray, out: np.ndarray, pool: Executor | None) -> None:
        """Copy stored pixels of a level, from `corners` (level pixels), with what an earlier read left; white where nothing is stored."""
        if self._file.closed:
            raise SlideError(f"{self.path.name}: the slide is closed; open it again")
        ends = corners + np.array(out.shape[2:0:-1])
        whole = [((corners >= at) & (ends <= at + np.array(stored.size))).all(axis=1) for at, stored in parts]
        out[~np.any(whole, axis=0)] = 255
        for at, stored in parts:
            rows = np.flatnonzero(((ends > at) & (corners < at + np.array(stored.size))).all(axis=1))
            if not len(rows):
                continue
            windows = out if len(rows) == len(out) else out[rows]  # a copy
            try:
                held, cache = self._caches.popleft()
            except IndexError:  # none yet, or other threads have them
                held, cache = None, None
            cache = cache if held is stored else DecodeCache()
            stored.read(self._file.fileno(), corners[rows] - at, windows, cache, pool)
            self._caches.append((stored, cache))
            if windows is not out:
                out[rows] = windows


def _lay_out(regions: list[list[Segments]]) -> tuple[tuple[Level, ...], list[tuple[int, ...]], list[Parts]]:
    """Levels that all regions have; (left, top, right, bottom) of each region, level-0 pixels; per level where each one's segments lie."""
    full, boxes, levels, parts = [stored[0].size for stored in regions], [], [], []
    for w, h in full:
        left = -(-boxes[-1][2] // REGION_STEP) * REGION_STEP if boxes else 0
        boxes.append((left, 0, left + w, h))
    for stored in zip(*regions):
        downsamples = [_downsample(size, s.size) for size, s in zip(full, stored)]
        if max(downsamples) < 1.01 * min(downsamples):
            parts.append([(np.array([round(box[0] / downsamples[0]), 0]), s) for box, s in zip(boxes, stored)])
            w, h = np.max([at + s.size for at, s in parts[-1]], axis=0).tolist()
            levels.append(Level(len(levels), (w, h), downsamples[0]))
    return tuple(levels), boxes, parts


def _halved(parts: Parts) -> Parts:
    """The level at half its resolution; empty where its pixels do not pair."""
    halves = [(at // 2, half) for at, stored in parts if (half := stored.halved()) and not (at % 2).any()]
    return halves if len(halves) == len(parts) else []


def _downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 pixels per level pixel; a whole number where the sizes allow one (levels are cut, not stretched, to whole pixels)."""
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = round(ratio)
    return float(whole) if all(abs(f / whole - s) < 1 for f, s in zip(full, size)) else ratio


def _named(path: Path, head: bytes, table: dict[str | tuple[int, bytes], str]) -> str | None:
    """What a file is by a table of suffixes and first bytes; none where it does not say."""
    magic = (what for sign, what in table.items() if isinstance(sign, tuple) and head[sign[0] :].startswith(sign[1]))
    return table.get(path.suffix.lower()) or next(magic, None)


def _what(path: Path, head: bytes) -> str:
    """What a file is that is not a scan we read, and what to do."""
    if not head:
        return f"an empty file (0 bytes); {DAMAGED}"
    if what := _named(path, head, FOREIGN):
        return f"{what}, which is not read; {CONVERT}"
    if not head.strip(b"\0"):
        return f"starts with zeros, so it is no scan; {DAMAGED}"
    if re.search("[\x00-\x08\ufffd]", head[:-4].decode(errors="replace")):
        return f"not a scan of a known format; {CONVERT}"
    return "a text file, not a scan; give the scan itself"


@dataclass
class Said:
    """What a file says of its scan, and who reads it."""

    vendor: str
    mpp: tuple[Real, ...] = ()  # µm/px (x, y); empty if unknown
    source: str = "none"  # what states it
    warnings: list[str] = field(default_factory=list)
    reader: str = "tifffile"
    file: FileIO | None = None  # the one to read on, where the reader opened it


def _open_with_openslide(path: Path, what: str) -> tuple[list[list[Segments]], Said]:
    """The levels of the one region, and what openslide says."""
    file, levels, properties = from_openslide(path, what)
    mpp = tuple(value for axis in "xy" for value in _number("{}", properties.get(f"openslide.mpp-{axis}", "")))
    believed = len(mpp) == 2 and all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in mpp)
    said = Said(properties["openslide.vendor"], reader="openslide", file=file)
    said.mpp, said.source = (mpp, "openslide.mpp") if believed else ((), "none")
    return [levels], said


def _open_tiff(path: Path) -> tuple[list[list[Segments]], Said]:
    """The levels of each region, and what the file says."""
    try:
        with TiffFile(path) as tif:
            if tif.pages.first.software.startswith("MedScan"):
                return _open_with_openslide(path, "a Trestle scan, whose stored tiles overlap")
            found, left_out = _regions(tif, path.name)
            said, planes = _said(tif, found[0]), len(found[0].pages)
            said.warnings += [f"{len(found)} scanned regions, side by side"] if len(found) > 1 else []
            said.warnings += [f"{planes} focal planes or channels; one is read"] if planes > 1 else []
            said.warnings += [f"left out an image of {s.keyframe.imagewidth} x {s.keyframe.imagelength} px" for s in left_out]
            regions = [_levels(tif, series, path.name, said.warnings) for series in found]
            joints = re.findall(r'Overlap[XY]="(\d+)"', str(found[0].keyframe.tags.valueof(700))) if tif.is_bif else []
            if overlap := max(map(int, joints), default=0):
                said.warnings += [f"stored tiles overlap by up to {overlap} px and are shown side by side: seams show twice"]
            if found[0].keyframe.compression in JPEG2000:
                log.info("%s: JPEG 2000 decodes 9-18 times slower than JPEG", path.name)
    except SlideError:
        raise
    except Exception as error:  # a broken header makes tifffile raise anything
        raise SlideError(f"{path.name}: not a readable TIFF ({type(error).__name__}: {str(error)[:120]}); {DAMAGED}") from error
    return regions, said


def _regions(tif: TiffFile, name: str) -> tuple[list[Any], list[Any]]:
    """The series of the scanned regions, the largest first, and large ones that are left out; never label, macro or overview.

    By their place where the vendor fixes one; of SCN and OME all images of the largest one's kind and resolution; else the largest.
    """
    if not tif.series:
        raise SlideError(f"{name}: a TIFF without images; {DAMAGED}")
    first = tif.series[0]
    if first.kind in ("svs", "bif", "qpi", "philips"):
        images = [first] if first.name == "Baseline" else []
    elif first.kind == "ndpi":
        images = [s for s in tif.series if s.keyframe.tags.valueof(65421, 0) > 0][:1]  # magnification; macro -1, map -2
    else:
        images = [s for s in tif.series if not OVERVIEW.search(s.name) and not OVERVIEW.search(s.keyframe.description)]
    if not images:
        raise SlideError(f"{name}: holds no scan, only label or overview images; {DAMAGED}")

    def area(series: Any) -> int:
        return series.keyframe.imagewidth * series.keyframe.imagelength

    def alike(series: Any) -> bool:
        (key, mpp), (own, own_mpp) = ((s.keyframe, _said(tif, s).mpp) for s in (series, largest))
        same = (key.samplesperpixel, key.bitspersample, len(mpp)) == (own.samplesperpixel, own.bitspersample, len(own_mpp))
        return first.kind in ("scn", "ome") and same and all(1 / SPREAD < a / b < SPREAD for a, b in zip(mpp, own_mpp))

    largest, *others = sorted(images, key=area, reverse=True)
    return [largest, *filter(alike, others)], [s for s in others if 16 * area(s) >= area(largest) and not alike(s)]


def _said(tif: TiffFile, series: Any) -> Said:
    vendor, source, read = next((v for kind, v in VENDORS.items() if getattr(tif, f"is_{kind}")), ("generic", "", None))
    for said, mpp in ((source, read(tif, series) if read else []), ("TIFF resolution", _tiff_resolution(series.keyframe))):
        if len(mpp) == 2 and all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in mpp):
            return Said(vendor, tuple(mpp), said)
    return Said(vendor)


def _levels(tif: TiffFile, series: Any, name: str, warnings: list[str]) -> list[Segments]:
    """Levels from fine to coarse; one of another shape than the scan is left out, with a warning."""
    stored: list[Segments] = []
    for i, level in enumerate([series, *(s for s in series.levels if s is not series)]):
        in_focus = (p for p in level.pages if p is not None and p.keyframe.tags.valueof(65424, 0) == 0)  # Hamamatsu: z offset
        page = next(in_focus, level.pages[0])
        if page.parent.filehandle.path != tif.filehandle.path:
            raise SlideError(f"{name}: part of a set of several files, which is not read; {CONVERT}")
        stored.append(from_page(page, f"{name}: level {i}"))
    (w, h), levels = stored[0].size, []
    for level in sorted(stored, key=lambda s: -s.size[0]):
        stretch = level.size[0] * h / (w * level.size[1])
        if level.size[0] > w or abs(stretch - 1) > 0.02 + 2 / min(level.size):
            warnings.append(f"left out a level of {level.size[0]} x {level.size[1]} px: not the scan's shape")
        elif not levels or level.size[0] < levels[-1].size[0]:
            levels.append(level)
    return levels


# What files say of their resolution: lists [x, y] of µm/px, shorter where something is missing

NUMBER = r"([0-9]*[.,]?[0-9]+(?:[eE][+-]?[0-9]+)?)"  # with a decimal point or comma
UNITS = {  # a unit, however it is written -> µm
    r"(â?[µμ]|î¼|\ufffd|u|\\u00b5|\\u03bc)m?|micro.*": 1.0, r"nm|nano.*": 1e-3, r"mm|milli.*": 1e3, r"cm|centi.*": 1e4,
    r"m|met(er|re)s?": 1e6, r'in|inch(es)?|"': 25400.0,
}  # fmt: skip


def _number(pattern: str, text: str) -> list[float]:
    """The first match of `pattern`, in which {} stands for a number."""
    match = re.search(pattern.format(r"\s*" + NUMBER), text)
    return [float(match[1].replace(",", "."))] if match else []


def _unit(text: str) -> float:
    """µm of a unit; nan for what is no length (pixel)."""
    text = html.unescape(text).strip().lower()
    return next((factor for pattern, factor in UNITS.items() if re.fullmatch(pattern, text)), math.nan)


def _tiff_resolution(page: Any) -> list[float]:
    said = re.search(r"^unit=(.+)$", page.description, re.MULTILINE) if page.description.startswith("ImageJ=") else None
    unit = _unit(said[1]) if said else {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof(296, 2)), math.nan)
    fractions = [page.tags.valueof(code) for code in (282, 283)]
    return [unit * f[1] / f[0] for f in fractions] if all(f and f[0] and f[1] for f in fractions) else []


def _philips(tif: TiffFile, _: Any) -> list[float]:
    spacings = re.findall(r'DICOM_PIXEL_SPACING"[^>]*>([^<]*)<', tif.pages.first.description)  # mm, row then column, one per level
    pairs = [[float(v.replace(",", ".")) * 1000 for v in re.findall(NUMBER, spacing)] for spacing in spacings]
    return min((p for p in pairs if len(p) == 2 and min(p) > 0), default=[])[::-1]


def _ome(tif: TiffFile, series: Any) -> list[float]:
    images = re.split("<Image[ >]", tif.pages.first.description)[1:]  # one per series
    text, mpp = "".join(images[next(n for n, s in enumerate(tif.series) if s is series) :][:1]), []
    for axis in "XY":
        unit = re.search(f"""PhysicalSize{axis}Unit=["'](.*?)["']""", text)
        mpp += [value * _unit(unit[1] if unit else "µm") for value in _number(f"""PhysicalSize{axis}=["']{{}}""", text)]
    return mpp


VENDORS = {  # tifffile's name for a kind of file -> vendor, what states the µm/px, and how it is read from (tif, series)
    "svs": ("aperio", "Aperio MPP", lambda tif, _: 2 * _number(r"\|\s*MPP\s*={}", tif.pages.first.description)),
    "ndpi": ("hamamatsu", "", None),  # the TIFF resolution, as for "scn"
    "scn": ("leica", "", None),
    "philips": ("philips", "Philips pixel spacing", _philips),
    "bif": ("ventana", "Ventana ScanRes", lambda tif, _: 2 * _number('ScanRes="{}', " ".join(str(p.tags.valueof(700)) for p in tif.pages))),
    "qpi": ("akoya", "Akoya PixelSizeMicrons", lambda tif, _: 2 * _number("<PixelSizeMicrons>{}", tif.pages.first.description)),
    "ome": ("ome", "OME PhysicalSize", _ome),
}
