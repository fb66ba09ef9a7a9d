"""Pretraining: fill the bank, fit the codebook, then the loop of design steps 1-5, one line per epoch.

One step. Draw B slides of distinct patients and T tiles of each; encode the B·T tiles with gradient; take each slide's
residuals over *all* its M tiles, T fresh and the rest from the bank; aggregate, contrast with the reports, back-propagate;
write the fresh features back. Beyond `tile_batch` tiles the gradient is cached (Gao et al. 2021, arXiv 2101.06983): features
without graph, loss gradient with respect to the features, then each micro-batch again with graph. Same gradients, flat memory.
"""

import io
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from .bank import MemoryBank, bank_bytes
from .cohort import Cohort, TileReader, deal_patients, draw_tiles, plan_epoch, window_tiles
from .common import ConfigError, DreslclError, StoreError, fingerprint, hold, progress, write_bytes
from .config import RunConfig
from .distributed import Ranks, ranks
from .embedding import bank_rows
from .encoder import Augmentation, Encoder
from .evaluation import first_hits, retrieval_metrics
from .formats import read_features
from .model import DRESLCL, autocast, contrastive_loss, encode_members, inference, pick_device
from .report import Journal, codebook_atlas, retrieval_examples, run_page
from .residual import Codebook, refreshed_residuals, stale_residuals
from .tiles import hilbert_order

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


log = logging.getLogger(__name__)

CODEBOOK_ROWS = 20_000
RETRIEVAL_SLIDES = 200  # of the training slides, where none are held out
VIEW_ROWS = 1024  # most rows of a slide that make a view, or that `stale_dropout` leaves, where the encoder rests
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Visit:
    """One slide in one step: its T drawn tiles and the R extra ones to refresh."""

    member: int
    tiles: Int64[np.ndarray, "T"]
    extra: Int64[np.ndarray, "R"]


