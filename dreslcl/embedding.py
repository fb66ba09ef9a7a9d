"""Slides -> Embeddings, and the files that other tools read.

torch loads inside the functions that need it: `evaluation.py` reads `Embeddings` on machines that have no torch.
"""

import json
import logging
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import h5py
import numpy as np
from jaxtyping import Float32

from .errors import ConfigError, DreslclError, ModelError, SlideError, StoreError, reason
from .features import unit
from .files import fingerprint, hdf5_file, hold

if TYPE_CHECKING:
    from .bank import MemoryBank
    from .cohort import Cohort
    from .config import EncoderConfig
    from .layouts import Layout
    from .model import DRESLCL

log = logging.getLogger(__name__)

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

    def by_patient(self) -> "Embeddings":
        """One row per patient: the mean of its slides' vectors at unit norm, and of their mean features; ids are the patients.

        A patient counts as seen where pretraining saw any of its slides.
        """
        patients = sorted(set(self.patients))
        rows = [np.flatnonzero(np.array(self.patients) == p) for p in patients]
        vectors = unit(np.stack([self.vectors[r].mean(0) for r in rows]))
        mean = None if self.mean is None else np.stack([self.mean[r].mean(0) for r in rows])
        seen = {self.patients[i] for i, slide in enumerate(self.ids) if slide in self.seen}
        return Embeddings(tuple(patients), tuple(patients), vectors, mean, frozenset(seen), self.model, self.failed)


