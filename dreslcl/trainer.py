"""Pretraining: fill the bank, fit the codebook, then epochs of steps. `pretrain` at the end is the loop; helpers are functions of a `Run`.

One step (`train_step`). Draw B slides of distinct patients and T tiles of each; encode the B·T tiles with gradient; a slide is its
drawn tiles and the rest from the bank; aggregate, contrast with the reports, and the drawn part of each slide with its rest; back-
propagate; write the fresh features back. Where the encoder does not learn, and for a slide whose pixels cannot be read, the bank's rows
of the drawn tiles stand in for fresh features: the path is the same. Beside the few encoded tiles some bank rows are weighed anew at each
step, so that the gate learns from more than T tiles; all others keep in the sums the weight that they had last.
"""

import copy
import io
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from .bank import MemoryBank, Rest, fit_codebook, slide_layout
from .cohort import Cohort, TileReader, deal_patients, draw_tiles, plan_epoch, window_tiles
from .common import (
    EVERY_S,
    ConfigError,
    DreslclError,
    ModelError,
    SlideError,
    StoreError,
    hold,
    prefetch,
    reason,
    remember,
    track,
    write_bytes,
)
from .config import EncoderConfig, RunConfig
from .distributed import Ranks, ranks
from .embedding import encode_slides, noting
from .encoder import Augmentation, Encoder, autocast, cached_features, pick_device
from .evaluation import first_hits, retrieval_metrics
from .formats import read_features
from .model import DRESLCL, Aggregator, Bag, contrastive_loss, nearest_codeword, residual_sums, unevenness
from .report import Journal, codebook_atlas, retrieval_examples, run_page, time_spent
from .text import Text, make_text, mask_words
from .tiles import hilbert_order, pack_path

log = logging.getLogger(__name__)

CODEBOOK_ROWS = 20_000  # for K-means, the same number of each slide
REFIT = 8  # epochs between two fits of the codebook while the encoder learns; the first come after 1, 2 and 4
WARMUP = 0.1  # share of the training over which learning rates rise
CLIP = 1.0  # largest norm of the gradient
GATE_RATE = 10.0  # times `lr` for the gate: it must find the tiles that tell before the heads learn the slides by heart
EVEN = 0.1  # of the loss for each nat of `unevenness`: a gate that gains less by choosing tiles has learnt its few slides by heart
MOMENTUM = 0.9  # with which the mean path's statistics follow the batch while the encoder learns
ROWS_AT_REST = 1024  # tiles drawn of a slide, half of them at most, where no encoder has to be paid for them
ROWS_BESIDE = 448  # bank rows weighed anew at each step beside the encoded tiles: about what a slide of 1,000 has in the blocks used
PIECES = 8  # most pieces of a report read at a step by a text tower that learns: bounds the time of long reports
RETRIEVAL_SLIDES = 200  # of the training slides, for the report page where none are held out
FAILED_SHARE = 0.1  # a run goes on without slides that cannot be read, up to this share
Plan = list[Int64[np.ndarray, "_"]]  # of one step: the slides of each rank
FREE_TO_CHANGE = set("epochs lr encoder_lr text_lr weight_decay tile_batch precision workers cache_gb slides".split())


@dataclass(frozen=True)
class SlideSample:
    """One slide in one step."""

    member: int
    tiles: Int64[np.ndarray, "T"]
    pixels: UInt8[Tensor, "T H W 3"] | None  # none: the bank's rows of the tiles are used
    views: Augmentation | None
    rest: Rest
    read_s: float = 0.0  # what reading the pixels took, seconds of one thread


@dataclass(frozen=True)
class Fresh:
    """The tiles of a step whose features are at hand, slide after slide: those drawn, then the bank's rows read beside them."""

    features: Float[Tensor, "N D"]
    codes: Tensor
    weights: Float[Tensor, "N"]


