"""The files that other tools read and write: tile features, slide vectors, embeddings, tables of reports."""

import io
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile, is_zipfile

import h5py
import numpy as np
from jaxtyping import Float, Float32, Int64

from . import __version__

from .common import (  # isort: skip
    ConfigError, Row, StoreError, TableError, check_id, hdf5_file, is_missing, missing_words, one_value, read_table,
    read_text, reason, write_bytes, write_table,
)  # fmt: skip
from .tiles import TileGrid

Layout = Literal["trident", "clam", "stamp", "patho-bench"]
Features = Float32[np.ndarray, "M D"]


class _Files(NamedTuple):
    """How a tool keeps features: its folders (None: it reads no such files), the dataset, and the kinds of number in it and in `coords`."""

    tiles: str | None  # h5 files of a slide's tile features
    tensors: str | None  # .pt files of the same
    vectors: str | None  # h5 files of a slide's, or a patient's, vector
    name: str
    dtype: type
    corners: type


LAYOUTS: dict[Layout, _Files] = {
    "trident": _Files("tile_features", None, None, "features", np.float32, np.int64),  # `embed` writes its slide vectors anyway
    "clam": _Files("clam/h5_files", "clam/pt_files", None, "features", np.float32, np.int32),
    "stamp": _Files("stamp_tiles", None, "stamp_slides", "feats", np.float16, np.float32),
    "patho-bench": _Files(None, None, "patho_bench", "features", np.float32, np.int64),
}
DATASETS = ("features", "feats")  # the names in them
log = logging.getLogger(__name__)

VERSION = 1  # of embeddings.h5
_TEXTS = ("slide_id", "patient_id", "seen", "selected")  # its datasets of words
_CELLS = ("slide_id", "patient_id", "report")
_PLACES = ("", "pt_files", "h5_files")  # a folder of features, and CLAM's two in it; of two files for one slide the last one counts