def embed(
    cohort: "Cohort",
    out: Path,
    *,
    model: Path | None = None,
    encoder: "EncoderConfig | None" = None,
    batch: int = 128,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    workers: int = 2,
    by: Literal["slide", "patient"] = "slide",
    layout: "Layout" = "trident",
    tile_features: bool = False,
    from_bank: bool = False,
    force: bool = False,
) -> Embeddings:
    """Embed every slide of a cohort from all its tiles; memory does not depend on how many there are.

    Each slide's file is written when it is done, so a killed run goes on with the next slide. A slide that cannot be read is left
    out and named, with the reason, in the result's `failed`. Under torchrun the ranks share the slides.

    Args:
        cohort: tiled slides, or files of tile features.
        out: gets embeddings.h5 and slide_features/<slide_id>.h5 (TRIDENT's slide-feature layout).
        model: folder of a trained model; without one, a slide's vector is the mean of its tile features.
        encoder: which encoder makes those tile features, where there is no model.
        batch: tiles in one pass of the encoder.
        by: slide, or patient: the normalised mean of a patient's slide vectors.
        layout: whose files to write besides, see layouts.py.
        tile_features: write each slide's tile features too, in that layout; holds those of one slide in memory.
        from_bank: encode nothing; take the rows of the run's memory bank, which lies beside the model. Rows are as old as the step at
            which training last drew the tile, so vectors differ a little from those of the final encoder.
        force: embed slides again that are done.

    Raises:
        ConfigError: tile features asked for where there are no pixels, or of a tool that reads none; a bank without a model.
        ModelError: no model there, or features of a width it does not know.
        StoreError: no bank there.
        BusyError: a training run holds the bank.
        DreslclError: no slide at all could be embedded.
    """
    from .bank import MemoryBank
    from .distributed import ranks
    from .encoder import Encoder
    from .layouts import tile_files, write_tiles, write_vectors
    from .model import DRESLCL, encode_members, pick_device

    device = pick_device()
    trained = DRESLCL.load(model).to(device) if model else None
    towers = trained.encoder if trained else Encoder.create(encoder).to(device) if encoder and cohort.work else None
    name = trained.fingerprint() if trained else towers.fingerprint() if towers else "mean of features"
    if trained and (cohort.work is None) != (trained.about["tiles"] == "features"):
        raise ModelError(f"{model}: was trained on {trained.about['tiles']}, so it cannot embed {'pixels' if cohort.work else 'features'}")
    if layout == "clam" and not tile_features:
        raise ConfigError("CLAM reads tile features, not slide vectors: add --tile-features")
    if tile_features and cohort.work is None:
        raise ConfigError("--tile-features needs the folder that `dreslcl tile` wrote: the features are already in files")
    if from_bank and not model:
        raise ConfigError("--from-bank needs --model RUN/model: the bank lies beside it")
    out = Path(out)
    files = [out / "slide_features" / f"{m.slide_id}.h5" for m in cohort.members]
    besides = [tile_files(out, layout, m.slide_id) if tile_features else [] for m in cohort.members]
    failed, marks = dict(cohort.unreadable), {}
    with ranks(device) as group, ExitStack() as held:
        if group.first:
            held.enter_context(hold(out))
        if from_bank:
            held.enter_context(hold(model.parent, shared=True))
        bank = MemoryBank.open(model.parent / "bank") if from_bank else None
        for i, member in enumerate(cohort.members):
            try:
                marks[i] = fingerprint(name, cohort.mark(i), *(["bank"] if bank else []))
            except (StoreError, OSError) as error:
                failed[member.slide_id] = reason(error)
        todo = [i for i in marks if force or _mark(files[i]) != marks[i] or not all(f.exists() for f in besides[i])]
        if len(todo) < len(marks):
            log.info("%d of %d slides are to do", len(todo), len(marks))
        group.wait()  # all ranks have seen the same files before the first is written
        todo = todo[group.rank :: group.world]
        if bank:
            stream = ((i, bank_rows(bank, cohort.members[i].slide_id, cohort.members[i].tiles)) for i in todo)
        else:
            stream = encode_members(towers, cohort, todo, batch=batch, precision=precision, workers=workers, title="embedding")
        for i, parts in stream:
            slide = cohort.members[i].slide_id
            try:
                kept = list(parts) if tile_features else parts
                vector, mean = _slide_vector(trained, kept)
                coords = cohort.coordinates(i)
            except (SlideError, StoreError, OSError, MemoryError) as error:
                failed[slide] = reason(error)
                log.warning("%s failed: %s", slide, failed[slide])
                continue
            if tile_features:
                write_tiles(out, layout, np.concatenate(kept), cohort.grid(i), towers.name if towers else name)
            _write_slide(files[i], vector, mean, coords, marks[i])
        failed = {slide: why for part in group.collect(failed) for slide, why in part.items()}  # waits for all ranks
        done = [(member, *read_slide(out, member.slide_id)) for member in cohort.members if member.slide_id not in failed]
        if not done:
            slide, why = next(iter(failed.items()))
            raise DreslclError(f"none of the {len(failed)} slides could be embedded; {slide}: {why}")
        members, vectors, means = zip(*done)
        ids, patients = tuple(m.slide_id for m in members), tuple(m.patient_id for m in members)
        seen = frozenset(trained.about["seen"]) if trained else frozenset()
        result = Embeddings(ids, patients, np.stack(vectors), np.stack(means), seen, name, failed)
        if by == "patient":
            result = result.by_patient()
        if group.first:
            write_vectors(out, layout, result.ids, result.patients, result.vectors, name)
            result.save(out / "embeddings.h5")
    return result


def bank_rows(bank: "MemoryBank", slide: str, tiles: int) -> Iterator[Float32[np.ndarray, "n D"]]:
    """The bank's rows of a slide, in parts.

    Raises:
        StoreError: the slide is not in the bank, not filled, or was tiled anew since.
    """
    if slide not in bank.slides or not bank.is_filled(slide):
        there = f"{len(bank.slides)} slides like {bank.slides[0]!r} are"
        raise StoreError(f"not in the bank {bank.folder} ({there}); embed it without --from-bank")
    if bank.tiles(slide) != tiles:
        there = f"{bank.tiles(slide)} rows for it, but it has {tiles} tiles now"
        raise StoreError(f"the bank {bank.folder} has {there}; embed it without --from-bank")
    for start in range(0, tiles, 8192):
        yield bank.gather(slide, np.arange(start, min(start + 8192, tiles))).astype(np.float32)


