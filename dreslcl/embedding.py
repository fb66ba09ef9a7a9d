"""Slides -> Embeddings, and the files that other tools read.

torch loads inside the functions that need it: `evaluation.py` reads `Embeddings` on machines that have no torch.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float32

from .errors import StoreError
from .files import atomic

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

    def __post_init__(self):
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
        with atomic(path) as part, h5py.File(part, "w") as file:
            file.attrs["version"] = VERSION
            file.attrs["model"] = self.model
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
                model = str(file.attrs.get("model", ""))
        except (OSError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not an embeddings file of dreslcl ({error})") from error
        return cls(texts["slide_id"], texts["patient_id"], vectors, mean, frozenset(texts["seen"]), model)
