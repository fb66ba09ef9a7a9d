"""Slide: open a scan, know its resolution, read tiles of any µm/px fast.

tifffile parses the file once, in the opening thread; pixels are then read on our own descriptor (segments.py), so one slide serves many
threads and forked processes. Only the pyramid is kept: label and macro images hold patient data and are never exposed.
"""

import logging
import math
import re
from collections import deque
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, UInt8
from PIL import Image
from tifffile import TiffFile

from .common import SlideError
from .segments import DAMAGED, JPEG2000, DecodeCache, Segments, from_image, from_page

Real = float | int
log = logging.getLogger(__name__)

PLAUSIBLE_MPP = 0.01, 40.0
"""µm per pixel; what a file states outside of it (72 dpi is 353) is no microscope's resolution."""
CHUNK_BYTES = 64 << 20
"""Most bytes of level pixels held at once while tiles are resampled."""
BLOCK = 2048
"""Edge of the pieces that a thumbnail is read in, level pixels."""

CONVERT = "convert it to a tiled pyramidal TIFF (for example: bfconvert, or vips tiffsave --tile --pyramid)"
OVERVIEW = re.compile(r"^(label|macro|thumbnail|overview|probability)", re.IGNORECASE | re.MULTILINE)
FOREIGN = {  # suffix, or bytes at a place -> what it is
    ".mrxs": "a MIRAX scan", ".vsi": "an Olympus VSI scan", ".vms": "a Hamamatsu VMS scan", ".dcm": "a DICOM file",
    (128, b"DICM"): "a DICOM file", (0, b"ZISRAWFILE"): "a Zeiss CZI file", (0, b"SQLite format 3"): "an SQLite file (Sakura?)",
    (0, b"PK\x03\x04"): "a ZIP archive", (0, b"\x1f\x8b"): "a gzip archive", (0, b"%PDF"): "a PDF file", (0, b"\x89HDF"): "an HDF5 file",
    (0, b"\x00\x00\x00\x0cjP"): "a JPEG 2000 image", (0, b"BM"): "a BMP image", (0, b"GIF8"): "a GIF image",
}  # fmt: skip


@dataclass(frozen=True)
class Level:
    """One stored resolution."""

    index: int
    size: tuple[int, int]  # (w, h), pixels of this level
    downsample: float  # level-0 pixels per pixel of this level