@dataclass
class Run:
    """State of a pretraining run on one rank."""

    config: RunConfig
    out: Path
    group: Ranks
    device: torch.device
    cohort: Cohort
    held_out: Cohort
    rank_of: list[int]  # the rank that owns each slide
    model: DRESLCL
    reader: TileReader | None
    bank: MemoryBank
    pieces: list[Any]  # of each report: its texts, or their vectors (n, X) where the text does not learn
    notes: list[str]
    journal: Journal
    optimizer: torch.optim.Optimizer | None = None
    weigher: Aggregator | None = None  # the aggregator as it was when the codebook was fitted: by it slides are weighed anew
    epoch: int = 0
    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)  # those of metrics.csv
    best: float = -math.inf
    failed: dict[str, str] = field(default_factory=dict)
    orders: dict[int, np.ndarray] = field(default_factory=dict)  # Hilbert order of a slide's tiles, for sampling by windows

    @property
    def encoder_learns(self) -> bool:
        """Whether drawn tiles are encoded anew; else they are read from the bank."""
        return self.reader is not None and self.config.encoder.tune != "none"

    @property
    def own(self) -> list[int]:
        """The slides of this rank."""
        return [i for i, rank in enumerate(self.rank_of) if rank == self.group.rank]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch: B slides at most, alike on all ranks, none empty."""
        sizes, world = np.bincount(self.rank_of, minlength=self.group.world), self.group.world
        return int(min(-(-sizes.max() * world // self.config.train.batch), sizes.min()))

    def slide(self, member: int) -> str:
        """A slide's id."""
        return self.cohort.members[member].slide_id

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers that the seed, the epoch and `key` alone decide."""
        return np.random.default_rng([self.config.train.seed, self.epoch, *key])


# before the loop


def open_run(cohort: Cohort, held_out: Cohort, config: RunConfig, out: Path, group: Ranks) -> Run:
    """Build the model and its optimiser, check the cohort.

    Raises ConfigError: nothing to contrast, or a batch that does not fit the ranks; ModelError: the encoder cannot be built.
    """
    train, device = config.train, pick_device()
    if train.batch % group.world:
        raise ConfigError(f"batch must be a multiple of the {group.world} ranks, got {train.batch}")
    patients = {m.patient_id for m in cohort.members}
    if len(patients) < max(2, group.world) or len(cohort.reports) < 2:
        needed = f"{max(2, group.world)} patients and two reports are needed, there are {len(patients)} and {len(cohort.reports)}"
        raise ConfigError(f"a contrast needs slides that differ: at least {needed}")
    pixels, vectors = cohort.work is not None, not isinstance(cohort.reports[0], str)
    cohort = mask_reports(cohort, train.leak_words) if train.leak_words else cohort
    tower = config.encoder.text.startswith("tower") or (config.encoder.text == "auto" and config.encoder.has_weights)
    earlier = load_earlier(config, "pixels" if pixels else "features")
    encoder = earlier.encoder if earlier else None
    if encoder is None and (pixels or (tower and not vectors)):
        encoder = Encoder.create(config.encoder, seed=train.seed)
    owner = {m.report: m.patient_id for m in cohort.members}
    owners = [owner[i] for i in range(len(cohort.reports))]
    again = (out / "text").exists()
    text = Text.load(out / "text", encoder) if again else make_text(config.encoder.text, encoder, cohort.reports, owners)
    reader = TileReader(cohort, workers=train.workers, cache_bytes=int(train.cache_gb * 1e9)) if pixels else None
    seen, selected = ([name for m in part.members for name in (m.slide_id, m.patient_id)] for part in (cohort, held_out))
    about = {"tiles": "pixels" if pixels else "features", "slides": len(cohort), "patients": len(patients), "reports": len(cohort.reports)}
    about |= remember(seen, selected, earlier and earlier.about) | {"tiles_seen": sum(m.tiles for m in cohort.members)}
    if reader:
        grid = reader.grid(0)
        about["tile"] = json.loads(grid.settings) | {"size": grid.size, "mpp": grid.mpp}  # coordinates of another tool have their own
    dim = encoder.dim if pixels and encoder else read_features(cohort.members[0].source).shape[1]
    torch.manual_seed(train.seed)
    model = DRESLCL(encoder, text, config.model, dim=dim, temperature=train.temperature, about=about).to(device)
    if earlier:
        if (dim, model.joint_dim) != (earlier.dim, earlier.joint_dim):
            widths = f"{earlier.dim}, {earlier.joint_dim}, here {dim}, {model.joint_dim}"
            raise ConfigError(f"{config.encoder.init} has other widths of features and joint space ({widths}): give the same --text")
        model.aggregator.load_state_dict(earlier.aggregator.state_dict())
    if encoder is not None:
        encoder.set_trainable(config.encoder.tune if pixels else "none", text=text.learns)
        random = pixels and config.encoder.tune != "none" and not encoder.pretrained
        if random and train.encoder_lr <= 2e-5:
            stays = f"{config.encoder.name} starts from random weights and stays there at --encoder-lr {train.encoder_lr:g}"
            raise ConfigError(f"{stays}: give --pretrained FILE or TAG, or a rate of about 1e-3")
        if random and train.bank_share < 1:
            why = "the tile encoder has random weights, from which it does not begin to learn while tiles are left out"
            log.warning("%s: use --bank-share 1, or --pretrained", why)
    name = encoder.fingerprint() if pixels and encoder else f"features of width {dim}"
    bank = MemoryBank(out / "bank", dim=dim, codewords=config.model.codewords, encoder=name)
    rank_of = deal_patients(cohort.members, group.world)
    run = Run(config, out, group, device, cohort, held_out, rank_of, model, reader, bank, [], list(cohort.notes), Journal(out))
    run.optimizer, run.weigher = make_optimizer(run), copy.deepcopy(model.aggregator).cpu().requires_grad_(False)
    return run


def mask_reports(cohort: Cohort, words: str) -> Cohort:
    """The cohort, its reports without some words. Raises ConfigError: the reports are vectors."""
    if not isinstance(cohort.reports[0], str):
        raise ConfigError("--leak-words masks words of reports; it cannot where vectors of them are given")
    masked = tuple(mask_words(report, words) for report in cohort.reports)
    count = sum(a != b for a, b in zip(masked, cohort.reports))
    return replace(cohort, reports=masked, notes=(*cohort.notes, f"{count} of {len(masked)} reports held words of --leak-words"))


def load_earlier(config: RunConfig, kind: str) -> DRESLCL | None:
    """The model that a run starts from, if any. Raises ModelError: its tiles are not of this kind; ConfigError: other settings."""
    if config.encoder.init is None:
        return None
    if config.encoder.name != EncoderConfig.name or config.encoder.pretrained:
        raise ConfigError("--init brings its own tile encoder: leave --encoder and --pretrained out")
    earlier = DRESLCL.load(Path(config.encoder.init))
    if earlier.about["tiles"] != kind:
        raise ModelError(f"{config.encoder.init} was trained on {earlier.about['tiles']}; a run on {kind} cannot start from it")
    there, here = asdict(earlier.config), asdict(config.model)
    if other := [f"{name} {there[name]}, here {value}" for name, value in here.items() if there[name] != value]:
        raise ConfigError(f"{config.encoder.init} has another aggregator ({'; '.join(other)}): give the same settings")
    return earlier


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW with a learning rate for each part; no decay on vectors (biases, norms, embeddings of one row)."""
    train, encoder = run.config.train, run.model.encoder
    heads = {p: GATE_RATE if ".gate." in n else 1.0 for n, p in run.model.named_parameters() if not n.startswith(("encoder.", "text."))}
    parts = [(train.lr, heads)]
    if encoder is not None:
        parts.append((train.encoder_lr, encoder.learning_rates(train.layer_decay)))
        parts.append((train.text_lr, dict.fromkeys(encoder.text_parameters(), 1.0)))
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for part, (lr, factors) in enumerate(parts):
        for p, factor in factors.items():
            if p.requires_grad:
                new = {"params": [], "lr": lr * factor, "peak": lr * factor, "weight_decay": train.weight_decay * (p.ndim >= 2)}
                groups.setdefault((part, factor, p.ndim >= 2), new)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), betas=(0.9, 0.98), fused=True)