class Trainer:
    """State of one pretraining run on one rank. `pretrain` is the way in."""

    def __init__(self, cohort: Cohort, held_out: Cohort, config: RunConfig, out: Path, group: Ranks, *, shards: int | None = None):
        self.cohort, self.held_out, self.config, self.out, self.group = cohort, held_out, config, out, group
        self.train = train = config.train
        self.shards = shards or group.world
        if train.batch % self.shards:
            raise ConfigError(f"batch must be a multiple of the {self.shards} ranks, got {train.batch}")
        self.device = pick_device()
        self.epoch = self.step = 0
        self.pixels = cohort.work is not None
        vectors = not isinstance(cohort.reports[0], str)
        self.encoder = Encoder.create(config.encoder, seed=train.seed) if self.pixels or not vectors else None
        if self.encoder is not None:
            self.encoder.to(self.device)
        self.tune_text = not vectors and (
            config.encoder.text == "tune" or (config.encoder.text == "auto" and self.encoder is not None and not self.encoder.pretrained)
        )
        if not vectors and not self.tune_text and self.encoder is not None and not self.encoder.pretrained:
            log.warning(
                "the frozen text tower has random weights, so reports say little: use --text tune, --pretrained or --report-embeddings"
            )
        if self.live and train.bank and train.stale_dropout and not self.encoder.pretrained:
            log.warning(
                "the tile encoder has random weights, from which it does not begin to learn while bank rows are left out: "
                "use --stale-dropout 0 (--preset tiny has it), or --pretrained"
            )
        self.reader = TileReader(cohort, workers=train.workers, cache_bytes=int(train.cache_gb * 1e9)) if self.pixels else None
        dim = self.encoder.dim if self.pixels and self.encoder else read_features(cohort.members[0].source).shape[1]
        text_dim = cohort.reports[0].shape[1] if vectors else self.encoder.text_dim
        about = {
            "text": "vectors" if vectors else "tower",
            "tiles": "pixels" if self.pixels else "features",
            "seen": [m.slide_id for m in cohort.members],
            "mpp": self.reader.grid(0).mpp if self.reader else None,
            "size": self.reader.grid(0).size if self.reader else None,
        }
        torch.manual_seed(train.seed)
        self.model = DRESLCL(
            self.encoder,
            config.model,
            dim=dim,
            text_dim=text_dim,
            frozen_text=not self.tune_text,
            temperature=train.temperature,
            about=about,
        ).to(self.device)
        if self.encoder is not None:
            self.encoder.set_trainable(config.encoder.tune if self.pixels else "none", text=self.tune_text)
            self.encoder.set_execution(checkpointing=train.checkpointing, compile=train.compile)
        self.encoder_name = self.encoder.fingerprint() if self.pixels and self.encoder else f"features of width {dim}"
        self.grids_name = fingerprint([m.slide_id for m in cohort.members], [cohort.mark(i) for i in range(len(cohort))])
        self.shard_of = deal_patients(cohort.members, self.shards)
        self.mine = [i for i, shard in enumerate(self.shard_of) if shard % group.world == group.rank]
        self.visits = np.zeros(len(cohort), np.int64)
        self.rows: list[dict[str, float]] = []
        self.best, self.waited = -math.inf, 0
        self.notes = list(cohort.notes)
        self.pieces = self._split_reports()
        self.journal = Journal(out)
        self.orders: dict[int, np.ndarray] = {}

    # before the loop

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch: B slides at most, alike on all ranks, none empty."""
        sizes = np.bincount(self.shard_of, minlength=self.shards)
        return int(min(-(-sizes.max() * self.shards // self.train.batch), sizes.min()))

    def _split_reports(self) -> list[list[str]] | list[Tensor]:
        """Pieces of each report: texts, or vectors (n, X) made elsewhere."""
        reports = self.cohort.reports
        if not isinstance(reports[0], str):
            return [torch.from_numpy(r) for r in reports]
        windows = [self.encoder.split_report(r) for r in reports]
        longer = sum(len(w) > 1 for w in windows)
        self.notes.append(f"{longer} of {len(reports)} reports are longer than the text tower's {self.encoder.context} tokens")
        return windows if self.train.report_part == 1 else [self.encoder.split_report(r, sentences=True) for r in reports]

    def announce(self) -> None:
        """Say what the run will take, on the first rank."""
        if not self.group.first:
            return
        steps, world = self.steps_per_epoch, self.group.world
        about = (self.model, self.cohort, self.held_out, self.reader, self.pieces)
        expected = forecast(*about, self.config, self.out, steps=steps, ranks=world)
        for line in [*self.notes[len(self.cohort.notes) :], *expected.lines()]:
            log.info(line)
        for line in expected.warnings():
            log.warning(line)

    def encode_reports(self) -> None:
        """Where the text tower does not learn: the vectors of each report's pieces, once for the whole run, and their centre."""
        if self.tune_text:
            return
        if not isinstance(self.pieces[0], Tensor):
            texts, self.pieces = self.pieces, []
            with inference(self.encoder), autocast(self.device, self.train.precision), progress("reading", len(texts), "reports") as bar:
                for pieces in texts:
                    self.pieces.append(self.encoder.encode_texts(pieces).clone())
                    bar.advance(bar.task_ids[0])
        self.pieces = [p.clone().to(self.device) for p in self.pieces]  # clones of inference tensors may enter a graph
        self.model.text_centre.copy_(torch.stack([p.mean(0) for p in self.pieces]).mean(0))

    def make_bank(self) -> None:
        """Open the run's bank or make it; fill what is missing; fit the codebook where there is none."""
        spans = {m.slide_id: m.tiles for m in self.cohort.members}
        folder, K = self.out / "bank", self.config.model.codewords
        checks = {"encoder": self.encoder_name, "grids": self.grids_name, "dim": self.model.dim, "codewords": K}
        if self.group.first:
            homes = dict(zip(spans, self.shard_of))
            if not (folder / "bank.json").exists():
                MemoryBank.create(folder, spans, self.model.dim, K, encoder=self.encoder_name, grids=self.grids_name, shards=homes)
            bank = MemoryBank.open(folder, **checks)
            if any(bank.shard_of(slide) != home for slide, home in homes.items()):
                MemoryBank.reshard(folder, homes)
        self.group.wait()
        own = [s for s in range(self.shards) if s % self.group.world == self.group.rank]
        self.bank = MemoryBank.open(folder, **checks, shards=own)
        self._fill([i for i in self.mine if not self.bank.is_filled(self._id(i))])
        words = self.model.aggregator.codewords.cpu().numpy()
        if not words.any():
            self.fit_codebook()
        else:
            book = Codebook(words, self.encoder_name)
            if self.bank.codebook != book.fingerprint:
                self.bank.set_codebook(words, book.fingerprint)

    def _started(self) -> bool:
        return (self.out / "checkpoint.pt").exists()

    def _id(self, member: int) -> str:
        return self.cohort.members[member].slide_id

    def _fill(self, members: Sequence[int]) -> None:
        for m, parts in self._features(self.cohort, members, self.reader, "filling the bank"):
            self.bank.fill(self._id(m), parts, self.step)

    def _features(self, cohort: Cohort, members: Sequence[int], reader: TileReader | None, title: str) -> Iterator[tuple[int, Any]]:
        train = self.train
        return encode_members(
            *(self.encoder, cohort, members),
            batch=self.train.tile_batch,
            precision=train.precision,
            workers=train.workers,
            title=title,
            reader=reader,
        )

    def fit_codebook(self) -> None:
        """K-means over the same number of rows from each slide; a re-fit keeps the meaning of each codeword."""
        per_slide = max(1, CODEBOOK_ROWS // len(self.cohort))
        rows = np.concatenate(self.group.collect(self.bank.sample(per_slide, self.train.seed)))
        rows = rows[np.lexsort(rows.T[:4])]  # the same order, so the same codewords, however slides are dealt to ranks
        aggregator = self.model.aggregator
        book = Codebook.fit(rows, self.config.model.codewords, seed=self.train.seed, encoder=self.encoder_name)
        if aggregator.codewords.any():
            book = book.match(Codebook(aggregator.codewords.cpu().numpy(), self.encoder_name))
        self.bank.set_codebook(book.codewords, book.fingerprint)
        means = np.concatenate(self.group.collect(self.bank.slide_means()))
        aggregator.set_codebook(book.codewords, means)

    def make_optimizer(self) -> None:
        """AdamW with a learning rate for each part; no decay on vectors (biases, norms, embeddings of one row)."""
        train, parts = self.train, [(self.model.head_parameters(), self.train.lr)]
        if self.encoder is not None:
            parts += [(self.encoder.tower_parameters(), train.encoder_lr), (self.encoder.text_parameters(), train.text_lr)]
        groups = []
        for parameters, lr in parts:
            learning = [p for p in parameters if p.requires_grad]
            for decay in (True, False):
                chosen = [p for p in learning if (p.ndim >= 2) == decay]
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": train.weight_decay * decay})
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)

    def _set_learning_rates(self) -> None:
        total = self.steps_per_epoch * self.train.epochs
        rise = max(1, round(total * self.train.warmup))
        factor = (self.step + 1) / rise if self.step < rise else 0.5 * (1 + math.cos(math.pi * (self.step - rise) / max(1, total - rise)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    # the loop

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.train.seed, self.epoch, *key])

    @property
    def live(self) -> bool:
        """Whether the tile encoder learns in this epoch; else a slide is read from the bank alone."""
        return self.pixels and self.config.encoder.tune != "none" and self.epoch >= self.train.freeze_epochs

    @property
    def _whole_slides(self) -> bool:
        """Whether the bank gives all the other tiles of a slide; where the encoder rests, leaving rows out reads those that stay."""
        return self.train.bank and (self.live or not (self.train.stale_dropout or self.train.bank_tiles))

    def plan(self) -> list[list[Int64[np.ndarray, "_"]]]:
        """The epoch's batches, each a list with one array of members per rank; every rank knows all of it."""
        shards = [[i for i, s in enumerate(self.shard_of) if s == shard] for shard in range(self.shards)]
        dealt = [plan_epoch(self.cohort.members, which, self.steps_per_epoch, self._rng(s)) for s, which in enumerate(shards)]
        world = self.group.world
        return [[np.concatenate([d[step] for d in dealt[r::world]]) for r in range(world)] for step in range(self.steps_per_epoch)]

    def _visit(self, member: int) -> Visit:
        M, T, rng = self.cohort.members[member].tiles, self.train.tiles, self._rng(1, member)
        if not self.live:
            return Visit(member, np.empty(0, np.int64), np.empty(0, np.int64))
        if self.train.sampling == "window":
            if member not in self.orders:
                grid = self.reader.grid(member)
                self.orders[member] = hilbert_order(grid.xy, grid.extent_px)
            tiles = window_tiles(self.orders[member], T, int(self.visits[member]))
        else:
            tiles = draw_tiles(M, T, rng)
        extra = self.bank.oldest(self._id(member), self.train.refresh, tiles) if self.train.refresh else np.empty(0, np.int64)
        return Visit(member, tiles, np.sort(extra))

    def run_epoch(self) -> dict[str, float]:
        """One pass over the slides; returns the epoch's means."""
        self.model.train()
        torch.manual_seed(hash((self.train.seed, self.epoch, self.group.rank)) % 2**31)
        plan = self.plan()
        flow = self._flow(self._visit(int(m)) for step in plan for m in step[self.group.rank])
        measured: list[dict[str, float]] = []
        vectors: list[Tensor] = []
        with progress(f"epoch {self.epoch + 1}", len(plan), "steps") as bar:
            for step in plan:
                batch = [next(flow) for _ in step[self.group.rank]]
                self._set_learning_rates()
                values, z = self.train_step([v for v, _ in batch], [p for _, p in batch], step)
                measured.append(values)
                vectors.append(z)
                self.step += 1
                bar.advance(bar.task_ids[0])
        for members in (m for step in plan for m in step):
            self.visits[members] += 1
        means = {key: float(np.mean([m[key] for m in measured])) for key in measured[0]}
        return means | {"effective_rank": effective_rank(torch.cat(vectors))}

    def _flow(self, visits: Iterable[Visit]) -> Iterator[tuple[Visit, np.ndarray | None]]:
        """Visits with their pixels, read ahead by a step; without pixels where the encoder rests."""
        if not self.live:
            yield from ((visit, None) for visit in visits)
            return
        waiting: deque[Visit] = deque()

        def jobs() -> Iterator[tuple[int, np.ndarray]]:
            for visit in visits:
                waiting.append(visit)
                yield visit.member, np.concatenate([visit.tiles, visit.extra])

        for pixels in self.reader.stream(jobs(), ahead=-(-self.train.batch // self.group.world)):
            yield waiting.popleft(), pixels

    def train_step(
        self, visits: list[Visit], pixels: list[np.ndarray | None], plan: list[Int64[np.ndarray, "_"]]
    ) -> tuple[dict[str, float], Float[Tensor, "B E"]]:
        """One optimiser step on this rank's visits; `plan` holds all ranks' members. Returns measurements and all z."""
        train, slides = self.train, [self._id(v.member) for v in visits]
        values: dict[str, float] = {}
        for v, p in zip(visits, pixels):
            if len(v.extra):
                with inference(self.encoder), autocast(self.device, train.precision):
                    self.bank.write(self._id(v.member), v.extra, self._encode([*p[len(v.tiles) :]], None).cpu().numpy(), self.step)
        index = [v.tiles for v in visits]
        if self.live:
            tiles = [tile for v, p in zip(visits, pixels) for tile in p[: len(v.tiles)]]  # views: the batch is never copied as a whole
            views = self._views(visits) if train.augment else None
            fresh, encode_again = self._fresh(tiles, views)
        else:
            index, fresh = self._from_bank(slides, visits)
        sizes = [len(members) for members in plan]
        z = self._slide_vectors(visits, index, fresh, sizes)
        u = self._report_vectors(visits)
        z_all, u_all = self.group.gather_rows(z, sizes), self.group.gather_rows(u, sizes)
        reports = torch.tensor([self.cohort.members[i].report for members in plan for i in members], device=self.device)
        scale = self.group.own_share(self.model.logit_scale).clamp(max=math.log(100)).exp()
        bias = self.group.own_share(self.model.logit_bias) if train.loss == "siglip" else None
        loss = contrastive_loss(z_all, u_all, reports, scale, bias=bias, label_smoothing=train.label_smoothing)
        if train.view_weight:
            one, other = (self.group.gather_rows(view, sizes) for view in self._two_views(slides, index, fresh))
            each_its_own = torch.arange(len(z_all), device=self.device)
            loss = loss + train.view_weight * contrastive_loss(one, other, each_its_own, scale)
        if not torch.isfinite(loss):
            self._stop_on_nan("loss", slides)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.live:
            encode_again()
        self.group.sum_gradients(self.parameters)
        if self.live:
            values["grad_encoder"] = _norm(p.grad for p in self.encoder.tower_parameters() if p.grad is not None)
        total = torch.nn.utils.clip_grad_norm_(self.parameters, train.clip_grad or math.inf)
        if not torch.isfinite(total):
            self._stop_on_nan("gradient", slides)
        self.optimizer.step()
        if self.live:
            drift = self._write_back(slides, index, fresh)
            values["row_cosine"] = self.group.mean(drift, len(fresh), self.device)
        similar = (z_all @ u_all.T).detach().cpu().numpy()
        hit = (reports[:, None] == reports).cpu().numpy()
        values |= {
            "loss": float(loss.detach()),
            "batch_recall@1": float((first_hits(similar, hit) == 1).mean()),
            "grad": float(total),
            "temperature": float(1 / scale.detach()),
        }
        return values, z_all.detach()

    def _encode(self, tiles: list[np.ndarray], views: Augmentation | None) -> Float[Tensor, "n D"]:
        """Features of any number of tiles, a micro-batch at a time."""
        step = self.train.tile_batch
        parts = [
            self.encoder.encode_tiles(self._to_device(tiles[i : i + step]), views.part(i, i + step) if views else None)
            for i in range(0, len(tiles), step)
        ]
        return torch.cat(parts)

    def _to_device(self, tiles: list[np.ndarray]) -> UInt8[Tensor, "n H W 3"]:
        on_gpu = self.device.type == "cuda"
        batch = torch.empty((len(tiles), *tiles[0].shape), dtype=torch.uint8, pin_memory=on_gpu)  # pinned: the copy does not wait
        np.stack(tiles, out=batch.numpy())
        return batch.to(self.device, non_blocking=True)

    def _views(self, visits: list[Visit]) -> Augmentation:
        drawn = []
        for v in visits:
            seed = int(self._rng(2, v.member).integers(2**31))
            drawn.append(Augmentation.draw(len(v.tiles), torch.Generator().manual_seed(seed), self.train.stain_jitter))
        return Augmentation(torch.cat([d.turns for d in drawn]), torch.cat([d.stain for d in drawn]))

    def _fresh(self, tiles: list[np.ndarray], views: Augmentation | None) -> tuple[Float[Tensor, "N D"], Callable[[], None]]:
        """Features with gradient, and the second pass that gradient caching owes once the loss was back-propagated.

        The last micro-batch keeps its graph at once: no other one is in memory meanwhile, and its second pass is saved.
        """
        step, precision = self.train.tile_batch, self.train.precision
        *starts, last = range(0, len(tiles), step)
        cuda, states = self.device.type == "cuda", []
        get, put = (torch.cuda.get_rng_state, torch.cuda.set_rng_state) if cuda else (torch.get_rng_state, torch.set_rng_state)

        def encode(i: int) -> Tensor:
            with autocast(self.device, precision):
                return self._encode(tiles[i : i + step], views.part(i, i + step) if views else None)

        cached = torch.empty(last, self.model.dim, device=self.device)
        with torch.no_grad():
            for i in starts:
                states.append(get())  # a tower with dropout must drop the same in both passes
                cached[i : i + step] = encode(i)
        cached.requires_grad_()

        def encode_again() -> None:
            after = get()
            for i, state in zip(starts, states):
                put(state)
                encode(i).backward(cached.grad[i : i + step])
            put(after)

        return torch.cat([cached, encode(last)]), encode_again

    def _from_bank(self, slides: list[str], visits: list[Visit]) -> tuple[list[np.ndarray], Float[Tensor, "N D"]]:
        """Where the tile encoder rests: bank rows in the place of fresh tiles.

        Of whole slides only the two views need some: half of the slide. Else those that `stale_dropout` and `bank_tiles` leave, without
        `bank_tiles` 1,024 at most, or T without a bank; they are then all of the slide.
        """
        train, index, rows = self.train, [], []
        for slide, visit in zip(slides, visits):
            M = self.bank.tiles(slide)
            if self._whole_slides:
                keep = min(max(1, M // 2), VIEW_ROWS) if train.view_weight else 0
            elif train.bank:
                keep = max(2, round(min(train.bank_tiles or M, M) * (1 - train.stale_dropout)))
                keep = keep if train.bank_tiles else min(keep, VIEW_ROWS)
            else:
                keep = train.tiles
            index.append(draw_tiles(M, keep, self._rng(3, visit.member)))
            rows.append(torch.from_numpy(self.bank.gather(slide, index[-1])))
        return index, torch.cat(rows).to(self.device).float()

    def _slide_vectors(
        self, visits: list[Visit], index: list[np.ndarray], fresh: Float[Tensor, "N D"], sizes: list[int]
    ) -> Float[Tensor, "B E"]:
        train = self.train
        sums, counts = refreshed_residuals(
            self.bank if self._whole_slides else None,
            [self._id(v.member) for v in visits],
            index,
            fresh,
            self.model.aggregator.codewords,
            bank_tiles=train.bank_tiles if self.live else 0,
            stale_dropout=train.stale_dropout if self.live else 0.0,
            gradient_scale=train.gradient_scale,
            soft=self.config.model.soft_assignment,
            rngs=[self._rng(4, v.member) for v in visits],
        )
        if self.live:
            self.model.aggregator.track(self.group.gather_rows(self.model.aggregator.mean(sums, counts).detach(), sizes))
        return self.model.aggregator(sums, counts)

    def _report_vectors(self, visits: list[Visit]) -> Float[Tensor, "B X"]:
        """u of each slide: the mean of its report's pieces, or of some of them drawn anew (`report_part`, `report_windows`)."""
        chosen: list[Any] = []
        for v in visits:
            pieces = self.pieces[self.cohort.members[v.member].report]
            keep = max(1, round(len(pieces) * self.train.report_part))
            if self.tune_text and self.train.report_windows:
                keep = min(keep, self.train.report_windows)
            picked = np.sort(self._rng(5, v.member).choice(len(pieces), keep, replace=False))
            chosen.append([pieces[i] for i in picked] if isinstance(pieces, list) else pieces[torch.from_numpy(picked).to(self.device)])
        if self.tune_text:
            with autocast(self.device, self.train.precision):
                vectors = self.encoder.encode_texts([text for texts in chosen for text in texts])
            chosen = list(vectors.split([len(texts) for texts in chosen]))
        return self.model.project_text(torch.stack([c.mean(0) for c in chosen]))

    def _two_views(
        self, slides: list[str], index: list[np.ndarray], fresh: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "B E"]]:
        """z of two disjoint parts of each slide: the drawn tiles, and all others as the bank has them.

        Without a bank, or where the others are fewer than the drawn tiles, every second drawn tile goes to the other part.
        """
        words, soft = self.model.aggregator.codewords, self.config.model.soft_assignment
        drawn: tuple[list[Tensor], list[Tensor]] = [], []
        for slide, i, features in zip(slides, index, fresh.split([len(i) for i in index])):
            halved = not self._whole_slides or self.bank.tiles(slide) < 2 * len(i)
            drawn[0].append(features[::2] if halved else features)
            drawn[1].append(features[1::2] if halved else features[:0])
        one, other = (
            refreshed_residuals(None, slides, [np.arange(len(x)) for x in part], torch.cat(part), words, soft=soft) for part in drawn
        )
        if self._whole_slides:
            stale = stale_residuals(self.bank, slides, index, words, soft=soft)
            other = other[0] + stale.sums, other[1] + stale.counts
        single = other[1].sum(1) == 0  # a slide of one tile is its own other part
        other = torch.where(single[:, None, None], one[0], other[0]), torch.where(single[:, None], one[1], other[1])
        return self.model.aggregator(*one), self.model.aggregator(*other)

    def _write_back(self, slides: list[str], index: list[np.ndarray], fresh: Tensor) -> float:
        rows = fresh.detach().cpu().numpy()
        ends = np.cumsum([len(i) for i in index])
        parts = np.split(rows, ends[:-1])
        drift = [self.bank.write(slide, i, part, self.step) for slide, i, part in zip(slides, index, parts)]
        return float(np.concatenate(drift).mean())

    def _stop_on_nan(self, what: str, slides: list[str]) -> None:
        last = f"epoch {len(self.rows)} in checkpoint.pt is whole" if self._started() else "there is no checkpoint yet"
        raise DreslclError(
            f"{self.out}: the {what} is not finite at step {self.step} (slides {', '.join(slides[:4])}, ...); {last}; "
            "lower --lr or --encoder-lr, or use --precision fp32, and go on with --resume"
        )

    # between epochs

    def end_epoch(self, values: dict[str, float]) -> bool:
        """Refresh, re-fit, measure, save. Returns whether patience has run out."""
        train, moved = self.train, self.live
        self.epoch += 1
        last = self.epoch == train.epochs
        if moved and train.refresh_every and self.epoch % train.refresh_every == 0 and not last:
            self._fill(self.mine)
        if train.codebook_refit and self.epoch % train.codebook_refit == 0 and not last:
            self.fit_codebook()
        elif moved:
            for i in self.mine:
                self.bank.rebuild(self._id(i))
        ages = self.bank.age(self.step)
        values |= {"row_age": ages["mean"], "row_age_p95": ages["p95"], "lr": self.optimizer.param_groups[0]["lr"]}
        values |= self.held_out_retrieval()
        score = values.get("held_out_recall@10", 0.0)
        better = not self.held_out.members or score > self.best
        self.best, self.waited = (score, 0) if better else (self.best, self.waited + 1)
        self.rows.append({"epoch": self.epoch, "step": self.step, **values})
        self.bank.flush()
        stop = last or bool(train.patience and self.waited >= train.patience)
        if self.group.first:
            if better and (self.held_out.members or stop):
                self.model.save(self.out / "model")
            self.journal.write(self.rows, picture=stop)  # first: what it logs beyond a checkpoint is void, what it missed would be lost
            self.save_checkpoint()
        self.group.wait()
        return stop

    def held_out_retrieval(self) -> dict[str, float]:
        """Report → slide retrieval among the held-out patients."""
        if not self.held_out.members:
            return {}
        z, u = self._vectors(self.held_out)
        number = np.array([m.report for m in self.held_out.members])
        found = retrieval_metrics(first_hits(u @ z.T, number[:, None] == number), np.ones((1, len(z))))
        return {f"held_out_{key}": float(value[0]) for key, value in found.items()}

    def _vectors(self, cohort: Cohort) -> tuple[Float[np.ndarray, "S E"], Float[np.ndarray, "S E"]]:
        """z and u of slides; every rank gets all. Held-out slides are encoded anew, training slides are read from the bank."""
        members, own = cohort.members, {}
        if cohort is self.held_out:
            mine = range(self.group.rank, len(members), self.group.world)
            own = {m: self.model.embed_features(parts) for m, parts in self._features(cohort, mine, None, "held-out slides")}
        else:
            for m, member in enumerate(members):
                if member.slide_id in self.bank.slides:
                    own[m] = self.model.embed_features(bank_rows(self.bank, member.slide_id, member.tiles))
        z = {m: vector for part in self.group.collect(own) for m, vector in part.items()}
        reports = cohort.reports
        with inference(self.model):
            if isinstance(reports[0], str):
                vectors = self.model.encoder.encode_reports([str(reports[m.report]) for m in members])
            else:
                vectors = torch.from_numpy(np.stack([reports[m.report].mean(0) for m in members])).to(self.device)
            u = self.model.project_text(vectors).cpu().numpy()
        return np.stack([z[m] for m in range(len(members))]), u

    def save_checkpoint(self) -> None:
        """All that is needed to go on, loadable with weights_only=True."""
        state = {
            "version": CHECKPOINT_VERSION,
            "encoder": self.encoder_name,
            "grids": self.grids_name,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "visits": torch.from_numpy(self.visits),
            "rows": self.rows,
            "best": self.best,
            "waited": self.waited,
        }
        memory = io.BytesIO()  # torch itself loses the reason why a write failed
        torch.save(state, memory)
        write_bytes(self.out / "checkpoint.pt", memory.getbuffer())

    def load_checkpoint(self) -> None:
        """Go on where the last whole epoch ended.

        Raises:
            StoreError: no checkpoint, a damaged one, or one of another encoder, cohort or model shape.
        """
        path = self.out / "checkpoint.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            for key, here in (("encoder", self.encoder_name), ("grids", self.grids_name)):
                if state[key] != here:
                    raise StoreError(f"{path}: made with {key} {state[key]}, asked for {here}; use another --out, or the same inputs")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step, self.rows = state["epoch"], state["step"], state["rows"]
            self.visits, self.best, self.waited = state["visits"].cpu().numpy(), state["best"], state["waited"]
        except StoreError:
            raise
        except Exception as error:  # torch raises many types for a damaged or hostile file
            raise StoreError(f"{path}: cannot be resumed ({str(error).splitlines()[0]}); start anew without --resume") from error
        if not (self.out / "model" / "config.json").exists():  # its replacement by a better one was cut short
            self.best = -math.inf

    def write_report(self) -> None:
        """report.html. All ranks encode what it shows of retrieval, the first one writes."""
        cohort, words = self.held_out, self.model.aggregator.codewords.cpu().numpy()
        if cohort.members:
            self.model = DRESLCL.load(self.out / "model").to(self.device)  # the best epoch's
            self.encoder = self.model.encoder
        else:
            some = draw_tiles(len(self.cohort), RETRIEVAL_SLIDES, np.random.default_rng(self.train.seed))
            cohort = replace(self.cohort, members=tuple(self.cohort.members[i] for i in some))
        z, u = self._vectors(cohort)
        if not self.group.first:
            return
        which = "held-out slides, encoded by the kept model" if self.held_out.members else "training slides, which the model has seen"
        run_page(
            self.out,
            settings=(self.out / "config.toml").read_text(encoding="utf-8"),
            notes=self.notes,
            rows=self.rows,
            atlas=codebook_atlas(self.bank, words, self.cohort, self.reader, seed=self.train.seed) if self.reader else [],
            examples=[f"Report → slide among {len(cohort)} {which}.", retrieval_examples(cohort, z, u)],
        )


def effective_rank(vectors: Float[Tensor, "S E"]) -> float:
    """exp of the entropy of the centred vectors' normalised singular values (Roy & Vetterli 2007): 1 is collapse."""
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).double().cpu())
    share = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


def _norm(gradients: Iterable[Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients]).norm())


