"""Slides -> Embeddings: every tile of every slide through the tile encoder, one vector per slide, and the files other tools read."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float, Float32

from .cohort import Cohort, TileReader, draw_tiles, prefetch
from .common import ConfigError, DreslclError, ModelError, SlideError, StoreError, counting, fingerprint, hdf5_file, hold, reason, track
from .config import EncoderConfig, TrainConfig
from .distributed import ranks
from .encoder import Encoder, autocast, inference, pick_device
from .formats import (
    Embeddings,
    Layout,
    read_features,
    tile_files,
    unit,
    write_tiles,
    write_vectors,
)
from .model import DRESLCL

log = logging.getLogger(__name__)

CHUNK = 512  # tiles read and encoded at a time


def encode_slides(
    encoder: Encoder | None,
    cohort: Cohort,
    members: Sequence[int],
    settings: TrainConfig,
    title: str,
    reader: TileReader | None = None,
    *,
    tiles: int | None = None,
) -> Iterator[tuple[int, Iterator[Float[np.ndarray, "n D"]]]]:
    """Features of the tiles of some slides in turn: (slide, its parts in row order). Take each slide's parts before the next.

    Tiles are read ahead of the encoder, across slides; a cohort of features is read from its files. A slide that cannot be read
    raises its error where its parts are taken; the slides after it come all the same.

    Args:
        settings: its tile_batch, precision and workers count.
        tiles: of each slide only so many, always the same ones.
    """

    def chosen(member: int) -> np.ndarray:
        M = cohort.members[member].tiles
        return np.arange(M) if tiles is None else draw_tiles(M, tiles, np.random.default_rng(member))

    if cohort.work is None:
        for m in track(members, title, "slides"):
            yield m, (read_features(cohort.members[i].source)[chosen(i)] for i in [m])
    elif len(members):
        assert encoder is not None, "pixels need a tile encoder"
        reader = reader or TileReader(cohort, workers=settings.workers)
        jobs = ((m, part) for m in members for part in np.split(chosen(m), range(CHUNK, len(chosen(m)), CHUNK)))  # one after another
        bad: dict[int, Exception] = {}
        found = _encode_ahead(encoder, reader, jobs, settings, bad)
        total = sum(min(cohort.members[m].tiles, tiles or cohort.members[m].tiles) for m in members)
        with counting(title, total, "tiles") as count:
            for member, group in groupby(found, key=itemgetter(0)):
                yield member, _checked(group, bad, count)
                reader.release(member)


def _encode_ahead(
    encoder: Encoder, reader: TileReader, jobs: Iterable[tuple[int, np.ndarray]], settings: TrainConfig, bad: dict[int, Exception]
) -> Iterator[tuple[int, np.ndarray | int]]:
    """(slide, features of some of its tiles), or the number of tiles of a slide that is in `bad`; pixels are read and copied ahead."""
    device = encoder.mean.device

    def read(job: tuple[int, np.ndarray]) -> tuple[int, torch.Tensor | int]:
        member, index = job
        try:
            if member not in bad:
                pixels = torch.from_numpy(reader.read(member, index))
                return member, pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels
        except (DreslclError, OSError, MemoryError) as error:
            bad[member] = error
        return member, len(index)

    for member, pixels in prefetch(read, jobs, reader.workers, ahead=2 * reader.workers):
        if isinstance(pixels, int):
            yield member, pixels
            continue
        with inference(encoder), autocast(device, settings.precision):
            features = torch.cat([encoder.encode_tiles(batch) for batch in pixels.split(settings.tile_batch)])
        yield member, features.cpu().numpy()


def _checked(
    group: Iterable[tuple[int, np.ndarray | int]], bad: dict[int, Exception], count: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """The parts of one slide; raises what was wrong with it."""
    for member, features in group:
        count(features if isinstance(features, int) else len(features))
        if member in bad:
            raise bad[member]
        yield features


def embed(
    cohort: Cohort,
    out: Path,
    *,
    model: Path | None = None,
    encoder: EncoderConfig | None = None,
    settings: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    by: Literal["slide", "patient"] = "slide",
    layout: Layout = "trident",
    tile_features: bool = False,
    force: bool = False,
) -> Embeddings:
    """Embed every slide of a cohort from all its tiles; memory does not depend on how many there are.

    Each slide's file is written when it is done, so a killed run goes on with the next slide. A slide that cannot be read is left
    out and named, with the reason, in the result's `failed`. Under torchrun the ranks share the slides.

    Args:
        out: gets embeddings.h5 and slide_features/<slide_id>.h5 (TRIDENT's slide-feature layout).
        model: folder of a trained model; without one, a slide's vector is the mean of its tile features.
        encoder: which encoder makes those tile features, where there is no model.
        settings: its tile_batch, precision and workers count.
        by: slide, or patient: the normalised mean of a patient's slide vectors.
        layout: whose files to write besides, see formats.py.
        tile_features: write each slide's tile features too, in that layout; holds those of one slide in memory.

    Raises:
        ConfigError: tile features asked for where there are no pixels, or of a tool that reads none.
        ModelError: no model there, or one that does not fit the cohort's tiles.
        DreslclError: no slide at all could be embedded.
    """
    device, out = pick_device(), Path(out)
    trained = load(model) if model else None
    towers = trained.encoder if trained else Encoder.create(encoder).to(device) if encoder and cohort.work else None
    if trained:
        check_tiles(trained, cohort)
    check_files(layout, tile_features, cohort)
    name = trained.fingerprint() if trained else towers.fingerprint() if towers else "mean of features"
    with ranks(device) as group, hold(out) if group.first else nullcontext():
        todo, marks, failed = _plan(cohort, out, name, layout if tile_features else None, force)
        group.wait()  # all ranks have seen the same files before the first is written
        for member, parts in encode_slides(towers, cohort, todo[group.rank :: group.world], settings, "embedding"):
            slide = cohort.members[member].slide_id
            try:
                kept = list(parts) if tile_features else parts
                vector, mean, coords = *_slide_vector(trained, kept), cohort.coordinates(member)
            except (SlideError, StoreError, OSError, MemoryError) as error:
                failed[slide] = reason(error)
                log.warning("%s failed: %s", slide, failed[slide])
                continue
            if tile_features:
                write_tiles(out, layout, np.concatenate(kept), cohort.grid(member), towers.name if towers else name)
            _write_slide(slide_file(out, slide), vector, mean, coords, marks[member])
        failed = {slide: why for part in group.collect(failed) for slide, why in part.items()}  # waits for all ranks
        result = _collect(cohort, out, failed, trained, name, str(model or ""))
        result = result.by_patient() if by == "patient" else result
        if group.first:
            write_vectors(out, layout, result)
            result.save(out / "embeddings.h5")
    return result


def check_files(layout: Layout, tile_features: bool, cohort: Cohort) -> None:
    """Raise ConfigError for files that cannot be written."""
    if layout == "clam" and not tile_features:
        raise ConfigError("CLAM reads tile features, not slide vectors: add --tile-features")
    if tile_features and cohort.work is None:
        raise ConfigError("--tile-features needs the folder that `dreslcl tile` wrote: the features are already in files")


def check_tiles(trained: DRESLCL, cohort: Cohort) -> None:
    """Refuse tiles of another kind, size or resolution than the model was trained on.

    Raises:
        ModelError: it says both.
    """
    kind = "pixels" if cohort.work else "features"
    if trained.about["tiles"] != kind:
        raise ModelError(f"the model was trained on {trained.about['tiles']}, so it cannot embed {kind}")
    size, mpp = trained.about.get("size"), trained.about.get("mpp")
    for member in range(len(cohort) if kind == "pixels" else 0):
        try:
            grid = cohort.grid(member)
        except StoreError:
            continue  # named in its turn
        if grid.size != size or abs(grid.mpp / mpp - 1) > 0.02:
            there = f"tiles of {grid.size} px at {grid.mpp:g} µm/px"
            raise ModelError(
                f"{cohort.work}: has {there}, the model was trained on {size} px at {mpp:g}: tile with --size {size} --mpp {mpp:g}"
            )
        return


def _plan(cohort: Cohort, out: Path, name: str, layout: Layout | None, force: bool) -> tuple[list[int], dict[int, str], dict[str, str]]:
    """The slides to do, what each one's file is made of, and the slides that cannot be done."""
    failed, marks, todo = dict(cohort.unreadable), {}, []
    for i, member in enumerate(cohort.members):
        try:
            marks[i] = fingerprint(name, cohort.mark(i))
        except (StoreError, OSError) as error:
            failed[member.slide_id] = reason(error)
            continue
        besides = tile_files(out, layout, member.slide_id) if layout else []
        if force or _mark(slide_file(out, member.slide_id)) != marks[i] or not all(f.exists() for f in besides):
            todo.append(i)
    if len(todo) < len(marks):
        log.info("%d of %d slides are to do", len(todo), len(marks))
    return todo, marks, failed


def _collect(cohort: Cohort, out: Path, failed: dict[str, str], trained: DRESLCL | None, name: str, folder: str) -> Embeddings:
    """The vectors of all slides that are done."""
    done = [(member, *read_slide(out, member.slide_id)) for member in cohort.members if member.slide_id not in failed]
    if not done:
        slide, why = next(iter(failed.items()))
        raise DreslclError(f"none of the {len(failed)} slides could be embedded; {slide}: {why}")
    members, vectors, means = zip(*done)
    ids, patients = tuple(m.slide_id for m in members), tuple(m.patient_id for m in members)
    about = trained.about if trained else {}
    seen, selected = (frozenset(about.get(kind, ())) for kind in ("seen", "selected"))
    return Embeddings(ids, patients, np.stack(vectors), np.stack(means), seen, name, failed, folder, selected, about.get("salt", ""))


def _slide_vector(trained: DRESLCL | None, parts: Iterable[np.ndarray]) -> tuple[Float32[np.ndarray, "E"], Float32[np.ndarray, "D"]]:
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


def slide_file(out: Path, slide: str) -> Path:
    """Where the vector of a slide is kept."""
    return out / "slide_features" / f"{slide}.h5"


def _write_slide(path: Path, vector: np.ndarray, mean: np.ndarray, coords: np.ndarray | None, mark: str) -> None:
    with hdf5_file(path) as file:
        file["features"] = vector
        file["mean_features"] = mean
        if coords is not None:
            file["coords"] = coords
        file.attrs["fingerprint"] = mark


def read_slide(out: Path, slide: str) -> tuple[Float32[np.ndarray, "E"], Float32[np.ndarray, "D"]]:
    """Vector and mean feature of a slide that `embed` did."""
    with h5py.File(slide_file(out, slide), "r") as file:
        return file["features"][()], file["mean_features"][()]


def _mark(path: Path) -> str:
    """What made the slide's file; "" where there is none or it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return str(file.attrs.get("fingerprint", ""))
    except OSError:
        return ""


def load(folder: Path) -> DRESLCL:
    """The model in a folder `RUN/model`, on the GPU where there is one: `.embed_slide(scan)`, `.embed_tiles(array)`, `.embed_text(str)`.

    Raises:
        ModelError: no model there, or a damaged one.
    """
    return DRESLCL.load(folder).to(pick_device())