def unit(vectors: Float[np.ndarray, "*n D"]) -> Float[np.ndarray, "*n D"]:
    """Vectors scaled to length 1; zero stays zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def read_features(path: Path) -> Features:
    """Unit-norm features of a slide's tiles, in TRIDENT's, CLAM's (.h5 and .pt) or STAMP's layout.

    Raises:
        StoreError: not such a file, not (M, D), or values that are not finite. A .pt must hold one plain tensor; pickled
            code in it is never run.
    """
    with _opened(path) as data:
        features = data[()] if isinstance(data, h5py.Dataset) else data.detach().float().numpy()
    features = features.reshape(_bag_shape(features.shape, path))
    if features.dtype.kind not in "fiu":
        raise StoreError(f"{path}: features are {features.dtype}; numbers (tiles, width) are needed")
    features = features.astype(np.float32)
    if not np.isfinite(features).all():
        raise StoreError(f"{path}: holds features that are not finite; extract them anew")
    return unit(features)


def read_corners(path: Path) -> Int64[np.ndarray, "M 2"] | None:
    """Top-left corners of a file's tiles in level-0 pixels, where it has them; not STAMP's, which are µm."""
    if Path(path).suffix == ".pt":
        return None
    with _opened(path) as data:
        coords = data.file.get("coords") if data.name == "/features" else None
        return coords[()].astype(np.int64) if isinstance(coords, h5py.Dataset) and coords.shape[1:] == (2,) else None


def find_features(folder: Path, unreadable: dict[str, str] | None = None) -> dict[str, tuple[Path, int]]:
    """Slide id -> (file, M) for each .h5 or .pt file of features in a folder (or CLAM's folders in it); of two for one slide: the .h5.

    Raises:
        StoreError: a file there does not hold features; where `unreadable` is given, it gets slide id -> reason instead.
        TableError: none there, or their widths differ.
    """
    folder = Path(folder)
    paths = {p.stem: p for suffix in ("*.pt", "*.h5") for place in _PLACES for p in sorted((folder / place).glob(suffix))}
    if not paths:
        raise TableError(f"{folder}: no .h5 or .pt files of tile features")
    found: dict[str, tuple[Path, int]] = {}
    widths: dict[int, str] = {}
    for name, path in sorted(paths.items()):
        try:
            with _opened(path, mmap=True) as data:
                tiles, width = _bag_shape(tuple(data.shape), path)
            found[check_id(name, str(folder))] = (path, tiles)
            widths.setdefault(width, path.name)
        except StoreError as error:
            if unreadable is None:
                raise
            unreadable[name] = reason(error)
    if len(widths) > 1:
        raise TableError(f"{folder}: features of several widths: {', '.join(f'{w} ({n})' for w, n in widths.items())}")
    return found


def _bag_shape(shape: tuple[int, ...], path: Path) -> tuple[int, int]:
    """(M, D) of an array that may have a leading 1."""
    bag = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(bag) != 2:
        raise StoreError(f"{path}: features have shape {shape}; (tiles, width) is needed")
    return bag


@contextmanager
def _opened(path: Path, *, mmap: bool = False) -> Iterator[Any]:
    """A file's features, an h5py.Dataset or a Tensor; with `mmap` a tensor's values stay on disk. StoreError where they cannot be read."""
    path = Path(path)
    if path.suffix == ".pt":
        import torch

        try:
            value = torch.load(path, "cpu", weights_only=True, mmap=mmap and is_zipfile(path))  # no zip: a file of before torch 1.6
        except Exception as error:  # torch raises many types for files that are no plain tensors
            raise StoreError(f"{path}: not a plain tensor file ({type(error).__name__}); pickled objects are not read") from error
        if not isinstance(value, torch.Tensor):
            raise StoreError(f"{path}: holds a {type(value).__name__}; a plain (tiles, width) tensor is needed")
        yield value
        return
    try:
        with h5py.File(path, "r") as file:
            found = next((file[name] for name in DATASETS if isinstance(file.get(name), h5py.Dataset)), None)
            if found is None:
                raise StoreError(f"{path}: holds {', '.join(file) or 'nothing'}; tile features are a dataset named {' or '.join(DATASETS)}")
            yield found
    except (OSError, ValueError, TypeError, MemoryError) as error:
        raise StoreError(f"{path}: not a readable file of tile features ({' '.join(str(error).split())})") from error


def tile_files(out: Path, layout: Layout, slide: str) -> list[Path]:
    """The files in which `write_tiles` puts a slide's tile features, the h5 last. Raises ConfigError: the tool reads none."""
    files = LAYOUTS[layout]
    if files.tiles is None:
        raise ConfigError(f"{layout} reads no tile features of its own; use --layout trident with --tile-features")
    return [out / folder / f"{slide}.{suffix}" for folder, suffix in ((files.tensors, "pt"), (files.tiles, "h5")) if folder]


def write_tiles(out: Path, layout: Layout, features: Features, grid: TileGrid, encoder: str) -> None:
    """Write the tile features of one slide: TRIDENT's h5, CLAM's h5 and pt, or STAMP's h5."""
    files, (*tensor, path) = LAYOUTS[layout], tile_files(out, layout, grid.slide_id)
    for file in tensor:
        import torch

        memory = io.BytesIO()
        torch.save(torch.from_numpy(features), memory)
        write_bytes(file, memory.getbuffer())
    with hdf5_file(path) as file:
        file[files.name] = features.astype(files.dtype)
        file["coords"] = (grid.xy * (grid.mpp_level0 if layout == "stamp" else 1)).astype(files.corners)  # µm, or level-0 pixels
        if layout == "stamp":
            file.attrs.update(extractor=encoder, unit="um", tile_size_um=grid.size * grid.mpp, tile_size_px=grid.size)
            file.attrs.update(feat_type="tile", code_hash=f"dreslcl {__version__}")  # no stamp_version: STAMP refuses newer ones
        else:
            file[files.name].attrs.update(name=grid.slide_id, savetodir=path.parent.name, encoder=encoder)
            grid.describe(file["coords"], path.parent.name)


@dataclass(frozen=True)
class Embeddings:
    """One vector per slide or patient, ordered as `ids`. Raises StoreError: lengths differ, an id comes twice, a value is not finite."""

    ids: tuple[str, ...]
    patients: tuple[str, ...]  # of each slide; "" where unknown
    vectors: Float32[np.ndarray, "S E"]  # unit norm
    mean: Float32[np.ndarray, "S D"] | None = None  # of the slide's tile features: the baseline that an evaluation sets beside
    seen: frozenset[str] = frozenset()  # slides and patients that pretraining learnt from, in `ids` or not: hashes where there is a salt
    model: str = ""  # fingerprint of the model that made the vectors
    failed: Mapping[str, str] = field(default_factory=dict)  # slides that this run of `embed` could not do, and why; not in the file
    model_folder: str = ""  # RUN/model that made the vectors, "" where none did; in the file relative to the file's own folder
    selected: frozenset[str] = frozenset()  # as `seen`: those whose retrieval chose the epoch that was kept
    salt: str = ""  # of those hashes, see common.remember

    def __post_init__(self) -> None:
        arrays = [self.vectors] if self.mean is None else [self.vectors, self.mean]
        if len(lengths := {*map(len, (self.ids, self.patients, *arrays))}) > 1:
            raise StoreError(f"embeddings: ids, patients, vectors and mean differ in length ({', '.join(map(str, sorted(lengths)))})")
        if len(set(self.ids)) < len(self.ids):
            raise StoreError(f"embeddings: slide id {Counter(self.ids).most_common(1)[0][0]!r} comes twice")
        for values in arrays:
            if len(bad := np.flatnonzero(~np.isfinite(values).all(axis=1))):
                raise StoreError(f"embeddings: {len(bad)} slides have values that are not finite, first {self.ids[bad[0]]!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: Path) -> None:
        """Write `embeddings.h5`: datasets features, slide_id, patient_id, seen, selected and mean_features, attributes model and salt."""
        texts = (self.ids, self.patients, sorted(self.seen), sorted(self.selected))
        with hdf5_file(path) as file:
            folder = self.model_folder and os.path.relpath(Path(self.model_folder).resolve(), Path(path).resolve().parent)
            file.attrs.update(version=VERSION, model=self.model, model_folder=folder, salt=self.salt)
            for name, values in zip(_TEXTS, texts):  # datasets: attributes end at 64 KB
                file.create_dataset(name, data=list(values), dtype=h5py.string_dtype())
            file["features"] = self.vectors
            if self.mean is not None:
                file["mean_features"] = self.mean

    @classmethod
    def load(cls, path: Path) -> "Embeddings":
        """Read `embeddings.h5`, or the one in a folder. Raises StoreError: none there, not HDF5, a dataset absent, or contradictions."""
        path = Path(path)
        path = path / "embeddings.h5" if path.is_dir() else path
        if not path.is_file():
            raise StoreError(f"{path}: no such file; `dreslcl embed` writes it")
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("version", 0) > VERSION:
                    raise StoreError(f"{path}: version {file.attrs['version']}, newer than this dreslcl reads ({VERSION})")
                ids, patients, seen, selected = (tuple(file[name].asstr()[:].tolist()) for name in _TEXTS)
                vectors = file["features"][:].astype(np.float32)
                mean = file["mean_features"][:].astype(np.float32) if "mean_features" in file else None
                model, folder, salt = (str(file.attrs.get(name, "")) for name in ("model", "model_folder", "salt"))
        except (OSError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not an embeddings file of dreslcl ({error})") from error
        folder = folder and str((path.resolve().parent / folder).resolve())
        return cls(ids, patients, vectors, mean, frozenset(seen), model, {}, folder, frozenset(selected), salt)

    def by_patient(self) -> "Embeddings":
        """One row per patient: the mean of its slides' vectors at unit norm, and of their mean features; ids are the patients.

        A patient counts as seen where pretraining saw any of its slides.
        """
        patients = sorted(set(self.patients))
        rows = [np.flatnonzero(np.array(self.patients) == p) for p in patients]
        vectors = unit(np.stack([self.vectors[r].mean(0) for r in rows]))
        mean = None if self.mean is None else np.stack([self.mean[r].mean(0) for r in rows])
        seen = {self.patients[i] for i, slide in enumerate(self.ids) if slide in self.seen}  # hashes hold patients already
        return replace(self, ids=tuple(patients), patients=tuple(patients), vectors=vectors, mean=mean, seen=self.seen | seen)


def write_vectors(out: Path, layout: Layout, embeddings: Embeddings) -> None:
    """Write one file per slide (or per patient, where ids are patients) as STAMP or Patho-Bench read them, and STAMP's slide table.

    Raises TableError: an id (a patient's, from a table) that cannot name a file.
    """
    files, ids, patients = LAYOUTS[layout], embeddings.ids, embeddings.patients
    if files.vectors is None:
        return
    facts = {"feat_type": "patient" if ids == patients else "slide", "encoder": f"dreslcl {embeddings.model}", "precision": "float32"}
    for name, vector in zip(ids, embeddings.vectors):
        with hdf5_file(out / files.vectors / f"{check_id(name, str(out))}.h5") as file:
            file[files.name] = vector[None] if layout == "stamp" else vector
            file.attrs.update(facts if layout == "stamp" else {})
    if layout == "stamp":
        write_table(out / f"{files.vectors}.csv", ("PATIENT", "FILENAME"), [(p, f"{s}.h5") for s, p in zip(ids, patients)])


def patient_of(slide_id: str) -> str:
    """The patient in a TCGA barcode (its first 12 characters), wherever in the id that stands; else the slide id itself."""
    found = re.findall(r"(?<![A-Za-z0-9])TCGA-\w{2}-[A-Z0-9]{4}(?![A-Za-z0-9])", slide_id)
    return found[-1] if found else slide_id


def read_patients(path: Path) -> dict[str, str]:
    """Slide (`same_name`) -> patient, where known. Raises TableError: no slide_id and patient_id, or a slide with two patients."""
    return one_value(path, _known(path, read_table(path, ["slide_id", "patient_id"])), "slide_id", "patient_id")


def report_rows(path: Path, *required: str) -> list[Row]:
    """Rows of a table of reports or labels with slide_id and/or patient_id, from any of the layouts of `read_reports`."""
    if Path(path).suffix.lower() != ".json":
        rows = read_table(path, required)
        for row in (row for row in rows if "patient_filename" in row):
            row |= {"patient_id": row["patient_filename"].split(".")[0], "report": row.get("text", "")}
        return rows
    try:
        parts = json.loads(read_text(path))
        found = [(part, str(record["id"]), str(record["report"])) for part, records in parts.items() for record in records]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TableError(f"{path}: not HistGen's layout {{split: [{{id, report}}]}} ({error!r})") from error
    return [Row({"slide_id": slide, "split": part, "report": text}, f"record {n}") for n, (part, slide, text) in enumerate(found, 1)]


def read_reports(path: Path) -> list[Row]:
    """Rows slide_id, patient_id ("" where missing) and report; those without an id or a text are left out, and counted in the log.

    Reads our table (slide_id and/or patient_id, report), TCGA_Reports.csv (patient_filename, text) and HistGen's JSON
    ({split: [{id, report}]}; the split counts as a column).

    Raises TableError: none of the three, no report in it, or a slide with two patients or two reports.
    """
    rows = report_rows(path)
    columns = set(rows[0]) if rows else set()
    if not ("report" in columns and columns & {"slide_id", "patient_id"}):
        raise TableError(f"{path}: needs columns report and slide_id or patient_id; there are {', '.join(sorted(columns)) or 'none'}")
    found = [row for row in _known(path, rows) if row["report"] and (row["slide_id"] or row["patient_id"])]
    if not found:
        raise TableError(f"{path}: none of its {len(rows)} rows has a report and an id")
    one_value(path, found, "slide_id", "patient_id")
    one_value(path, found, "slide_id", "report")
    one_value(path, [row for row in found if row["slide_id"] in ("", row["patient_id"])], "patient_id", "report")
    return found


def _known(path: Path, rows: Sequence[Row]) -> list[Row]:
    """The cells slide_id, patient_id and report, "" where they are missing, in one Unicode form. What is missing is logged."""
    for key in _CELLS:
        if words := missing_words(row[key] for row in rows if key in row):
            log.info("%s: %d rows; taken as a missing %s: %s", path, len(rows), key, words)
    texts = [({key: row.get(key, "") for key in _CELLS}, row.where) for row in rows]
    return [Row({k: "" if is_missing(x) else unicodedata.normalize("NFC", x) for k, x in cells.items()}, at) for cells, at in texts]


def read_report_vectors(path: Path) -> dict[str, np.ndarray]:
    """Report vectors (n, E) float32 by slide or patient id, from HDF5 (one dataset per id) or npz.

    Raises TableError: cannot be read, an array is neither (E,) nor (n, E), widths differ, or a value is not finite.
    """
    path = Path(path)
    try:
        with np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as file:
            values = [(key, value[()]) for key, value in file.items() if not isinstance(value, h5py.Group)]
        arrays = {key: np.atleast_2d(np.asarray(value, np.float32)) for key, value in values}
    except (OSError, ValueError, TypeError, AttributeError, BadZipFile) as error:
        raise TableError(f"{path}: not an HDF5 or npz file of report vectors ({error})") from error
    widths = {value.shape[1] if value.ndim == 2 and len(value) else 0 for value in arrays.values()}
    if len(widths) != 1 or 0 in widths:
        raise TableError(f"{path}: report vectors must be (E,) or (n, E) with one width; found widths {sorted(widths - {0}) or 'none'}")
    if bad := [key for key, value in arrays.items() if not np.isfinite(value).all()]:
        raise TableError(f"{path}: {len(bad)} report vectors are not finite, first {bad[0]!r}")
    return arrays


def model_card(about: Mapping[str, Any], encoder: Any, text: str, settings: dict[str, Any]) -> str:
    """RUN/model/README.md: what the model saw, in numbers; what it is made of; how to use it. No report and no patient is named."""
    tiles, weights = "tile features made elsewhere", "random weights"
    if encoder is not None:
        tiles = "tiles of {size} px at {mpp:g} µm/px, encoded by ".format(**about["tile"]) + encoder.name if "tile" in about else tiles
        weights = f"the weights of {encoder.name}" if encoder.pretrained else weights
    saw = ", ".join(f"{about[name]:,} {name}" for name in ("slides", "patients", "reports", "tiles_seen") if name in about)
    card = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return card.format(tiles=tiles, saw=saw, text=text, weights=weights, settings=json.dumps(settings))
