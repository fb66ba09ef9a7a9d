"""Tile features that other tools extracted: TRIDENT, CLAM (h5 and pt) and STAMP layouts, with or without coordinates."""

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import h5py
import numpy as np
from jaxtyping import Float, Float32, Int64

from . import __version__
from .common import ConfigError, StoreError, TableError, check_id, hdf5_file, read_table, reason, write_bytes, write_table
from .tiles import TileGrid

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


Layout = Literal["trident", "clam", "stamp", "patho-bench"]
Features = Float32[np.ndarray, "M D"]


def tile_files(out: Path, layout: Layout, slide: str) -> list[Path]:
    """The files in which `write_tiles` puts a slide's tile features.

    Raises:
        ConfigError: the tool has no files of tile features.
    """
    folders = {
        "trident": [("tile_features", "h5")],
        "clam": [("clam/pt_files", "pt"), ("clam/h5_files", "h5")],
        "stamp": [("stamp_tiles", "h5")],
    }
    if layout not in folders:
        raise ConfigError(f"{layout} reads no tile features of its own; use --layout trident with --tile-features")
    return [out / folder / f"{slide}.{suffix}" for folder, suffix in folders[layout]]


def write_tiles(out: Path, layout: Layout, features: Features, grid: TileGrid, encoder: str) -> None:
    """Write the tile features of one slide: TRIDENT's h5, CLAM's h5 and pt, or STAMP's h5 (float16, places in µm)."""
    *tensor, path = tile_files(out, layout, grid.slide_id)
    for file in tensor:
        import torch

        memory = io.BytesIO()
        torch.save(torch.from_numpy(features), memory)
        write_bytes(file, memory.getbuffer())
    with hdf5_file(path) as file:
        if layout == "stamp":
            file["feats"] = features.astype(np.float16)
            file["coords"] = (grid.xy * grid.mpp_level0).astype(np.float32)
            file.attrs.update(extractor=encoder, unit="um", tile_size_um=grid.size * grid.mpp, tile_size_px=grid.size)
            file.attrs.update(feat_type="tile", code_hash=f"dreslcl {__version__}")  # no stamp_version: STAMP refuses newer ones
            return
        file["features"] = features
        file["coords"] = grid.xy.astype(np.int32 if layout == "clam" else np.int64)
        file["features"].attrs.update(name=grid.slide_id, savetodir=path.parent.name, encoder=encoder)
        grid.describe(file["coords"], path.parent.name)


def write_vectors(
    out: Path, layout: Layout, ids: tuple[str, ...], patients: tuple[str, ...], vectors: Float32[np.ndarray, "S E"], model: str
) -> None:
    """Write one file per slide (or per patient, where ids are patients) as STAMP or Patho-Bench read them, and STAMP's slide table.

    TRIDENT's slide features are what `embed` writes anyway; CLAM reads none.

    Raises:
        TableError: an id (a patient's, from a table) that cannot name a file.
    """
    if layout not in ("stamp", "patho-bench"):
        return
    kind = "patient" if ids == patients else "slide"
    for name, vector in zip(ids, vectors):
        check_id(name, str(out))
        folder = out / ("stamp_slides" if layout == "stamp" else "patho_bench")
        with hdf5_file(folder / f"{name}.h5") as file:
            if layout == "stamp":
                file["feats"] = vector[None]
                file.attrs.update(feat_type=kind, encoder=f"dreslcl {model}", precision="float32")
            else:
                file["features"] = vector
    if layout == "stamp":
        write_table(out / "stamp_slides.csv", ("PATIENT", "FILENAME"), [(p, f"{s}.h5") for s, p in zip(ids, patients)])


VERSION = 1


