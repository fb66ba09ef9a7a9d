"""Slides -> Embeddings: every tile of every slide through the tile encoder, one vector per slide, and the files other tools read."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import torch
from jaxtyping import Float, UInt8

from .cohort import Cohort, TileReader, draw_tiles
from .common import (
    ConfigError,
    DreslclError,
    ModelError,
    SlideError,
    StoreError,
    counting,
    fingerprint,
    hdf5_file,
    hold,
    prefetch,
    reason,
    track,
)
from .config import EncoderConfig, TrainConfig
from .distributed import ranks
from .encoder import Encoder, autocast, inference, pick_device
from .formats import Embeddings, Layout, read_features, tile_files, unit, write_tiles, write_vectors
from .model import DRESLCL, Bag

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
        return
    assert encoder is not None, "pixels need a tile encoder"
    device, reader = encoder.mean.device, reader or TileReader(cohort, workers=settings.workers)
    bad: dict[int, Exception] = {}
    spare: list[np.ndarray] = []  # pixels that were encoded: reading into fresh memory takes a fifth longer

    def read(job: tuple[int, np.ndarray]) -> tuple[int, torch.Tensor | Exception, np.ndarray | None]:
        (member, index), room = job, None
        try:
            if member not in bad:  # of a bad slide nothing more is read
                room = _room(spare, reader.grid(member).size)
                pixels = torch.from_numpy(reader.read(member, index, room[: len(index)]))
                return member, pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels, room
        except (DreslclError, OSError, MemoryError) as error:
            bad[member] = error
        return member, bad[member], room

    def encoded(group: Iterable[tuple[int, torch.Tensor | Exception, np.ndarray | None]]) -> Iterator[np.ndarray]:
        for _, pixels, room in group:
            if isinstance(pixels, Exception):
                raise pixels
            with inference(encoder), autocast(device, settings.precision):
                features = torch.cat([encoder.encode_tiles(batch) for batch in pixels.split(settings.tile_batch)])
            count(len(features))
            spare.append(room)
            yield features.cpu().numpy()

    jobs = ((m, part) for m in members for part in np.split(chosen(m), range(CHUNK, len(chosen(m)), CHUNK)))  # one after another
    total = sum(min(cohort.members[m].tiles, tiles or cohort.members[m].tiles) for m in members)
    with counting(title, total, "tiles") as count:
        for member, group in groupby(prefetch(read, jobs, reader.workers, ahead=2 * reader.workers), key=itemgetter(0)):
            yield member, encoded(group)
            reader.release(member)


def _room(spare: list[np.ndarray], size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Memory for a chunk of tiles, used before where there is some that fits."""
    with suppress(IndexError):  # no `if`: other threads take from it too
        if (room := spare.pop()).shape[1] == size:
            return room
    return np.empty((CHUNK, size, size, 3), np.uint8)


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
        by: slide, or patient: one vector for all tiles of a patient's slides.
        layout: whose files to write besides, see formats.py.
        tile_features: write each slide's tile features too, in that layout; holds those of one slide in memory.

    Raises:
        ConfigError: tile features asked for where there are no pixels, or of a tool that reads none.
        ModelError: no model there, or one that does not fit the cohort's tiles.
        DreslclError: no slide at all could be embedded.
    """
    device, out, trained = pick_device(), Path(out), load(model) if model else None
    towers = trained.encoder if trained else Encoder.create(encoder).to(device) if encoder and cohort.work else None
    if trained:
        check_tiles(trained, cohort)
    if layout == "clam" and not tile_features:
        raise ConfigError("CLAM reads tile features, not slide vectors: add --tile-features")
    if tile_features and cohort.work is None:
        raise ConfigError("--tile-features needs the folder that `dreslcl tile` wrote: the features are already in files")
    name = trained.fingerprint() if trained else towers.fingerprint() if towers else "mean of features"
    with ranks(device) as group, hold(out) if group.first else nullcontext():
        todo, marks, failed = _plan(cohort, out, name, layout if tile_features else None, force)
        group.wait()  # all ranks have seen the same files before the first is written
        for member, parts in encode_slides(towers, cohort, todo[group.rank :: group.world], settings, "embedding"):
            slide = cohort.members[member].slide_id
            with noting(failed, slide):
                kept = list(parts) if tile_features else parts
                arrays, coords = _slide_arrays(trained, kept), cohort.coordinates(member)
                if tile_features:
                    write_tiles(out, layout, np.concatenate(kept), cohort.grid(member), towers.name)
                with hdf5_file(slide_file(out, slide)) as file:
                    file.attrs["fingerprint"] = marks[member]
                    for kind, array in (arrays if coords is None else arrays | {"coords": coords}).items():
                        file[kind] = array
        failed = {slide: why for part in group.collect(failed) for slide, why in part.items()}  # waits for all ranks
        result = _collect(cohort, out, failed, trained, name, str(model or ""), by)
        if group.first:
            write_vectors(out, layout, result)
            result.save(out / "embeddings.h5")
    return result


@contextmanager
def noting(failed: dict[str, str], slide: str) -> Iterator[None]:
    """Note why a slide cannot be done, and go on with the next; faults of the disk that is written to stop the run."""
    try:
        yield
    except (SlideError, StoreError, OSError, MemoryError) as error:
        failed[slide] = reason(error)
        log.warning("%s failed: %s", slide, failed[slide])


def check_tiles(trained: DRESLCL, cohort: Cohort) -> None:
    """Refuse tiles of another kind, size or resolution than the model was trained on. Raises ModelError: it says both."""
    kind = "pixels" if cohort.work else "features"
    if trained.about["tiles"] != kind:
        raise ModelError(f"the model was trained on {trained.about['tiles']}, so it cannot embed {kind}")
    size, mpp = (trained.about.get("tile", {}).get(name) for name in ("size", "mpp"))
    for member in range(len(cohort) if kind == "pixels" else 0):
        with suppress(StoreError):  # named in its turn
            grid = cohort.grid(member)
            if grid.size == size and abs(grid.mpp / mpp - 1) <= 0.02:
                return
            there, wanted = f"tiles of {grid.size} px at {grid.mpp:g} µm/px", f"{size} px at {mpp:g}"
            told = f"has {there}, the model was trained on {wanted}: tile with --size {size} --mpp {mpp:g}"
            raise ModelError(f"{cohort.work}: {told}")


def _plan(cohort: Cohort, out: Path, name: str, layout: Layout | None, force: bool) -> tuple[list[int], dict[int, str], dict[str, str]]:
    """The slides to do, what each one's file is made of, and the slides that cannot be done."""
    failed, marks, todo = dict(cohort.unreadable), {}, []
    for i, member in enumerate(cohort.members):
        with noting(failed, member.slide_id):
            marks[i] = fingerprint(name, cohort.mark(i))
            besides = tile_files(out, layout, member.slide_id) if layout else []
            if force or _mark(slide_file(out, member.slide_id)) != marks[i] or not all(f.exists() for f in besides):
                todo.append(i)
    if len(todo) < len(marks):
        log.info("%d of %d slides are to do", len(todo), len(marks))
    return todo, marks, failed


