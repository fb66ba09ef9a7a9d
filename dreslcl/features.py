"""Tile features that other tools extracted: TRIDENT, CLAM (h5 and pt) and STAMP layouts, with or without coordinates."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float, Float32, Int64

from .errors import StoreError, TableError, reason
from .files import check_id

_NAMES = ("features", "feats")  # TRIDENT and CLAM; STAMP
_FOLDERS = ("pt_files", "h5_files")  # CLAM's folder of features holds both


def unit(vectors: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Vectors scaled to length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def read_features(path: Path) -> Float32[np.ndarray, "M D"]:
    """Unit-norm features of a slide's tiles.

    Raises:
        StoreError: not such a file, not (M, D), or values that are not finite. A .pt must hold one plain tensor; pickled
            code in it is never run.
    """
    path = Path(path)
    if path.suffix == ".pt":
        features = _read_pt(path)
    else:
        with _opened(path) as file:
            features = file[_dataset(file, path)][()]
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2 or features.dtype.kind not in "fiu":
        raise StoreError(f"{path}: features are {features.dtype} of shape {features.shape}; numbers (tiles, width) are needed")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise StoreError(f"{path}: holds features that are not finite; extract them anew")
    return unit(features)


def read_corners(path: Path) -> Int64[np.ndarray, "M 2"] | None:
    """Top-left corners of a file's tiles in level-0 pixels, where it has them; not STAMP's, which are µm."""
    if Path(path).suffix == ".pt":
        return None
    with _opened(path) as file:
        if "features" not in file or not isinstance(file.get("coords"), h5py.Dataset):
            return None
        xy = file["coords"][()]
    return xy.astype(np.int64) if xy.ndim == 2 and xy.shape[1] == 2 else None


def find_features(folder: Path, unreadable: dict[str, str] | None = None) -> dict[str, tuple[Path, int]]:
    """Slide id -> (file, M) for each .h5 or .pt file of features in a folder (or CLAM's folders in it); of two for one slide: the .h5.

    Args:
        unreadable: takes up slide id -> reason for files that do not hold features, in place of an error.

    Raises:
        StoreError: a file there does not hold features.
        TableError: none there, or their widths differ.
    """
    folder = Path(folder)
    places = [folder, *(folder / name for name in _FOLDERS)]
    paths = {p.stem: p for suffix in ("*.pt", "*.h5") for place in places for p in sorted(place.glob(suffix))}
    found: dict[str, tuple[Path, int]] = {}
    widths: dict[int, str] = {}
    for name, path in sorted(paths.items()):
        try:
            tiles, width = _shape(path)
        except StoreError as error:
            if unreadable is None:
                raise
            unreadable[name] = reason(error)
            continue
        found[check_id(name, str(folder))] = (path, tiles)
        widths.setdefault(width, path.name)
    if not paths:
        raise TableError(f"{folder}: no .h5 or .pt files of tile features")
    if len(widths) > 1:
        raise TableError(f"{folder}: features of several widths: {', '.join(f'{w} ({n})' for w, n in widths.items())}")
    return found


def _shape(path: Path) -> tuple[int, int]:
    """(M, D) without reading the features where the file allows it."""
    if path.suffix == ".pt":
        shape = _read_pt(path).shape
    else:
        with _opened(path) as file:
            shape = file[_dataset(file, path)].shape
    shape = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(shape) != 2:
        raise StoreError(f"{path}: features have shape {shape}; (tiles, width) is needed")
    return shape[0], shape[1]


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise StoreError(f"{path}: not a readable file of tile features ({' '.join(str(error).split())})") from error


def _dataset(file: h5py.File, path: Path) -> str:
    name = next((n for n in _NAMES if isinstance(file.get(n), h5py.Dataset)), None)
    if name is None:
        raise StoreError(f"{path}: holds {', '.join(file) or 'nothing'}; tile features are a dataset named {' or '.join(_NAMES)}")
    return name


def _read_pt(path: Path) -> np.ndarray:
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(value, torch.Tensor):
            return value.detach().float().numpy()
    except Exception as error:  # torch raises many types for files that are no plain tensors
        raise StoreError(f"{path}: not a plain tensor file ({type(error).__name__}); pickled objects are not read") from error
    raise StoreError(f"{path}: holds a {type(value).__name__}; a plain (tiles, width) tensor is needed")