@dataclass(frozen=True)
class Embeddings:
    """One vector per slide (or per patient, where slides were averaged), in the order of `ids`.

    Raises:
        StoreError: the parts differ in length, an id comes twice, or a number is not finite.
    """

    ids: tuple[str, ...]
    patients: tuple[str, ...]
    """Patient of each slide; "" where unknown."""
    vectors: Float32[np.ndarray, "S E"]
    """Unit norm."""
    mean: Float32[np.ndarray, "S D"] | None = None
    """Mean of the slide's tile features: the baseline that an evaluation sets beside `vectors`."""
    seen: frozenset[str] = frozenset()
    """Ids of the slides that pretraining used, whether or not they are in `ids`."""
    model: str = ""
    """Fingerprint of the model that made the vectors."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Slides that this run of `embed` could not do, and why; not in the file."""
    model_folder: str = ""
    """RUN/model that made the vectors, "" where none did; in the file as a path relative to the file's own folder."""

    def __post_init__(self) -> None:
        lengths = {len(self.ids), len(self.patients), len(self.vectors), len(self.ids if self.mean is None else self.mean)}
        if len(lengths) > 1:
            raise StoreError(f"embeddings: ids, patients, vectors and mean differ in length ({', '.join(map(str, sorted(lengths)))})")
        if len(set(self.ids)) < len(self.ids):
            twice = next(slide for slide in self.ids if self.ids.count(slide) > 1)
            raise StoreError(f"embeddings: slide id {twice!r} comes twice")
        for values in (self.vectors, self.mean):
            bad = [] if values is None else np.flatnonzero(~np.isfinite(values).all(axis=1))
            if len(bad):
                raise StoreError(f"embeddings: {len(bad)} slides have values that are not finite, first {self.ids[bad[0]]!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: Path) -> None:
        """Write `embeddings.h5`: datasets features, slide_id, patient_id, seen and mean_features, attribute model."""
        text = h5py.string_dtype("utf-8")
        with hdf5_file(path) as file:
            file.attrs["version"] = VERSION
            file.attrs["model"] = self.model
            file.attrs["model_folder"] = _relative(self.model_folder, path)
            file["features"] = self.vectors
            file.create_dataset("slide_id", data=list(self.ids), dtype=text)
            file.create_dataset("patient_id", data=list(self.patients), dtype=text)
            file.create_dataset("seen", data=sorted(self.seen), dtype=text)  # a dataset: attributes end at 64 KB
            if self.mean is not None:
                file["mean_features"] = self.mean

    @classmethod
    def load(cls, path: Path) -> "Embeddings":
        """Read `embeddings.h5`, or the one in a folder.

        Raises:
            StoreError: no such file, not HDF5, a dataset is absent, or the contents contradict each other.
        """
        path = Path(path)
        path = path / "embeddings.h5" if path.is_dir() else path
        if not path.is_file():
            raise StoreError(f"{path}: no such file; `dreslcl embed` writes it")
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("version", 0) > VERSION:
                    raise StoreError(f"{path}: version {file.attrs['version']}, newer than this dreslcl reads ({VERSION})")
                texts = {name: tuple(file[name].asstr()[:].tolist()) for name in ("slide_id", "patient_id", "seen")}
                vectors = file["features"][:].astype(np.float32)
                mean = file["mean_features"][:].astype(np.float32) if "mean_features" in file else None
                model, folder = (str(file.attrs.get(name, "")) for name in ("model", "model_folder"))
        except (OSError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not an embeddings file of dreslcl ({error})") from error
        folder = str((path.resolve().parent / folder).resolve()) if folder else ""
        return cls(texts["slide_id"], texts["patient_id"], vectors, mean, frozenset(texts["seen"]), model, model_folder=folder)

    def by_patient(self) -> "Embeddings":
        """One row per patient: the mean of its slides' vectors at unit norm, and of their mean features; ids are the patients.

        A patient counts as seen where pretraining saw any of its slides.
        """
        patients = sorted(set(self.patients))
        rows = [np.flatnonzero(np.array(self.patients) == p) for p in patients]
        vectors = unit(np.stack([self.vectors[r].mean(0) for r in rows]))
        mean = None if self.mean is None else np.stack([self.mean[r].mean(0) for r in rows])
        seen = {self.patients[i] for i, slide in enumerate(self.ids) if slide in self.seen}
        return Embeddings(tuple(patients), tuple(patients), vectors, mean, frozenset(seen), self.model, self.failed, self.model_folder)


def _relative(folder: str, file: Path) -> str:
    return os.path.relpath(Path(folder).resolve(), Path(file).resolve().parent) if folder else ""


_SUFFIX = re.compile(r"\.(svs|tiff?|ndpi|scn|bif|qptiff|png|jpe?g|h5|pt)$", re.IGNORECASE)


_TCGA = re.compile(r"^TCGA-\w{2}-\w{4}")


def patient_of(slide_id: str) -> str:
    """The patient in a TCGA barcode (its first 12 characters), else the slide id itself."""
    return slide_id[:12] if _TCGA.match(slide_id) else slide_id


def _key(slide_id: str) -> str:
    return _SUFFIX.sub("", slide_id)


def _rows(path: Path, *required: str) -> list[dict[str, str]]:
    """Rows of a table of reports or labels with slide_id and/or patient_id, from any of the layouts of `read_reports`."""
    path = Path(path)
    if path.suffix.lower() != ".json":
        rows = read_table(path, required)
        if rows and "patient_filename" in rows[0]:
            rows = [row | {"patient_id": row["patient_filename"].split(".")[0], "report": row.get("text", "")} for row in rows]
        return rows
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
        return [{"slide_id": str(r["id"]), "split": part, "report": str(r["report"])} for part, records in parts.items() for r in records]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TableError(f"{path}: not HistGen's layout {{split: [{{id, report}}]}} ({error!r})") from error


def read_reports(path: Path) -> list[dict[str, str]]:
    """Rows slide_id, patient_id ("" where the table has none) and report; those without an id or a text are left out.

    Reads our table (slide_id and/or patient_id, report), TCGA_Reports.csv (patient_filename, text) and HistGen's JSON
    ({split: [{id, report}]}; the split counts as a column).

    Raises:
        TableError: none of the three, or no report in it.
    """
    rows = _rows(path)
    columns = set(rows[0]) if rows else set()
    if not ("report" in columns and columns & {"slide_id", "patient_id"}):
        raise TableError(f"{path}: needs columns report and slide_id or patient_id; there are {', '.join(sorted(columns)) or 'none'}")
    found = [{key: row.get(key, "") for key in ("slide_id", "patient_id", "report")} for row in rows if row["report"].strip()]
    found = [row for row in found if row["slide_id"] or row["patient_id"]]
    if not found:
        raise TableError(f"{path}: none of its {len(rows)} rows has a report and an id")
    return found


def read_report_vectors(path: Path) -> dict[str, np.ndarray]:
    """Report vectors (n, E) float32 by slide or patient id, from HDF5 (one dataset per id) or npz.

    Raises:
        TableError: cannot be read, an array is neither (E,) nor (n, E), or widths differ.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
        else:
            with h5py.File(path, "r") as file:
                arrays = {key: value[()] for key, value in file.items() if isinstance(value, h5py.Dataset)}
        arrays = {key: np.atleast_2d(np.asarray(value, np.float32)) for key, value in arrays.items()}
    except (OSError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise TableError(f"{path}: not an HDF5 or npz file of report vectors ({error})") from error
    widths = Counter(value.shape[-1] for value in arrays.values() if value.ndim == 2 and len(value))
    if len(widths) != 1 or any(value.ndim != 2 or not len(value) for value in arrays.values()):
        raise TableError(f"{path}: report vectors must be (E,) or (n, E) with one width; found widths {sorted(widths) or 'none'}")
    if bad := [key for key, value in arrays.items() if not np.isfinite(value).all()]:
        raise TableError(f"{path}: {len(bad)} report vectors are not finite, first {bad[0]!r}")
    return arrays
