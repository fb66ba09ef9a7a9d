"""One slide's tiles as one TIFF at the tile's resolution: what to read instead of a scan on a slow disk.

Tile m of a grid is stored tile m of the pack, so a pack needs no index: `packed_corners` follows from the number of tiles alone. Where the
grid lies on the scan's own JPEG tiles (`--align` helps), their bytes are copied, nothing is encoded anew. `Slide` reads a pack as any scan.
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Int64
from tifffile import TiffFile, TiffFileError, TiffWriter

from .files import atomic
from .grid import TileGrid
from .slide import Slide

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
