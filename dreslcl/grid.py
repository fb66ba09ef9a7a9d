"""TileGrid, the places of a slide's tiles, its HDF5 file, and the arithmetic that lays it."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Int64

from . import __version__
from .config import TileConfig
from .errors import SlideError, StoreError
from .files import hdf5_file
from .slide import Slide


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