def fill_bank(run: Run) -> None:
    """Encode the slides whose rows are not in the bank. One that cannot be read is left out of the run, named in a warning and on the page.

    Raises DreslclError: more than a tenth cannot be read.
    """
    marks: dict[int, str] = {}
    failed: dict[str, str] = {}
    for m in run.own:
        with noting(failed, run.slide(m)):
            marks[m] = run.cohort.mark(m)
    missing = [m for m in marks if not run.bank.has(run.slide(m), run.cohort.members[m].tiles, marks[m])]
    for m, parts in encode_slides(run.model.encoder, run.cohort, missing, run.config.train, "filling the bank", run.reader):
        with noting(failed, run.slide(m)):
            run.bank.fill(run.slide(m), parts, run.cohort.members[m].tiles, marks[m], run.step)
    run.failed = {slide: why for part in run.group.collect(failed) for slide, why in part.items()}
    if len(run.failed) > FAILED_SHARE * len(run.cohort):
        slide, why = next(iter(run.failed.items()))
        raise DreslclError(f"{len(run.failed)} of {len(run.cohort)} slides cannot be read; {slide}: {why}")
    if run.failed:
        run.notes.append(f"left out, since they cannot be read: {', '.join(run.failed)}")
        kept = [i for i in range(len(run.cohort)) if run.slide(i) not in run.failed]
        run.cohort, run.rank_of = run.cohort.subset([run.cohort.members[i] for i in kept]), [run.rank_of[i] for i in kept]
        if run.reader:
            run.reader = TileReader(run.cohort, workers=run.reader.workers, cache_bytes=int(run.config.train.cache_gb * 1e9))


