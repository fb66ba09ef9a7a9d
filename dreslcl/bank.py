"""MemoryBank: the newest feature of every tile of every slide, on disk, and beside them the slide's residual sums.

An aggregator reads sums over all M tiles of a slide. The bank keeps these sums, so a training step takes out the T old rows it
replaces, puts T fresh ones in, and never touches the other M − T: its cost does not depend on M. Tiles are dealt to 8 blocks by a hash
of their number, and the sums are kept for each block: a step that uses a share of a slide's other tiles leaves whole blocks out, for
which no row is read either.

One file a slide, `bank/<slide_id>.bank`, opened as a memory map for the time of one visit: fingerprints of the tiles and of the
codebook, the sums (8, K, D) and counts (8, K) for it, the mean feature (D,), and per tile the weight that it has in these sums, the step
at which the row was written, codeword and feature (float16, unit norm). `bank/bank.json` says D, K and the encoder. Ranks own slides: one
process writes a file.

Crashes. `fill` writes NAME.part and renames it: a file means a filled slide. `write` empties the codebook's fingerprint first and sets
it last; stores into a shared mapping reach the page cache in program order and outlive the process, so after SIGKILL at any moment the
rows are there (one may be half old, half new), and a slide without the present codebook's fingerprint gets its sums from its rows when
it is next used. So it is with a new codebook. Power loss keeps no order: delete the bank then.

Size, planned for 3·10⁸ rows of D = 384 in 30,000 slides, K = 32: 2·D + 8 = 776 bytes a row = 233 GB, sums 32·K·(D + 1) = 394 kB a slide
= 12 GB. A step reads T rows a slide, 4 kB each from a cold disk, and up to 448 beside them in runs of 16, to be weighed anew.
"""

import json
import logging
import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Integer, UInt16
from torch import Tensor

from .cohort import draw_tiles
from .common import ConfigError, ModelError, StoreError, atomic, check_id, fingerprint, write_json
from .formats import unit
from .model import nearest_codeword, residual_sums

log = logging.getLogger(__name__)

VERSION = 3
BLOCKS = 8
RUN = 16  # consecutive rows that are read together beside the drawn ones
CHUNK = 8192  # rows in memory at a time when a slide is streamed


