"""Slides -> Embeddings, and the files that other tools read.

torch loads inside the functions that need it: `evaluation.py` reads `Embeddings` on machines that have no torch.
"""

import json
import logging
import tomllib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import h5py
import numpy as np
from jaxtyping import Float32

from .common import ConfigError, DreslclError, ModelError, SlideError, StoreError, fingerprint, hdf5_file, hold, reason
from .formats import Embeddings, unit

if TYPE_CHECKING:
    from .bank import MemoryBank
    from .cohort import Cohort
    from .config import EncoderConfig
    from .formats import Layout
    from .model import DRESLCL

log = logging.getLogger(__name__)

VERSION = 1


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
    from .formats import tile_files, write_tiles, write_vectors
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
            write_vectors(out, layout, result)
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

    from .formats import read_report_vectors, read_reports
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
