"""What a run will take, before it starts: memory, disk, and time measured on a few real tiles."""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .bank import bank_bytes
from .cohort import Cohort, TileReader, draw_tiles
from .config import RunConfig
from .model import DRESLCL, autocast, inference

TEXTS = 8


@dataclass(frozen=True)
class Forecast:
    """Memory and disk in GB, time in seconds: estimates, for one rank."""

    steps_per_epoch: int
    bank_gb: float
    free_disk_gb: float
    tile_gb: float
    """What one micro-batch of tiles keeps for its gradient."""
    memory_gb: float
    """All of it on the device: weights, gradients, optimiser, one micro-batch; without a GPU also the pixels."""
    pixels_gb: float
    """Tiles read ahead and the cache of decoded tiles."""
    free_memory_gb: float
    read_s: float
    """To read a tile, on one thread."""
    tile_s: float
    """Forward and backward of a tile."""
    fill_s: float
    epoch_s: float

    def lines(self) -> list[str]:
        """For the terminal."""
        lines = [
            f"{self.steps_per_epoch} steps per epoch; the bank takes {self.bank_gb:.3g} GB of {self.free_disk_gb:,.0f} GB free on its disk",
            f"memory: about {self.memory_gb:.3g} GB of {self.free_memory_gb:,.0f} GB ({self.tile_gb:.3g} GB for a micro-batch of tiles); "
            f"{self.pixels_gb:.3g} GB for decoded tiles",
            f"time, an estimate: {clock(self.epoch_s)} per epoch",
        ]
        if self.fill_s:
            lines[-1] += f", {clock(self.fill_s)} before to fill the bank"
        if self.tile_s:
            speed = f"{1 / self.read_s:,.0f} tiles/s on each reading thread, {1 / self.tile_s:,.0f} tiles/s forward and backward"
            lines[-1] += f" (measured: {speed})"
        return lines

    def warnings(self) -> list[str]:
        """What will not fit."""
        found = []
        if self.bank_gb > self.free_disk_gb:
            found.append(f"the bank needs {self.bank_gb:.3g} GB, its disk has {self.free_disk_gb:.3g} GB free: choose another --out")
        if self.memory_gb > self.free_memory_gb:
            found.append(f"{self.memory_gb:.3g} GB of memory are needed, {self.free_memory_gb:.3g} are there: lower --tile-batch")
        return found


def clock(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def forecast(
    model: DRESLCL,
    cohort: Cohort,
    held_out: Cohort,
    reader: TileReader | None,
    pieces: Sequence[Sequence[str]] | Sequence[Tensor],
    config: RunConfig,
    out: Path,
    *,
    steps: int,
    ranks: int,
) -> Forecast:
    """Measure reading, encoding and the heads on a few tiles and texts; nothing is written, no weight changes.

    Args:
        reader: of the cohort's tiles; None where there are no pixels.
        pieces: of each report.
        steps: per epoch.
        ranks: processes that share the work.
    """
    train, device = config.train, model.text_centre.device
    sizes = [m.tiles for m in cohort.members]
    batch = -(-train.batch // ranks)  # slides in a step of this rank
    drawn = batch * min(train.tiles, max(sizes))  # tiles in a step of this rank
    count = min(train.tile_batch, drawn)
    training = model.training
    model.train()

    read_s = forward_s = both_s = tile_bytes = pixels = 0.0
    encoder = model.encoder
    if reader is not None and encoder is not None:
        some = range(0, len(cohort), max(1, len(cohort) // 8))
        rng = np.random.default_rng(0)
        start = time.perf_counter()
        tiles = np.concatenate([reader.read(m, draw_tiles(sizes[m], 2, rng)) for m in some])
        read_s = (time.perf_counter() - start) / len(tiles)
        pixels = sum(sizes) * tiles[0].nbytes
        pixels = (pixels if pixels <= train.cache_gb * 1e9 else 0) + 2 * drawn * tiles[0].nbytes  # a step's, and the next one's
        on_device = torch.from_numpy(np.resize(tiles, (count if device.type == "cuda" else min(count, 8), *tiles.shape[1:]))).to(device)

        def encode() -> Tensor:
            with autocast(device, train.precision):
                return encoder.encode_tiles(on_device)

        if _learns(encoder.tower_parameters()):
            tile_bytes = _kept_bytes(encode, encoder) / len(on_device) * count
            both_s = _seconds(lambda: encode().sum().backward(), device) / len(on_device)
        with inference(encoder):
            forward_s = _seconds(encode, device) / len(on_device)

    text_s = 0.0
    if encoder is not None and _learns(encoder.text_parameters()):
        texts = [text for report in pieces[:TEXTS] for text in report][:TEXTS]
        with autocast(device, train.precision):
            text_s = _seconds(lambda: encoder.encode_texts(texts).sum().backward(), device) / len(texts)
        each = sum(map(len, pieces)) / len(pieces) * train.report_part
        text_s *= batch * min(each, train.report_windows or math.inf)
    K = config.model.codewords
    sums = torch.randn(batch, K, model.dim, device=device)
    heads_s = _seconds(lambda: model.aggregator(sums, sums.new_ones(batch, K)).sum().backward(), device)
    model.zero_grad(set_to_none=True)
    model.train(training)

    bank = bank_bytes({m.slide_id: m.tiles for m in cohort.members}, model.dim, K)
    weights = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())  # learning: gradient and AdamW's two moments
    cuda = device.type == "cuda"
    memory = weights + tile_bytes + (0 if cuda else pixels)
    there = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    workers = min(train.workers, os.cpu_count() or 1)
    together = max if cuda else lambda read, compute: read + compute  # without a GPU readers and encoder share the cores
    fresh = sum(min(train.tiles, n) for n in sizes)
    extra = sum(min(train.refresh, n) for n in sizes)
    again = drawn > train.tile_batch  # gradient caching encodes all but the last micro-batch twice
    live_s = fresh * (both_s + again * forward_s) + extra * forward_s if both_s else 0.0
    epoch_s = together((fresh + extra) * read_s / workers, live_s) if both_s else 0.0
    held_out_tiles, folder = sum(m.tiles for m in held_out.members), next(p for p in (out, *out.absolute().parents) if p.exists())
    each_s = together(read_s / workers, forward_s)
    return Forecast(
        steps,
        bank / 1e9,
        shutil.disk_usage(folder).free / 1e9,
        tile_bytes / 1e9,
        memory / 1e9,
        pixels / 1e9,
        there / 1e9,
        read_s,
        both_s,
        sum(sizes) * each_s / ranks,
        (epoch_s + held_out_tiles * each_s) / ranks + steps * (text_s + heads_s),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The second of two runs: the first warms up."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def _learns(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.requires_grad for p in parameters)


def _kept_bytes(work: Callable[[], Tensor], module: nn.Module) -> int:
    """A rough upper bound of what a computation keeps in memory for its gradient, the module's weights left out."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = work()  # held, so that no storage is given back and counted as another one
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    del result
    return sum(size for pointer, size in kept.items() if pointer not in weights)