def _slide_vector(trained: "DRESLCL | None", parts: Iterable[np.ndarray]) -> tuple[Float32[np.ndarray, "E"], Float32[np.ndarray, "D"]]:
    """A slide's vector and the mean of its tile features; without a model the vector is that mean at unit length."""
    total, tiles = np.zeros(1), 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal total, tiles
        for part in parts:
            total, tiles = total + part.sum(axis=0, dtype=np.float64), tiles + len(part)
            yield part

    vector = trained.embed_features(counted()) if trained else None
    if vector is None:
        deque(counted(), maxlen=0)
    mean = (total / tiles).astype(np.float32)
    return unit(mean) if vector is None else vector, mean


def _write_slide(path: Path, vector: np.ndarray, mean: np.ndarray, coords: np.ndarray | None, mark: str) -> None:
    with hdf5_file(path) as file:
        file["features"] = vector
        file["mean_features"] = mean
        if coords is not None:
            file["coords"] = coords
        file.attrs["fingerprint"] = mark


def read_slide(out: Path, slide: str) -> tuple[Float32[np.ndarray, "E"], Float32[np.ndarray, "D"]]:
    """Vector and mean feature of a slide that `embed` did."""
    with h5py.File(out / "slide_features" / f"{slide}.h5", "r") as file:
        return file["features"][()], file["mean_features"][()]


def _mark(path: Path) -> str:
    """What made the slide's file; "" where there is none or it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("fingerprint", ""))
    except OSError:
        return ""


def load(folder: Path) -> "DRESLCL":
    """The model in a folder `RUN/model`, on the GPU where there is one: `.embed_slide(scan)`, `.embed_tiles(array)`, `.embed_text(str)`.

    Raises:
        ModelError: no model there, or a damaged one.
    """
    from .model import DRESLCL, pick_device

    return DRESLCL.load(folder).to(pick_device())


def report_rows(
    reports: Path | None, vectors: Path | None, model: Path | None
) -> tuple[list[dict[str, str]], Float32[np.ndarray, "rows E"]]:
    """Rows slide_id, patient_id, report for `evaluate(task="retrieval")`, and each row's vector in the model's joint space.

    Raises:
        ConfigError: no model, or neither reports nor vectors.
        TableError: the reports cannot be read.
    """
    import torch

    from .cohort import read_report_vectors, read_reports
    from .model import DRESLCL

    if model is None or (reports is None and vectors is None):
        raise ConfigError("--task retrieval needs --model RUN/model and --reports TABLE (or --report-embeddings FILE)")
    trained = DRESLCL.load(model)
    if vectors is not None:
        arrays = read_report_vectors(vectors)
        rows = [{"slide_id": k, "patient_id": k, "report": f"vectors {fingerprint(a.tolist())}"} for k, a in arrays.items()]
        means = torch.from_numpy(np.stack([array.mean(0) for array in arrays.values()]))
        if means.shape[1] != trained.text_dim:
            raise ModelError(f"{vectors}: vectors have width {means.shape[1]}, the model was trained on width {trained.text_dim}")
        with torch.inference_mode():
            return rows, trained.project_text(means).numpy()
    rows = read_reports(reports)
    return rows, trained.embed_text([row["report"] for row in rows])


def prompt_vectors(prompts: Path | None, model: Path | None) -> dict[str, Float32[np.ndarray, "P E"]]:
    """Class -> vectors of its prompts, from a JSON or TOML file {class: [prompt, ...]}, for `evaluate(task="zeroshot")`.

    Raises:
        ConfigError: no model or prompts, or a file of another layout.
    """
    from .model import DRESLCL

    if prompts is None or model is None:
        raise ConfigError("--task zeroshot needs --prompts FILE and --model RUN/model")
    try:
        text = prompts.read_text(encoding="utf-8")
        table = json.loads(text) if prompts.suffix.lower() == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{prompts}: neither JSON nor TOML ({error})") from error
    classes = table if isinstance(table, dict) else {}
    lists = {name: [value] if isinstance(value, str) else value for name, value in classes.items()}
    if not lists or any(not isinstance(v, list) or not v or not all(isinstance(p, str) for p in v) for v in lists.values()):
        raise ConfigError(f"{prompts}: should hold class = [prompt, ...] for each class")
    trained = DRESLCL.load(model)
    return {name: trained.embed_text(list(texts)) for name, texts in lists.items()}