def set_codebook(run: Run, *, refit: bool) -> None:
    """Give the bank the model's codewords.

    `refit`: K-means, over the same number of rows of each slide, finds them, or goes on from those that are there, so that they follow the
    features; slides are assigned anew when they are next drawn.
    """
    aggregator = run.model.aggregator
    if refit:
        own, per_slide = [run.slide(m) for m in run.own], max(1, CODEBOOK_ROWS // len(run.cohort))
        rows = np.concatenate(run.group.collect(run.bank.sample(own, per_slide, run.config.train.seed + run.epoch)))
        rows = rows[np.lexsort(rows.T[:4])]  # the same order, so the same codewords, however slides are dealt to ranks
        there = aggregator.codewords.cpu().numpy() if aggregator.codewords.any() else None
        words = fit_codebook(rows, run.config.model.codewords, seed=run.config.train.seed, start=there)
        aggregator.codewords.copy_(torch.from_numpy(words))
        if not run.epoch:
            aggregator.set_statistics(slide_means(run))
        run.weigher.load_state_dict(aggregator.state_dict())
    run.bank.set_codebook(aggregator.codewords.cpu().numpy(), run.weigher.weigh)


def slide_means(run: Run) -> Float[Tensor, "S D"]:
    """Mean features of all ranks' slides, as the bank has them; no row is read."""
    means = np.concatenate(run.group.collect(np.stack([run.bank.mean(run.slide(m)) for m in run.own])))
    return torch.from_numpy(means).to(run.device)


def read_reports(run: Run) -> None:
    """Cut the reports into pieces; where the text does not learn, encode them once for the whole run and note their centre."""
    text, reports = run.model.text, run.cohort.reports
    run.pieces = [text.pieces(r) if isinstance(r, str) else torch.from_numpy(r).to(run.device) for r in reports]
    if text.learns:
        return
    if isinstance(reports[0], str):
        run.model.eval()
        with torch.no_grad(), autocast(run.device, run.config.train.precision):
            run.pieces = [text.encode(pieces).to(run.device) for pieces in run.pieces]
    run.model.text_centre.copy_(torch.stack([p.mean(0) for p in run.pieces]).mean(0))


def announce(run: Run) -> None:
    """Say what the run takes: disk, memory, and time measured on a few tiles."""
    train, sizes = run.config.train, [m.tiles for m in run.cohort.members]
    needed = sum(slide_layout(M, run.model.dim, run.config.model.codewords).itemsize for M in sizes) / 1e9
    free = shutil.disk_usage(next(p for p in (run.out, *run.out.absolute().parents) if p.exists())).free / 1e9
    log.info("%d steps per epoch; the bank takes %.3g GB of %.0f GB free on its disk", run.steps_per_epoch, needed, free)
    if needed > free:
        log.warning("the bank needs %.3g GB, its disk has %.3g GB free: choose another --out", needed, free)
    if run.reader is None or run.model.encoder is None:
        return
    some = range(0, len(run.cohort), max(1, len(run.cohort) // 8))
    start = time.perf_counter()
    try:
        tiles = torch.from_numpy(np.concatenate([run.reader.read(m, draw_tiles(sizes[m], 2, run.rng())) for m in some])).to(run.device)
    except (SlideError, OSError) as error:
        log.warning("no estimate of the time: %s", reason(error))
        return
    read_s = (time.perf_counter() - start) / len(tiles) / run.reader.workers
    with autocast(run.device, train.precision):
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            features = run.model.encoder.encode_tiles(tiles)
            if features.requires_grad:
                features.sum().backward()
            encode_s = (float(features[0, 0].detach()) * 0 + time.perf_counter() - start) / len(tiles)
    run.model.zero_grad(set_to_none=True)
    each = max(read_s, encode_s) if run.device.type == "cuda" else read_s + encode_s  # without a GPU both share the cores
    fill, epoch = (sum(sizes) * each / 2, sum(min(train.tiles, M) for M in sizes) * each * run.encoder_learns)
    said = (timedelta(seconds=round(seconds)) for seconds in (fill, epoch))
    limit = name_limit(run, read_s * run.reader.workers, encode_s)
    log.info("time, an estimate: %s to fill the bank, %s an epoch; the limit is %s", *said, limit)


def name_limit(run: Run, read_s: float, step_s: float) -> str:
    """What limits the speed, and what helps, where one thread would read for so long while the steps take so long."""
    more = math.ceil(read_s / max(step_s, 1e-9)) - run.reader.workers
    pack = "" if pack_path(run.cohort.work, run.slide(0)).exists() else ", or --pack"
    return f"reading: give it {more} more core{'s' * (more > 1)}{pack}" if more > 0 else "the encoder"


# one step


def plan_steps(run: Run) -> list[Plan]:
    """The epoch's batches, each a list with one array of slides per rank; every rank knows all of it."""
    steps = run.steps_per_epoch
    owned = [[i for i, r in enumerate(run.rank_of) if r == rank] for rank in range(run.group.world)]
    dealt = [plan_epoch(run.cohort.members, own, steps, run.rng(rank)) for rank, own in enumerate(owned)]
    return [[d[step] for d in dealt] for step in range(steps)]


def draw_sample(run: Run, member: int) -> SlideSample:
    """Draw a slide's tiles, read their pixels and the bank's rest: on threads, a step ahead (a slide is in one step of an epoch)."""
    train, M, rng = run.config.train, run.cohort.members[member].tiles, run.rng(1, member)
    if not run.encoder_learns:
        tiles = draw_tiles(M, max(1, min(M // 2, ROWS_AT_REST)) if train.bank_share else train.tiles, rng)
    elif train.sampling == "window":
        if member not in run.orders:
            grid = run.reader.grid(member)
            run.orders[member] = hilbert_order(grid.xy, grid.extent_px)
        tiles = window_tiles(run.orders[member], train.tiles, run.epoch)
    else:
        tiles = draw_tiles(M, train.tiles, rng)
    pixels, views, read_s = None, None, 0.0
    if run.encoder_learns:
        start = time.monotonic()
        with noting(run.failed, run.slide(member)):  # the bank's rows are used instead
            pixels = torch.from_numpy(run.reader.read(member, tiles))
        read_s = time.monotonic() - start
        if run.device.type == "cuda" and pixels is not None:
            pixels = pixels.pin_memory().to(run.device, non_blocking=True)
        if train.stain_jitter and pixels is not None:
            views = Augmentation.draw(len(tiles), torch.Generator().manual_seed(int(rng.integers(2**31))), train.stain_jitter)
    beside = ROWS_BESIDE * (run.encoder_learns and type(run.model.aggregator).weigh is not Aggregator.weigh)
    return SlideSample(member, tiles, pixels, views, run.bank.rest(run.slide(member), tiles, train.bank_share, rng, beside), read_s)


def encode_samples(run: Run, samples: Sequence[SlideSample], plan: Plan) -> Fresh:
    """The tiles at hand, with gradient where they are encoded.

    While the encoder learns, the statistics by which features are standardised follow the batch.
    """
    encoded, features = [s for s in samples if s.pixels is not None], iter(())
    if encoded:
        tiles = [tile for s in encoded for tile in s.pixels]  # views: the batch is never copied as a whole
        views = Augmentation.join([s.views for s in encoded], run.device) if encoded[0].views else None

        def encode(first: int, *some: Tensor) -> Tensor:
            with autocast(run.device, run.config.train.precision):
                return run.model.encoder.encode_tiles(torch.stack(some), views.part(first, first + len(some)) if views else None)

        found = cached_features(encode, tiles, run.config.train.tile_batch)
        features = iter(found.split([len(s.tiles) for s in encoded]))
    aggregator, rows = run.model.aggregator, []
    for s in samples:
        stored = torch.from_numpy(s.rest.old).to(run.device, aggregator.centre.dtype)
        rows.append(stored if s.pixels is None else torch.cat([next(features), stored[len(s.tiles) :]]))
    if run.encoder_learns:
        others, M = torch.from_numpy(np.stack([s.rest.total for s in samples])), torch.tensor([[s.rest.slide.tiles] for s in samples])
        means = (others.to(run.device) + torch.stack([r.detach().sum(0) for r in rows])) / M.to(run.device)
        aggregator.set_statistics(run.group.gather_rows(means, [len(members) for members in plan]), MOMENTUM)
    fresh = torch.cat(rows)
    return Fresh(fresh, nearest_codeword(fresh, aggregator.codewords), aggregator.weigh(fresh))


def make_bags(run: Run, samples: Sequence[SlideSample], fresh: Fresh) -> tuple[Bag, Bag, Bag, Bag]:
    """The bags of B slides: drawn tiles, further drawn tiles, the share of the others that this step uses, all others.

    The second is empty but where there are fewer others than drawn tiles (no bank, a small slide): there every second tile goes to it,
    so that first, and second with all others, are two views of a slide.
    """
    B, words, needs_rows = len(samples), run.model.aggregator.codewords, run.model.aggregator.needs_rows
    halved = [not run.config.train.bank_share or s.rest.slide.tiles < 2 * len(s.tiles) for s in samples]
    read = [len(s.rest.tiles) - len(s.tiles) for s in samples]  # beside the drawn ones
    bags = [torch.cat([torch.arange(len(s.tiles)) % 2 * half, torch.full((n,), 2)]) for s, half, n in zip(samples, halved, read)]
    side = torch.cat([b + B * bag for b, bag in enumerate(bags)]).to(run.device)
    sums, counts = residual_sums(fresh.features, fresh.codes, words, weights=fresh.weights, part_of=side, parts=3 * B)
    rows, weights = (tuple(all_[side == p] for p in range(3 * B)) if needs_rows else () for all_ in (fresh.features, fresh.weights))
    first, second, beside = (Bag(sums[i : i + B], counts[i : i + B], rows[i : i + B], weights[i : i + B]) for i in (0, B, 2 * B))
    stored = [s.rest.rows() for s in samples] if needs_rows else []
    stored = [tuple(torch.from_numpy(kind).to(sums) for kind in kinds) for kinds in zip(*stored)] or [(), ()]
    used = Bag(*(torch.stack(kind).to(sums) for kind in zip(*((s.rest.sums, s.rest.counts) for s in samples))), *stored)
    blocks = [s.rest.others for s in samples] if run.config.train.bank_share else []
    others = Bag(*(torch.stack([b.sum(0) for b in kind]).to(sums) for kind in zip(*blocks)), *stored) if blocks else used
    return first, second, beside + used, beside + others


def report_vectors(run: Run, samples: Sequence[SlideSample]) -> Float[Tensor, "B E"]:
    """u of each slide: the mean of some of its report's pieces, drawn anew each time (`report_part`)."""
    chosen: list[Any] = []
    for s in samples:
        pieces = run.pieces[run.cohort.members[s.member].report]
        keep = max(1, round(len(pieces) * run.config.train.report_part))
        keep = min(keep, PIECES) if run.model.text.learns else keep
        picked = np.sort(run.rng(2, s.member).choice(len(pieces), keep, replace=False))
        chosen.append([pieces[i] for i in picked] if isinstance(pieces, list) else pieces[picked])
    if run.model.text.learns:
        with autocast(run.device, run.config.train.precision):
            vectors = run.model.text.encode([text for texts in chosen for text in texts])
        chosen = list(vectors.split([len(texts) for texts in chosen]))
    return run.model.project_text(torch.stack([c.mean(0) for c in chosen]))


def compute_loss(run: Run, samples: Sequence[SlideSample], fresh: Fresh, plan: Plan) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss over all ranks' slides, measurements, and all z (B, E)."""
    group, model, sizes = run.group, run.model, [len(members) for members in plan]
    first, second, rest, others = make_bags(run, samples, fresh)
    whole = first + second + rest
    z, u = group.gather_rows(model.aggregator(whole), sizes), group.gather_rows(report_vectors(run, samples), sizes)
    reports = torch.tensor([run.cohort.members[i].report for members in plan for i in members]).to(run.device)
    scale, view_scale = (group.own_share(log_scale).exp() for log_scale in (model.logit_scale, model.view_scale))
    uneven = torch.stack([unevenness(weights) for weights in fresh.weights.split([len(s.rest.tiles) for s in samples])])
    loss = contrastive_loss(z, u, reports, scale) + EVEN * group.gather_rows(uneven[:, None], sizes).mean()
    if run.config.train.view_weight:
        others = second + others
        one, other = model.aggregator(first), model.aggregator(others)
        other = torch.where(others.counts.sum(1, keepdim=True) > 0, other, one)  # a slide of one tile is its own other part
        one, other = group.gather_rows(one, sizes), group.gather_rows(other, sizes)
        each_its_own = torch.arange(len(z), device=run.device)
        loss = loss + run.config.train.view_weight * contrastive_loss(one, other, each_its_own, view_scale)
    similar, hit = (z @ u.T).detach(), reports[:, None] == reports
    best = similar.masked_fill(~hit, -2).amax(1, keepdim=True)
    found = ~(~hit & (similar >= best)).any(1)
    use = torch.exp(-unevenness(whole.counts.detach().sum(0)))  # perplexity over K; 1: all codewords are used alike
    measured = {"loss": loss.detach(), "batch_recall@1": found.float().mean(), "temperature": 1 / scale.detach()}
    return loss, measured | {"codeword_use": use, "unevenness": uneven.detach().mean()}, z.detach()


def train_step(run: Run, samples: Sequence[SlideSample], plan: Plan) -> tuple[dict[str, float], Float[Tensor, "B E"]]:
    """One optimiser step on this rank's samples; `plan` holds all ranks' slides. Returns measurements and all z.

    Raises DreslclError: loss or gradient is not finite; nothing of this step was kept.
    """
    optimizer = run.optimizer
    fresh = encode_samples(run, samples, plan)
    loss, measured, z = compute_loss(run, samples, fresh, plan)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    run.group.sum_gradients(parameters)
    if run.encoder_learns:
        grads = [p.grad.norm() for p in run.model.encoder.tower_parameters() if p.grad is not None]
        measured["grad_encoder"] = torch.stack(grads).norm()
    measured["grad"] = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
    values = dict(zip(measured, torch.stack([v.float() for v in measured.values()]).tolist()))  # the one wait for the device
    if not all(map(math.isfinite, values.values())):
        what, slides = "gradient" if math.isfinite(values["loss"]) else "loss", ", ".join(run.slide(s.member) for s in samples[:4])
        there = f"epoch {len(run.rows)} in checkpoint.pt is whole" if (run.out / "checkpoint.pt").exists() else "there is no checkpoint yet"
        todo = "run again with a lower --lr or --encoder-lr, or with --precision fp32"
        raise DreslclError(f"{run.out}: the {what} is not finite at step {run.step} (slides {slides}, ...); {there}; {todo}")
    optimizer.step()
    with torch.no_grad():
        for log_scale in (run.model.logit_scale, run.model.view_scale):
            log_scale.clamp_(max=math.log(100))  # the parameter: a clamped value would have no gradient to come back by
    write_back(run, samples, fresh, values)
    return values, z


def write_back(run: Run, samples: Sequence[SlideSample], fresh: Fresh, values: dict[str, float]) -> None:
    """Put what is fresh into the bank: features of encoded tiles, codewords and weights of all; notes drift and age of rows replaced."""
    sizes, encoded = [len(s.rest.tiles) for s in samples], [len(s.tiles) * (s.pixels is not None) for s in samples]
    codes, weights = (np.split(kind.cpu().numpy(), np.cumsum(sizes)[:-1]) for kind in (fresh.codes, fresh.weights.detach().half()))
    new = torch.cat([rows[:T] for rows, T in zip(fresh.features.detach().split(sizes), encoded)]).half().cpu().numpy()
    cosine, ages = [], []
    for s, T, features, code, weight in zip(samples, encoded, np.split(new, np.cumsum(encoded)[:-1]), codes, weights):
        cosine.append(run.bank.write(s.rest, features, code.astype(np.uint16), weight, run.step))
        ages.append(run.step - s.rest.age[:T])
    for name, found in (("row_cosine", cosine), ("row_age", ages)) if run.encoder_learns else ():
        values[name] = float(np.concatenate(found).mean()) if any(encoded) else 1.0


def set_learning_rates(run: Run, position: float, step: float) -> None:
    """Linear rise over the first tenth of the training, then half a cosine; a step begins at `position`, 0 to 1, and is `step` long."""
    rising = (position + step) / WARMUP
    factor = rising if position < WARMUP else 0.5 * (1 + math.cos(math.pi * (position - WARMUP) / (1 - WARMUP)))
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * min(1.0, factor)


# after an epoch


def end_epoch(run: Run, values: dict[str, float]) -> None:
    """Measure and save."""
    run.epoch += 1
    if run.encoder_learns:
        run.model.aggregator.set_statistics(slide_means(run))  # of all slides, not mostly of the last batch
    values |= {"lr": run.optimizer.param_groups[0]["lr"], **held_out_retrieval(run)}
    score = values.get("held_out_mrr", 0.0)
    last, better = run.epoch == run.config.train.epochs, not run.held_out.members or score >= run.best
    run.best = max(score, run.best)
    run.rows.append({"epoch": run.epoch, "step": run.step, **values})
    if run.group.first:
        if better and (run.held_out.members or last):
            run.model.save(run.out / "model")
        run.journal.write(run.rows, picture=last)  # first: what it logs beyond a checkpoint is void, what it missed would be lost
        save_checkpoint(run)
    run.group.wait()
    shown = ("loss", "batch_recall@1", "row_cosine", "held_out_recall@10", "held_out_mrr")
    said = ", ".join(f"{k} {values[k]:.3g}" for k in shown if k in values)
    epochs, seconds = run.config.train.epochs, values["seconds"]
    tell = log.info if seconds > EVERY_S or run.epoch % max(1, epochs // 10) == 0 else log.debug  # metrics.csv has them all
    tell("epoch %d/%d: %s (%.1f s%s)", run.epoch, epochs, said, seconds, time_spent(values))


def held_out_retrieval(run: Run) -> dict[str, float]:
    """Report → slide retrieval among the held-out patients, from a fixed sample of each slide's tiles: about a tenth of an epoch's work."""
    members = run.held_out.members
    if not members:
        return {}
    tiles = max(run.config.train.tiles, int(0.3 * run.config.train.tiles * len(run.cohort) / len(members)))
    z, u, kept = slide_and_report_vectors(run, run.held_out, tiles)
    number = np.array([members[i].report for i in kept])
    ranks = first_hits(u @ z.T, number[:, None] == number)
    found = {key: float(value[0]) for key, value in retrieval_metrics(ranks, np.ones((1, len(z)))).items()}
    return {f"held_out_{key}": value for key, value in found.items()} | {"held_out_mrr": float((1 / ranks).mean())}


def slide_and_report_vectors(run: Run, cohort: Cohort, tiles: int | None) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """z from up to `tiles` tiles of a slide (None: all), u, both (S, E), and which slides these are, on every rank; without failed ones."""
    own: dict[int, np.ndarray] = {}
    mine = range(run.group.rank, len(cohort), run.group.world)
    for member, parts in encode_slides(run.model.encoder, cohort, mine, run.config.train, "retrieval", None, tiles=tiles):
        with noting(run.failed, cohort.members[member].slide_id):
            own[member] = run.model.embed_features(parts)
    z = {m: vector for part in run.group.collect(own) for m, vector in part.items()}
    if not (kept := sorted(z)):
        raise SlideError(f"none of {len(cohort)} slides to rank by retrieval could be read; the warnings above say why")
    numbers, number = np.unique([cohort.members[m].report for m in kept], return_inverse=True)
    u = run.model.embed_text([cohort.reports[i] for i in numbers])[number]
    return np.stack([z[m] for m in kept]), u, kept


def save_checkpoint(run: Run) -> None:
    """All that is needed to go on, loadable with weights_only=True."""
    state = {"config": asdict(run.config), "slides": run.model.about["slides"], "epoch": run.epoch}
    state |= {"model": run.model.state_dict(), "weigher": run.weigher.state_dict(), "optimizer": run.optimizer.state_dict()}
    state |= {"step": run.step, "rows": run.rows, "best": run.best}
    memory = io.BytesIO()  # torch itself loses the reason why a write failed
    torch.save(state, memory)
    write_bytes(run.out / "checkpoint.pt", memory.getbuffer())


def load_checkpoint(run: Run) -> None:
    """Go on where the last whole epoch ended. What may change is applied and said; anything else is refused.

    Raises StoreError: a damaged checkpoint, or one of other settings.
    """
    path = run.out / "checkpoint.pt"
    try:
        state = torch.load(path, map_location=run.device, weights_only=True)
        there, here = state["config"], asdict(run.config)
        changed = {f"{part}.{k}": (there[part][k], v) for part in here for k, v in here[part].items() if there[part][k] != v}
        if state["slides"] != len(run.cohort):
            changed["cohort.slides"] = state["slides"], len(run.cohort)
        told = ", ".join(f"{name.split('.')[1]} {old} → {new}" for name, (old, new) in changed.items())
        if refused := [name for name in changed if name.split(".")[1] not in FREE_TO_CHANGE]:
            raise StoreError(f"{path}: this run was started with other settings ({told}); use another --out, or the same {refused[0]}")
        if run.config.train.epochs < state["epoch"]:
            raise StoreError(f"{path}: {state['epoch']} epochs are done; --epochs {run.config.train.epochs} would go back")
        run.model.load_state_dict(state["model"])
        run.weigher.load_state_dict(state["weigher"])
        for group, saved in zip(run.optimizer.param_groups, state["optimizer"]["param_groups"]):
            saved |= {key: group[key] for key in ("peak", "weight_decay")}
        run.optimizer.load_state_dict(state["optimizer"])
        run.epoch, run.step, run.rows, run.best = state["epoch"], state["step"], state["rows"], state["best"]
    except StoreError:
        raise
    except Exception as error:  # torch raises many types for a damaged or hostile file
        raise StoreError(f"{path}: cannot be read ({reason(error)}); delete the folder to start anew") from error
    if not (run.out / "model" / "config.json").exists():  # its replacement by a better one was cut short
        run.best = -math.inf
    log.info("going on after epoch %d of %d%s", run.epoch, run.config.train.epochs, f"; changed: {told}" if told else "")


def write_report(run: Run) -> None:
    """report.html. All ranks encode what it shows of retrieval, the first one writes."""
    cohort, held_out = run.held_out, bool(run.held_out.members)
    if held_out:
        kept = DRESLCL.load(run.out / "model").to(run.device)  # the best epoch's
        run = replace(run, model=kept)
    else:
        some = draw_tiles(len(run.cohort), RETRIEVAL_SLIDES, run.rng())
        cohort = run.cohort.subset([run.cohort.members[i] for i in some])
    z, u, which = slide_and_report_vectors(run, cohort, None if held_out else run.config.train.tiles)
    if not run.group.first:
        return
    cohort = cohort.subset([cohort.members[i] for i in which])
    words = run.model.aggregator.codewords.cpu().numpy()
    said = "held-out slides, encoded by the kept model" if held_out else "training slides, which the model has seen"
    run_page(
        run.out,
        notes=[*run.notes, *(f"{slide} failed: {why}" for slide, why in run.failed.items())],
        rows=run.rows,
        atlas=codebook_atlas(run.bank, words, run.cohort, run.own, run.reader, seed=run.config.train.seed) if run.reader else [],
        examples=[f"Report → slide among {len(cohort)} {said}.", retrieval_examples(cohort, z, u)],
    )


def effective_rank(vectors: Float[Tensor, "S E"]) -> float:
    """exp of the entropy of the centred vectors' normalised singular values (Roy & Vetterli 2007): 1 is collapse."""
    values = torch.linalg.svdvals((vectors - vectors.mean(0)).double().cpu())
    share = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))


# the loop


def run_epoch(run: Run) -> dict[str, float]:
    """The steps of one epoch; returns the means of what they measured."""
    start, measured, vectors, read_s, waited_s = time.monotonic(), [], [], 0.0, 0.0
    run.model.train()
    torch.manual_seed(hash((run.config.train.seed, run.epoch, run.group.rank)) % 2**31)
    plan, rank = plan_steps(run), run.group.rank
    workers = run.reader.workers if run.reader else 1
    mine = [step[rank] for step in plan]
    flow: Iterator[SlideSample] = prefetch(partial(draw_sample, run), np.concatenate(mine).tolist(), workers, ahead=max(map(len, mine)))
    for number, step in enumerate(track(plan, f"epoch {run.epoch + 1}", "steps")):
        set_learning_rates(run, (run.epoch + number / len(plan)) / run.config.train.epochs, 1 / len(plan) / run.config.train.epochs)
        asked = time.monotonic()
        samples = [next(flow) for _ in step[rank]]
        waited_s += time.monotonic() - asked
        read_s += sum(s.read_s for s in samples)
        values, z = train_step(run, samples, step)
        measured.append(values)
        vectors.append(z)
        run.step += 1
    measured = [values for part in run.group.collect(measured) for values in part]  # of all ranks
    means = {key: float(np.mean([m[key] for m in measured])) for key in measured[0]}
    means["effective_rank"], seconds = effective_rank(torch.cat(vectors)), time.monotonic() - start
    if run.encoder_learns:
        spent = {"reading": read_s / workers, "encoder": seconds - waited_s, "waiting": waited_s}
        means |= {f"time/{what}": spent_s / seconds for what, spent_s in spent.items()}
        if waited_s > 0.1 * seconds:  # else reading ahead keeps up
            log.info("the limit is %s", name_limit(run, read_s, seconds - waited_s))
    return means | {"seconds": seconds}


def pretrain(
    cohort: Cohort, out: Path, config: RunConfig, *, held_out: Cohort | None = None, dry_run: bool = False, tensorboard: bool = False
) -> Path:
    """Train on a cohort with reports; returns the model's folder, `out/model`. Run again, it goes on after the last whole epoch.

    Args:
        cohort: slides with reports (`Cohort.load(...).with_reports(...)`), or files of tile features.
        out: the run's folder.
        held_out: slides for the retrieval measured after each epoch; the best epoch's model is kept.
        dry_run: say what the run takes, and stop.
        tensorboard: write events for it too.

    Raises ConfigError, StoreError, ModelError, DreslclError: see the modules; the message says what to do.
    """
    out = Path(out)
    with ranks(pick_device()) as group, hold(out) if group.first and not dry_run else nullcontext():
        run = open_run(cohort, held_out or Cohort(()), config, out, group)
        run.journal = Journal(out, tensorboard=tensorboard)
        announce(run)
        if dry_run:
            return out / "model"
        if (out / "checkpoint.pt").exists():
            load_checkpoint(run)
        if group.first:
            config.save(out / "config.toml")
            run.model.text.save(out / "text")
            run.bank.create()
        group.wait()
        fill_bank(run)
        read_reports(run)
        new = not (out / "checkpoint.pt").exists()
        set_codebook(run, refit=new)
        if group.first and new:
            save_checkpoint(run)  # from here on the bank holds rows of a trained encoder: go on, never start over
        while run.epoch < config.train.epochs:
            if run.encoder_learns and run.epoch and (run.epoch in (1, 2, 4) or run.epoch % REFIT == 0):
                set_codebook(run, refit=True)
            end_epoch(run, run_epoch(run))
        write_report(run)
    return out / "model"