def block_of(tiles: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n"]:
    """The block of each tile number: Fibonacci hashing, which spreads consecutive numbers evenly."""
    return (tiles.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(61)


def slide_layout(tiles: int, dim: int, codewords: int) -> np.dtype:
    """The file of one slide as a record, wide fields first so that all are aligned."""
    fields = [("mark", "S16"), ("codebook", "S16"), ("sums", "f4", (BLOCKS, codewords, dim)), ("counts", "f4", (BLOCKS, codewords))]
    tile = np.dtype([("step", "i4"), ("code", "u2"), ("weight", "f2")])  # side by side: a tile's three lie on one page
    return np.dtype([*fields, ("mean", "f4", (dim,)), ("tile", tile, (tiles,)), ("rows", "f2", (tiles, dim))])


class SlideFile:
    """One slide's file, mapped; its fields are arrays of their names. What is changed is in the page cache at once."""

    def __init__(self, path: Path, dim: int, codewords: int):
        try:
            self.path, self.file = path, path.open("r+b", buffering=0)
            there = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise StoreError(f"{path}: the bank has no rows of this slide ({error.strerror}); run pretrain again") from error
        empty, one = (slide_layout(tiles, dim, codewords).itemsize for tiles in (0, 1))
        self.tiles, over = divmod(there - empty, one - empty)
        if over or self.tiles < 1:
            raise StoreError(f"{path}: {there:,} bytes are no whole slide; delete it and run again")
        self.layout = slide_layout(self.tiles, dim, codewords)
        mapped = mmap.mmap(self.file.fileno(), 0)
        mapped.madvise(mmap.MADV_RANDOM)  # rows are read here and there: no read-ahead
        record = np.frombuffer(mapped, self.layout, 1)
        self.mark, self.codebook = record["mark"], record["codebook"]  # (1,): to be assigned to
        self.sums, self.counts, self.mean = record["sums"][0], record["counts"][0], record["mean"][0]
        self.step, self.code, self.weight = (record["tile"][0][name] for name in ("step", "code", "weight"))
        self.rows = record["rows"][0]

    def gather(self, index: Integer[np.ndarray, "n"]) -> Float16[np.ndarray, "n D"]:
        """Rows in the order asked. All are announced first, so that a cold disk serves them together (~125 times plain mmap, measured)."""
        if hasattr(os, "posix_fadvise"):
            first, size = self.layout.fields["rows"][1], self.rows.strides[0]
            for row in index.tolist():
                os.posix_fadvise(self.file.fileno(), first + row * size, size, os.POSIX_FADV_WILLNEED)
        return self.rows.take(index, axis=0)

    def stream(self) -> Iterator[tuple[slice, Float16[np.ndarray, "n D"]]]:
        """All rows a chunk at a time, read as a file (with read-ahead) and not through the mapping, whose pages would stay in memory."""
        (first, dim) = self.layout.fields["rows"][1], self.rows.shape[1]
        for start in range(0, self.tiles, CHUNK):
            span = slice(start, min(start + CHUNK, self.tiles))
            found = np.fromfile(self.path, np.float16, (span.stop - start) * dim, offset=first + start * dim * 2)
            yield span, found.reshape(-1, dim)


@dataclass(frozen=True)
class Rest:
    """What the bank gives of one slide beside its T drawn tiles."""

    slide: SlideFile
    tiles: Integer[np.ndarray, "n"]  # the drawn ones, then those whose rows were asked for beside them
    old: Float16[np.ndarray, "n D"]  # their rows, read this once
    age: Integer[np.ndarray, "n"]  # the step at which each was written
    total: Float32[np.ndarray, "D"]  # sum of all other tiles' features
    others: tuple[Float[Tensor, "G K D"], Float[Tensor, "G K"]]  # residual sums and counts of all other tiles, block by block
    used: Integer[np.ndarray, "g"]  # the blocks that this step uses
    sums: Float[Tensor, "K D"]  # of the tiles used
    counts: Float[Tensor, "K"]  # of the tiles used

    def rows(self) -> tuple[Float16[np.ndarray, "n D"], Float16[np.ndarray, "n"]]:
        """Features and weights of the tiles used, for an aggregator that needs them: reads O(M) rows."""
        tiles = np.arange(self.slide.tiles)
        chosen = np.isin(block_of(tiles), self.used)
        chosen[self.tiles] = False
        return self.slide.gather(tiles[chosen]), self.slide.weight[chosen]


class MemoryBank:
    """Features of all tiles of all slides on disk, with residual sums kept up to date.

    A process works on the slides it owns; nobody else may write them. Not safe for two threads on one slide.

    Args:
        folder: of the bank; `create` makes it.
        dim, codewords: D and K.
        encoder: fingerprint of the tile encoder that the run starts from.

    Raises StoreError: a bank is there that was made with another D, K or encoder, or bank.json is damaged.
    """

    def __init__(self, folder: Path, *, dim: int, codewords: int, encoder: str):
        self.folder, self.dim, self.codewords_count = Path(folder), dim, codewords
        self.codewords: Float[Tensor, "K D"] | None = None
        self.codebook = b""
        self._header, path = {"version": VERSION, "dim": dim, "codewords": codewords, "encoder": encoder}, self.folder / "bank.json"
        if not path.exists():
            return
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); delete the folder and run again") from error
        for key, value in self._header.items():
            if there.get(key) != value:
                raise StoreError(f"{folder}: made with {key} {there.get(key)}, asked for {value}; use another --out, or delete it")

    def create(self) -> None:
        """Write bank.json where there is none."""
        if not (self.folder / "bank.json").exists():
            write_json(self.folder / "bank.json", self._header)

    def _path(self, slide: str) -> Path:
        return self.folder / f"{check_id(slide, str(self.folder))}.bank"

    def has(self, slide: str, tiles: int, mark: str) -> bool:
        """Whether the rows of these very tiles are here; `mark` is their fingerprint. A file of another size or mark counts as none."""
        try:
            found = self._file(slide)
        except StoreError:
            return False
        return bool(found.tiles == tiles and found.mark[0] == mark.encode())

    def _file(self, slide: str) -> SlideFile:
        return SlideFile(self._path(slide), self.dim, self.codewords_count)

    def _open(self, slide: str) -> SlideFile:
        """The slide's file, its sums fit for use."""
        found = self._file(slide)
        if self.codewords is not None and found.codebook[0] != self.codebook:
            self._rebuild(found)
        return found

    # writing

    def fill(self, slide: str, features: np.ndarray | Iterable[np.ndarray], tiles: int, mark: str, step: int = 0) -> None:
        """Write all rows of a slide, given whole (M, D) or in parts (n, D) one after another; works before there is a codebook.

        Raises DiskError: it cannot be written; StoreError: a wrong number of rows or width; ModelError: features that are not finite.
        """
        path, layout = self._path(slide), slide_layout(tiles, self.dim, self.codewords_count)
        first, total = 0, np.zeros(self.dim)
        with atomic(path) as part:
            with part.open("w+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, layout.itemsize)  # a mapped write to a full disk would kill the process
                file.truncate(layout.itemsize)
                file.seek(layout.fields["rows"][1])
                for rows in [features] if isinstance(features, np.ndarray) else features:
                    rounded = self._rounded(slide, rows)
                    first += len(rounded)
                    file.write(np.ascontiguousarray(rounded).data)
                    total += rounded.sum(0, dtype=np.float64)
            if first != tiles:
                raise StoreError(f"{self.folder}: slide {slide}: {first} features for {tiles} tiles; tile it again")
            new = SlideFile(part, self.dim, self.codewords_count)
            new.mark[0], new.mean[:], new.step[:] = mark, total / tiles, step

    def _rounded(self, slide: str, features: np.ndarray) -> Float16[np.ndarray, "n D"]:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise StoreError(f"{self.folder}: slide {slide}: features of shape {features.shape}; the bank has D {self.dim}")
        with np.errstate(over="ignore"):
            rounded = features.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise ModelError(f"{self.folder}: slide {slide}: features that are not finite, or too large for float16; is the encoder sound?")
        return rounded

    def set_codebook(self, codewords: Float32[np.ndarray, "K D"], weigh: Callable[[Tensor], Tensor] | None = None) -> None:
        """Use these codewords from now on: a slide's rows are assigned to them, and its sums built, when it is next used.

        Args:
            weigh: gives rows (n, D) their weights then, on any thread; without, they weigh 1.
        """
        assert codewords.shape == (self.codewords_count, self.dim)
        self.codewords = torch.from_numpy(codewords.copy())
        self.codebook = fingerprint(codewords.tobytes().hex()).encode()
        self.weigh = weigh or (lambda rows: rows.new_ones(len(rows)))

    def _rebuild(self, slide: SlideFile) -> None:
        """Recompute codes, weights, sums and counts of a slide from its rows."""
        assert self.codewords is not None, "set a codebook first"
        slide.codebook[0] = b""
        sums, counts, total = np.zeros(slide.sums.shape), np.zeros(slide.counts.shape), np.zeros(self.dim)  # float64 over many chunks
        for span, rows in slide.stream():
            features = torch.from_numpy(rows).float()
            slide.code[span], slide.weight[span] = nearest_codeword(features, self.codewords).numpy(), self.weigh(features).numpy()
            total += rows.sum(0, dtype=np.float64)
            more, new = self._block_sums(np.arange(span.start, span.stop), rows, slide.code[span], slide.weight[span])
            sums += more.numpy()
            counts += new.numpy()
        slide.sums[:], slide.counts[:], slide.mean[:] = sums, counts, total / slide.tiles
        slide.codebook[0] = self.codebook

    def _block_sums(self, tiles: np.ndarray, rows: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> tuple[Tensor, Tensor]:
        blocks, words = torch.from_numpy(block_of(tiles).astype(np.int64)), torch.from_numpy(codes.astype(np.int64))
        weights = torch.from_numpy(weights.astype(np.float32))
        return residual_sums(torch.from_numpy(rows), words, self.codewords, weights=weights, part_of=blocks, parts=BLOCKS)

    # a training step

    def rest(self, slide: str, drawn: Integer[np.ndarray, "T"], share: float, rng: np.random.Generator, beside: int = 0) -> Rest:
        """The slide's other tiles: its running sums less the drawn rows, and the blocks drawn to be used, a `share` of them in the mean.

        Args:
            beside: so many other tiles at most, of the blocks used and in short runs, are taken out of the sums too and their rows read.
        """
        found = self._open(slide)
        assert len(np.unique(drawn)) == len(drawn), f"{slide}: a tile is drawn twice"
        wanted = share * BLOCKS
        count = int(wanted) + int(rng.random() < wanted % 1)
        used = np.sort(rng.choice(BLOCKS, count, replace=False))
        tiles = drawn
        if beside and count:
            runs, needed = -(-found.tiles // RUN), -(-beside * BLOCKS // (RUN * count))  # of a run the rows of the blocks used
            runs = rng.permutation(runs) if runs <= needed else rng.choice(runs, needed, replace=False)
            some = (runs[:, None] * RUN + np.arange(RUN)).ravel()
            some = some[(some < found.tiles) & np.isin(block_of(some), used) & ~np.isin(some, drawn)]
            tiles = np.concatenate([drawn, some[:beside]])
        old = found.gather(tiles)
        sums, counts = self._block_sums(tiles, old, found.code[tiles], found.weight[tiles])
        sums, counts = torch.from_numpy(found.sums) - sums, torch.from_numpy(found.counts) - counts
        gone = counts <= 1e-6 * torch.from_numpy(found.counts)
        sums[gone] = counts[gone] = 0  # no rounding noise where nothing is left
        total = found.tiles * found.mean - old.sum(0, dtype=np.float32)
        return Rest(found, tiles, old, found.step[tiles], total, (sums, counts), used, sums[used].sum(0), counts[used].sum(0))

    def write(
        self, rest: Rest, features: Float[np.ndarray, "T D"], codes: UInt16[np.ndarray, "n"], weights: Float16[np.ndarray, "n"], step: int
    ) -> Float32[np.ndarray, "T"]:
        """Put fresh features in the place of the first T rows of `rest`, and new codewords and weights beside all n of them.

        The new sums are the other tiles' and theirs. Returns the cosine between old and new row of each of the T: how far the encoder
        has drifted since they were written.
        Raises ModelError: features that are not finite.
        """
        slide = rest.slide
        new, T = self._rounded(slide.path.stem, features), len(features)
        rows = np.concatenate([new, rest.old[T:]])
        sums, counts = self._block_sums(rest.tiles, rows, codes, weights)
        slide.codebook[0] = b""
        slide.rows[rest.tiles[:T]], slide.step[rest.tiles[:T]] = new, step
        slide.code[rest.tiles], slide.weight[rest.tiles] = codes, weights
        slide.sums[:], slide.counts[:] = (rest.others[0] + sums).numpy(), (rest.others[1] + counts).numpy()
        slide.mean[:] = (rest.total + rows.sum(0, dtype=np.float32)) / slide.tiles
        slide.codebook[0] = self.codebook
        return (unit(rest.old[:T].astype(np.float32)) * unit(new.astype(np.float32))).sum(1)

    # looking

    def read(self, slide: str, index: Integer[np.ndarray, "n"]) -> tuple[Float16[np.ndarray, "n D"], UInt16[np.ndarray, "n"]]:
        """Rows and codewords of some tiles of a slide, in the order asked."""
        found = self._open(slide)
        return found.gather(index), found.code[index]

    def mean(self, slide: str) -> Float32[np.ndarray, "D"]:
        """A slide's mean feature; no row is read, and none was ever needed: `fill` and `write` keep it."""
        return self._file(slide).mean.copy()

    def sample(self, slides: Sequence[str], per_slide: int, seed: int) -> Float32[np.ndarray, "n D"]:
        """The same number of rows of each slide (all, where it has fewer), drawn alike however slides are dealt to ranks."""
        drawn = [np.empty((0, self.dim), np.float32)]
        for slide in slides:
            rng, found = np.random.default_rng([seed, zlib.crc32(slide.encode())]), self._file(slide)
            drawn.append(found.gather(draw_tiles(found.tiles, per_slide, rng)).astype(np.float32))
        return np.concatenate(drawn)


def fit_codebook(
    rows: Float32[np.ndarray, "n D"], K: int, *, seed: int, start: Float32[np.ndarray, "K D"] | None = None
) -> Float32[np.ndarray, "K D"]:
    """K-means of bank rows from `start`, or the best of 3 by k-means++. Logs occupancy and inertia.

    A codeword that ends without rows moves to the row farthest from its own codeword.
    Raises ConfigError: fewer than K distinct rows.
    """
    from sklearn.cluster import KMeans

    distinct = len(np.unique(np.ascontiguousarray(rows).view(np.dtype((np.void, rows[:1].nbytes))))) if len(rows) else 0
    if distinct < K:
        there = f"the {len(rows):,} sampled tile features have {distinct} distinct values"
        raise ConfigError(f"{K} codewords asked for, but {there}; use fewer codewords")
    model = KMeans(K, init="k-means++" if start is None else start, n_init=3 if start is None else 1, random_state=seed)
    codewords, features = torch.from_numpy(model.fit(rows).cluster_centers_.astype(np.float32)), torch.from_numpy(rows)
    for _ in range(K):
        codes = nearest_codeword(features, codewords)
        occupancy, distance = torch.bincount(codes, minlength=K), (features - codewords[codes]).square().sum(1)
        if occupancy.all():
            break
        codewords[occupancy.argmin()] = features[distance.argmax()]
    share = occupancy / len(rows)
    found = K, len(rows), distance.mean(), share.min(), share.max()
    log.info("codebook: %d codewords from %d rows, mean squared distance %.4g, share of rows per codeword %.2g to %.2g", *found)
    return codewords.numpy()
