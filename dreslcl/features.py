"""Tile features that other tools extracted: TRIDENT, CLAM (h5 and pt) and STAMP layouts, with or without coordinates."""

from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32, Float64

from .errors import StoreError, TableError
from .files import check_id


def read_features(path: Path) -> tuple[Float32[np.ndarray, "M D"], Float64[np.ndarray, "M 2"] | None]:
    """Unit-norm features of a slide's tiles, and their top-left corners where the file has them (level-0 px; STAMP: µm).

    Raises:
        StoreError: not such a file, not (M, D), or values that are not finite. A .pt must hold one plain tensor; pickled
            code in it is never run.
    """
    path = Path(path)
    try:
        if path.suffix == ".pt":
            features, coords = _read_pt(path), None
        else:
            with h5py.File(path, "r") as file:
                name = next((n for n in ("features", "feats") if n in file), None)
                if name is None:
                    raise StoreError(f"{path}: holds {', '.join(file) or 'nothing'}; tile features are a dataset named features or feats")
                features = file[name][()]
                coords = file["coords"][()].astype(np.float64) if "coords" in file and file["coords"].shape == (len(features), 2) else None
    except (OSError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: not a readable file of tile features ({str(error).splitlines()[0]})") from error
    features = np.asarray(features)
    if features.ndim == 3 and len(features) == 1:
        features = features[0]
    if features.ndim != 2:
        raise StoreError(f"{path}: features have shape {features.shape}; (tiles, width) is needed")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise StoreError(f"{path}: holds features that are not finite; extract them anew")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12), coords


def _read_pt(path: Path) -> np.ndarray:
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for files that are no plain tensors
        raise StoreError(f"{path}: not a plain tensor file ({type(error).__name__}); pickled objects are not read") from error
    if not isinstance(value, torch.Tensor):
        raise StoreError(f"{path}: holds a {type(value).__name__}; a plain (tiles, width) tensor is needed")
    return value.float().numpy()


def find_features(folder: Path) -> dict[str, tuple[Path, int]]:
    """Slide id -> (file, M) for each .h5 or .pt file of features in a folder; both for one slide: the .h5.

    Raises:
        TableError: none there, or their widths differ.
    """
    folder = Path(folder)
    paths = {p.stem: p for suffix in ("*.pt", "*.h5") for p in sorted(folder.glob(suffix))}
    found, widths = {}, {}
    for name, path in paths.items():
        features, _ = read_features(path)
        found[check_id(name, str(folder))] = (path, len(features))
        widths.setdefault(features.shape[1], path.name)
    if not found:
        raise TableError(f"{folder}: no .h5 or .pt files of tile features")
    if len(widths) > 1:
        raise TableError(f"{folder}: features of several widths: {', '.join(f'{w} ({n})' for w, n in widths.items())}")
    return found