def pretrain(
    cohort: Cohort,
    out: Path,
    config: RunConfig,
    *,
    held_out: Cohort | None = None,
    resume: bool = False,
    dry_run: bool = False,
    shards: int | None = None,
) -> Path:
    """Train on a cohort with reports; returns the model's folder, `out/model`.

    Args:
        cohort: slides with reports (`Cohort.load(...).with_reports(...)`), or files of tile features.
        out: the run's folder.
        held_out: slides for the retrieval measured after each epoch; the best epoch's model is kept.
        resume: go on from out/checkpoint.pt where there is one.
        dry_run: forecast only.
        shards: files the bank is dealt into, a multiple of the ranks; default one per rank.

    Raises:
        ConfigError, StoreError, ModelError, DreslclError: see the modules; the message says what to do.
    """
    out = Path(out)
    with ranks(pick_device()) as group, hold(out) if group.first and not dry_run else nullcontext():
        if (out / "checkpoint.pt").exists() and not (resume or dry_run):
            raise StoreError(f"{out}: holds a run already; go on with --resume, or choose another --out")
        trainer = Trainer(cohort, held_out or Cohort(()), config, out, group, shards=shards)
        trainer.announce()
        if dry_run:
            return out / "model"
        trainer.encode_reports()
        trainer.make_optimizer()
        if resume and (out / "checkpoint.pt").exists():
            trainer.load_checkpoint()
            log.info("resuming after epoch %d of %d", trainer.epoch, config.train.epochs)
        if group.first:
            config.save(out / "config.toml")
        trainer.make_bank()
        if group.first and not (out / "checkpoint.pt").exists():
            trainer.save_checkpoint()  # from here on the bank holds rows of a trained encoder: go on, never start over
        while trainer.epoch < config.train.epochs:
            start = time.monotonic()
            stop = trainer.end_epoch(trainer.run_epoch())
            row = trainer.rows[-1]
            shown = ", ".join(f"{k} {row[k]:.3g}" for k in ("loss", "batch_recall@1", "row_cosine", "held_out_recall@10") if k in row)
            log.info("epoch %d/%d: %s (%.1f s)", trainer.epoch, config.train.epochs, shown, time.monotonic() - start)
            if stop and trainer.epoch < config.train.epochs:
                log.info("stopping: no better held-out retrieval for %d epochs", config.train.patience)
                break
        trainer.write_report()
    return out / "model"