class Slide:
    """A scan, open for reading. Places are level-0 pixels (x, y), resolutions µm per pixel, pixels 8-bit RGB, white outside the scan.

    Reads may run in many threads at once. A pickled slide opens its file again; a forked one reads on.
    """

    def __init__(self, path: Path, stored: list[Segments], vendor: str, mpp_xy: tuple[Real, ...], source: str):
        self.path, self.vendor, self.mpp_source, self._stored = path, vendor, source, stored
        self.levels = tuple(Level(i, s.size, _downsample(stored[0].size, s.size)) for i, s in enumerate(stored))
        self.size = stored[0].size
        self.mpp_xy = mpp_xy or None
        self.mpp = sum(mpp_xy) / 2 if mpp_xy else None
        self._caches: deque[tuple[int, DecodeCache]] = deque(maxlen=2)  # (level, what its last read left); a read takes one out
        self._file = path.open("rb", buffering=0)

    @classmethod
    def open(cls, path: Path | str, mpp: Real | None = None, default_mpp: Real | None = None) -> "Slide":
        """Open an SVS, NDPI, SCN, Philips, Ventana, QPTIFF, OME or plain TIFF, or a PNG or JPEG image.

        Args:
            path: the file.
            mpp: resolution of level 0, µm per pixel; overrides what the file says.
            default_mpp: the same, where the file says none.

        Raises:
            SlideError: no such file, another format, damaged, or not 8-bit RGB.
        """
        path = Path(path)
        low, high = PLAUSIBLE_MPP
        for asked in (value for value in (mpp, default_mpp) if value is not None and not low <= value <= high):
            raise SlideError(f"{path.name}: {asked} µm/px is no resolution of a scan; give one from {low} to {high:g}")
        try:
            with path.open("rb") as file:
                head = file.read(512)
            file_bytes = path.stat().st_size
        except OSError as error:
            raise SlideError(f"{path.name}: cannot be opened ({error.strerror})") from error
        known = path.suffix.lower() not in FOREIGN
        if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and known:
            stored, vendor, mpp_xy, source = _open_tiff(path)
        elif (head[:3] == b"\xff\xd8\xff" or head[:8] == b"\x89PNG\r\n\x1a\n") and known:
            stored, vendor, mpp_xy, source = [from_image(path.read_bytes(), path.name)], "image", (), "none"
        else:
            raise SlideError(f"{path.name}: {_what(path, head)}")
        for level in stored:
            level.check_inside(file_bytes)
        if mpp or (default_mpp and not mpp_xy):
            mpp_xy, source = (mpp or default_mpp,) * 2, "given" if mpp else "default"
        return cls(path, stored, vendor, mpp_xy, source)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path, *(self.mpp if self.mpp_source == source else None for source in ("given", "default")))

    def __enter__(self) -> "Slide":
        return self

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
        self,
        xy: Integer[np.ndarray, "N 2"],
        size: int,
        mpp: Real,
        *,
        threads: int = 1,
        out: UInt8[np.ndarray, "N size size 3"] | None = None,
    ) -> UInt8[np.ndarray, "N size size 3"]:
        """Tiles of `size` pixels at `mpp`, in the order of their top-left corners `xy` (level-0 pixels).

        Each stored segment is decoded once over all tiles, so many tiles in one call, or calls in raster order, are faster than single
        ones. The coarsest level that is not coarser than `mpp` is read and resampled by area (Pillow's box filter).

        Raises:
            SlideError: no resolution known, `mpp` finer than the scan, the slide is closed, or stored data is damaged.
        """
        level, step = self._choose(size, mpp)
        edge = size if step == 1 else round(size * step * level.downsample) / level.downsample
        out = np.empty((len(xy), size, size, 3), np.uint8) if out is None else out
        with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
            self._read(level, xy / level.downsample, edge, out, pool)
        return out

    def read_region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        """`size` (w, h) pixels of a stored level, right and below of `location` (x, y; level-0 pixels): openslide's arguments.

        Raises:
            SlideError: the slide is closed, or stored data is damaged.
        """
        out = np.empty((1, size[1], size[0], 3), np.uint8)
        self._fill(level, np.rint(np.array([location]) / self.levels[level].downsample).astype(np.int64), out, None)
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

    def _known_mpp(self) -> float:
        if self.mpp is None:
            raise SlideError(f"{self.path.name}: the file does not say its resolution; give it with --overrides or --default-mpp")
        return self.mpp

    def _choose(self, size: int, mpp: Real) -> tuple[Level, float]:
        """The level to read for `size` pixels at `mpp`, and its pixels per output pixel (exactly 1: no resampling)."""
        scale = mpp / self._known_mpp()  # level-0 pixels per output pixel
        for level in reversed(self.levels):
            step = scale / level.downsample
            if abs(step - 1) < min(0.02, 1 / size):
                return level, 1.0
            if step >= 1:
                return level, step
        raise SlideError(f"{self.path.name}: asked for {mpp:g} µm/px but the scan has {self.mpp:g}; use --mpp {self.mpp:.4g} or larger")

    def _read(
        self, level: Level, corners: Float[np.ndarray, "N 2"], edge: Real, out: UInt8[np.ndarray, "N h w 3"], pool: Executor | None
    ) -> None:
        """Fill square `out` from squares of `edge` level pixels at `corners` (level pixels), resampling where sizes differ."""
        size = out.shape[1]
        if edge == size:
            return self._fill(level.index, np.rint(corners).astype(np.int64), out, pool)
        low = np.floor(corners + 1e-6).astype(np.int64)
        inset = np.maximum(corners - low, 0.0)
        reach = math.ceil(edge + float(inset.max(initial=0.0)) - 1e-6)
        order = np.lexsort((low[:, 0], low[:, 1]))  # raster order lets one chunk leave segments for the next
        chunk = max(1, CHUNK_BYTES // (3 * reach * reach))
        windows = np.empty((min(chunk, len(order)), reach, reach, 3), np.uint8)

        def shrink(item: tuple[int, np.ndarray]) -> None:
            tile, window = item
            x, y = inset[tile]
            area = (x, y, min(x + edge, reach), min(y + edge, reach))
            out[tile] = Image.fromarray(window).resize((size, size), Image.Resampling.BOX, box=area)

        for start in range(0, len(order), chunk):
            tiles = order[start : start + chunk]
            self._fill(level.index, low[tiles], windows[: len(tiles)], pool)
            for _ in (pool.map if pool else map)(shrink, zip(tiles.tolist(), windows)):
                pass

    def _fill(self, level: int, corners: np.ndarray, out: np.ndarray, pool: Executor | None) -> None:
        """Copy stored pixels of a level, from `corners` (level pixels), with what an earlier read left."""
        if self._file.closed:
            raise SlideError(f"{self.path.name}: the slide is closed; open it again")
        try:
            held, cache = self._caches.pop()
        except IndexError:  # none yet, or other threads have them
            held, cache = level, DecodeCache()
        cache = cache if held == level else DecodeCache()
        self._stored[level].read(self._file.fileno(), corners, out, cache, pool)
        self._caches.append((level, cache))


def _downsample(full: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 pixels per level pixel; a whole number where the sizes allow one (levels are cut, not stretched, to whole pixels)."""
    ratio = (full[0] / size[0] + full[1] / size[1]) / 2
    whole = round(ratio)
    return float(whole) if all(abs(f / whole - s) < 1 for f, s in zip(full, size)) else ratio


def _what(path: Path, head: bytes) -> str:
    """What a file is that is not a scan we read, and what to do."""
    if not head:
        return f"an empty file (0 bytes); {DAMAGED}"
    magic = (what for sign, what in FOREIGN.items() if isinstance(sign, tuple) and head[sign[0] :].startswith(sign[1]))
    if what := FOREIGN.get(path.suffix.lower()) or next(magic, None):
        return f"{what}, which is not read; {CONVERT}"
    if not head.strip(b"\0"):
        return f"starts with zeros, so it is no scan; {DAMAGED}"
    try:
        text = not re.search(r"[\x00-\x08]", head[:-4].decode())
    except UnicodeDecodeError:
        text = False
    return "a text file, not a scan; give the scan itself" if text else f"not a scan of a known format; {CONVERT}"


def _open_tiff(path: Path) -> tuple[list[Segments], str, tuple[Real, ...], str]:
    """Levels, vendor, µm/px (x, y; empty if unknown) and where that stands."""
    try:
        with TiffFile(path) as tif:
            series = _pyramid(tif, path.name)
            stored = []
            for i, level in enumerate([series, *(s for s in series.levels if s is not series)]):
                in_focus = (p for p in level.pages if p is not None and p.keyframe.tags.valueof(65424, 0) == 0)  # Hamamatsu: z offset
                page = next(in_focus, level.pages[0])
                if page.parent.filehandle.path != tif.filehandle.path:
                    raise SlideError(f"{path.name}: part of a set of several files, which is not read; {CONVERT}")
                stored.append(from_page(page, f"{path.name}: level {i}"))
            vendor, source, read = next((v for kind, v in VENDORS.items() if getattr(tif, f"is_{kind}")), ("generic", "", None))
            said = {source: read(tif, series) if read else [], "TIFF resolution": _tiff_resolution(series.keyframe)}
            likely = {s: tuple(m) for s, m in said.items() if len(m) == 2 and PLAUSIBLE_MPP[0] <= min(m) <= max(m) <= PLAUSIBLE_MPP[1]}
            source, mpp = next(iter(likely.items()), ("none", ()))
            if series.keyframe.compression in JPEG2000:
                log.info("%s: JPEG 2000 decodes 9-18 times slower than JPEG", path.name)
    except SlideError:
        raise
    except Exception as error:  # a broken header makes tifffile raise anything
        raise SlideError(f"{path.name}: not a readable TIFF ({type(error).__name__}: {str(error)[:120]}); {DAMAGED}") from error
    return _consistent(stored, path.name), vendor, mpp, source


def _pyramid(tif: TiffFile, name: str) -> Any:
    """The series that holds the scan: by its place where the vendor fixes one, else the largest; never label, macro or overview."""
    if not tif.series:
        raise SlideError(f"{name}: a TIFF without images; {DAMAGED}")
    first = tif.series[0]
    if first.kind in ("svs", "bif", "qpi", "philips"):
        scan = first if first.name == "Baseline" else None
    elif first.kind == "ndpi":
        scan = next((s for s in tif.series if s.keyframe.tags.valueof(65421, 0) > 0), None)  # magnification; macro -1, map -2
    else:
        images = [s for s in tif.series if not OVERVIEW.search(s.name) and not OVERVIEW.search(s.keyframe.description)]
        scan = max(images, key=lambda s: s.keyframe.imagewidth * s.keyframe.imagelength, default=None)
    if scan is None:
        raise SlideError(f"{name}: holds no scan, only label or overview images; {DAMAGED}")
    return scan


def _consistent(stored: list[Segments], name: str) -> list[Segments]:
    """Levels from fine to coarse; one of another shape than the scan is left out."""
    (w, h) = stored[0].size
    levels: list[Segments] = []
    for level in sorted(stored, key=lambda s: -s.size[0]):
        stretch = level.size[0] * h / (w * level.size[1])
        if level.size[0] > w or abs(stretch - 1) > 0.02 + 2 / min(level.size):
            log.warning("%s: left out a level of %d x %d px: not the scan's shape", name, *level.size)
        elif not levels or level.size[0] < levels[-1].size[0]:
            levels.append(level)
    return levels


# What files say of their resolution: lists [x, y] of µm/px, shorter where something is missing


def _number(pattern: str, text: str) -> list[float]:
    """The first match of `pattern`, in which {} stands for a number."""
    match = re.search(pattern.format(r"\s*([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?)"), text)
    return [float(match[1])] if match else []


def _tiff_resolution(page: Any) -> list[float]:
    unit = {2: 25400.0, 3: 10000.0}.get(int(page.tags.valueof(296, 2)))
    fractions = [page.tags.valueof(code) for code in (282, 283)]
    return [unit * f[1] / f[0] for f in fractions] if unit and all(f and f[0] and f[1] for f in fractions) else []


def _philips(tif: TiffFile, _: Any) -> list[float]:
    spacings = re.findall(r'DICOM_PIXEL_SPACING"[^>]*>([^<]*)<', tif.pages.first.description)  # mm, row then column, one per level
    pairs = [[float(v) * 1000 for v in re.findall(r"[0-9.]+(?:e-?[0-9]+)?", spacing)] for spacing in spacings]
    return min((p for p in pairs if len(p) == 2 and min(p) > 0), default=[])[::-1]


def _ome(tif: TiffFile, series: Any) -> list[float]:
    images = re.split("<Image[ >]", tif.pages.first.description)[1:]  # one per series
    text, mpp = "".join(images[tif.series.index(series) :][:1]), []
    factors = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4}
    for axis in "XY":
        unit = re.search(f'PhysicalSize{axis}Unit="([^"]*)"', text)
        mpp += [value * factors.get(unit[1] if unit else "µm", 0.0) for value in _number(f'PhysicalSize{axis}="{{}}', text)]
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