@torch.inference_mode()
def _collect(cohort: Cohort, out: Path, failed: dict[str, str], trained: DRESLCL | None, name: str, folder: str, by: str) -> Embeddings:
    """The vectors of all slides that are done.

    Of a patient: that of its slides' sums added, as if all its tiles lay on one slide; of an aggregator without sums their mean.
    """
    members, vectors, means = [member for member in cohort.members if member.slide_id not in failed], [], []
    bags: dict[str, Bag] = {}
    if not members:
        slide, why = next(iter(failed.items()))
        raise DreslclError(f"none of the {len(failed)} slides could be embedded; {slide}: {why}")
    for member in members:
        with h5py.File(slide_file(out, member.slide_id), "r") as file:
            vectors.append(file["features"][()])
            means.append(file["mean_features"][()])
            if by == "patient" and "sums" in file:
                bag = Bag(*(torch.from_numpy(file[kind][()])[None].to(trained.device) for kind in ("sums", "counts")))
                bags[member.patient_id] = bags[member.patient_id] + bag if member.patient_id in bags else bag
    ids, patients = tuple(m.slide_id for m in members), tuple(m.patient_id for m in members)
    about = trained.about if trained else {}
    seen, selected = (frozenset(about.get(kind, ())) for kind in ("seen", "selected"))
    salt = about.get("salt", "")
    result = Embeddings(ids, patients, np.stack(vectors), np.stack(means), seen, name, failed, folder, selected, salt)
    result = result.by_patient() if by == "patient" else result
    return replace(result, vectors=np.concatenate([trained.aggregator(bags[p]).cpu().numpy() for p in result.ids])) if bags else result


@torch.inference_mode()
def _slide_arrays(trained: DRESLCL | None, parts: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """What a slide's file holds: its vector, the mean of its tile features, and the sums that `_collect` adds.

    Without a model the vector is that mean at unit length.
    """
    total, tiles = np.zeros(1), 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal total, tiles
        for part in parts:
            total, tiles = total + part.sum(axis=0, dtype=np.float64), tiles + len(part)
            yield part

    bag = trained.bag_of(counted()) if trained else deque(counted(), maxlen=0)
    mean = (total / tiles).astype(np.float32)
    if trained is None:
        return {"features": unit(mean), "mean_features": mean}
    sums = {} if trained.aggregator.needs_rows else {"sums": bag.sums[0].cpu().numpy(), "counts": bag.counts[0].cpu().numpy()}
    return {"features": trained.aggregator(bag)[0].cpu().numpy(), "mean_features": mean} | sums


def slide_file(out: Path, slide: str) -> Path:
    """Where the vector of a slide is kept."""
    return out / "slide_features" / f"{slide}.h5"


def _mark(path: Path) -> str:
    """What made the slide's file; "" where there is none or it cannot be read."""
    with suppress(OSError), h5py.File(path, "r") as file:
        return str(file.attrs.get("fingerprint", ""))
    return ""


def load(folder: Path) -> DRESLCL:
    """The model in a folder `RUN/model`, on the GPU where there is one: `.embed_slide(scan)`, `.embed_tiles(array)`, `.embed_text(str)`.

    Raises ModelError: no model there, or a damaged one.
    """
    return DRESLCL.load(folder).to(pick_device())
