"""MemoryBank: the newest feature of every tile of every slide, on disk, and each slide's residual sums beside them.

The residual encoding of a slide sums over all its M tiles. The bank keeps that sum, so a training step takes out the T old
rows it replaces, puts T fresh ones in, and never touches the other M − T: its cost does not depend on M.

Files of one shard, plain arrays in C order: `rows.f16` (ΣM, D) features · `step.i32` (ΣM,) step at which a row was written, −1
never · `code.u16` (ΣM,) nearest codeword · `sums.f32` (S, K, D) Σ (row − codeword) · `counts.i32` (S, K) · `state.u8` (S,) empty,
clean or dirty · `codebook.npz`. `bank.json` at the top says which slide lies where; it is written last, so a header means a whole bank.

Crashes. A slide is marked dirty before its write and clean after it. Stores into a shared mapping reach the page cache in program
order and outlive the process, so after SIGKILL at any moment the rows are there (one may be half old, half new) and only
sums of slides marked dirty can be wrong: `open` rebuilds those from their rows. Power loss keeps no order: call `rebuild` then.

Size, planned for 3·10⁸ rows of D = 384 in 30,000 slides, K = 32: 2·D + 6 = 774 bytes a row = 232 GB, sums 4·K·D = 49 kB a slide = 1.5 GB.
Rebuilding everything reads the 230 GB once (4 min at 1 GB/s) and multiplies twice with the codewords (4·K·D flop a row = 15 TFLOP,
2.5 min at 100 GFLOP/s); shards divide both. A row of a cold bank costs one 4 kB read: the mapping is MADV_RANDOM (no
read-ahead), and the rows of a gather are announced with posix_fadvise before the first is touched, so that the disk
serves them together (measured ~125× plain mmap). Mapped pages are let go every few thousand rows, so RSS stays flat whatever the size.
"""

import json
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Float32, Int, Int32, UInt16

from .errors import StoreError
from .files import atomic, write_json

log = logging.getLogger(__name__)

VERSION = 1
EMPTY, CLEAN, DIRTY = 0, 1, 2  # state of a slide
_CHUNK = 8192  # rows in memory at a time when a slide is streamed
_RESIDENT = 2048  # rows touched through the mapping before its pages are let go (each maps up to 64 kB)


def _layout(tiles: int, slides: int, dim: int, codewords: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    return {
        "rows.f16": (np.float16, (tiles, dim)),
        "step.i32": (np.int32, (tiles,)),
        "code.u16": (np.uint16, (tiles,)),
        "sums.f32": (np.float32, (slides, codewords, dim)),
        "counts.i32": (np.int32, (slides, codewords)),
        "state.u8": (np.uint8, (slides,)),
    }


def _bytes(dtype: type, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def bank_bytes(spans: Mapping[str, int], dim: int, codewords: int) -> int:
    """Bytes on disk of a bank for these slides (id → M), D = `dim` and K = `codewords`."""
    return sum(_bytes(*file) for file in _layout(sum(spans.values()), len(spans), dim, codewords).values())


def nearest(features: Float[np.ndarray, "n D"], codewords: Float32[np.ndarray, "K D"]) -> UInt16[np.ndarray, "n"]:
    """The nearest codeword of each row: argmin of |c|² − 2 x·c."""
    scores = features.astype(np.float32) @ codewords.T
    return ((codewords**2).sum(1) - 2 * scores).argmin(1).astype(np.uint16)


def _residual_sums(
    rows: Float[np.ndarray, "n D"], codes: Int[np.ndarray, "n"], codewords: Float32[np.ndarray, "K D"]
) -> tuple[Float32[np.ndarray, "K D"], Int32[np.ndarray, "K"]]:
    residuals = rows.astype(np.float32) - codewords[codes]
    members = (codes == np.arange(len(codewords))[:, None]).astype(np.float32)  # (K, n): one BLAS product sums them all
    return members @ residuals, np.bincount(codes, minlength=len(codewords)).astype(np.int32)


class _Shard:
    """The mapped files of one shard."""

    def __init__(self, folder: Path, spans: dict[str, int], dim: int, codewords: int):
        self.folder = folder
        self.spans = spans
        self.start = dict(zip(spans, np.cumsum([0, *spans.values()]).tolist()))  # first row of each slide
        self.number = {slide: i for i, slide in enumerate(spans)}
        self.dim = dim
        self._maps: list[mmap.mmap] = []
        self._touched = 0
        arrays = {name: self._map(name, *file) for name, file in _layout(sum(spans.values()), len(spans), dim, codewords).items()}
        self.rows, self.step, self.code, self.sums, self.counts, self.state = arrays.values()
        self.codewords: np.ndarray | None = None
        self.codebook = ""
        if (folder / "codebook.npz").exists():
            with np.load(folder / "codebook.npz", allow_pickle=False) as file:
                self.codewords, self.codebook = file["codewords"], str(file["fingerprint"])

    @staticmethod
    def allocate(folder: Path, spans: Mapping[str, int], dim: int, codewords: int, sparse: bool) -> None:
        """Create the files and take their disk space now: a mapped write to a full disk would kill the process."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "codebook.npz").unlink(missing_ok=True)
        layout = _layout(sum(spans.values()), len(spans), dim, codewords)
        try:
            for name, file in layout.items():
                with (folder / name).open("wb") as stream:
                    if (sparse and name == "rows.f16") or not hasattr(os, "posix_fallocate"):
                        stream.truncate(_bytes(*file))
                    else:
                        os.posix_fallocate(stream.fileno(), 0, _bytes(*file))
        except OSError as error:
            for name in layout:
                (folder / name).unlink(missing_ok=True)
            need, free = sum(_bytes(*file) for file in layout.values()) / 1e9, shutil.disk_usage(folder).free / 1e9
            raise StoreError(
                f"{folder}: the bank needs {need:.3g} GB, {free:.3g} GB are free ({error.strerror}); make room, or use fewer tiles"
            ) from error

    def _map(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        path, size = self.folder / name, _bytes(dtype, shape)
        if not path.exists() or path.stat().st_size != size:
            there = f"{path.stat().st_size:,} bytes" if path.exists() else "not there"
            raise StoreError(f"{path}: should be {size:,} bytes but is {there}; delete the bank and run again")
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
            if name == "rows.f16":
                self._descriptor = os.dup(file.fileno())
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        self._maps.append(mapped)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def __del__(self):
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def announce(self, rows: np.ndarray) -> None:
        """Ask the kernel for these rows all at once, before they are read one after another."""
        if hasattr(os, "posix_fadvise"):
            size = self.dim * 2
            for row in rows.tolist():
                os.posix_fadvise(self._descriptor, row * size, size, os.POSIX_FADV_WILLNEED)

    def touched(self, rows: int) -> None:
        """Let mapped pages go now and then: they stay in the page cache (and reach the disk) but leave our RSS."""
        self._touched += rows
        if self._touched >= _RESIDENT and hasattr(mmap, "MADV_DONTNEED"):
            self._touched = 0
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def stream(self, start: int, stop: int) -> Iterable[tuple[slice, np.ndarray]]:
        """Rows in order, a chunk at a time, read as a file (with read-ahead) and not through the mapping."""
        for first in range(start, stop, _CHUNK):
            span = slice(first, min(first + _CHUNK, stop))
            count, offset = (span.stop - first) * self.dim, first * self.dim * 2
            yield span, np.fromfile(self.folder / "rows.f16", np.float16, count, offset=offset).reshape(-1, self.dim)

    def flush(self) -> None:
        for mapped in self._maps:
            mapped.flush()


class MemoryBank:
    """Features of all tiles of all slides on disk, with residual sums kept up to date.

    A shard is written by one process only; a process opens the shards it owns. Not safe for two threads on one slide.
    """

    def __init__(self, folder: Path, header: dict[str, Any], shards: Iterable[int]):
        self.folder = folder
        self.dim: int = header["dim"]
        self.header = header
        dealt: dict[int, dict[str, int]] = {i: {} for i in shards}
        for slide, (tiles, shard) in header["spans"].items():
            if shard in dealt:
                dealt[shard][slide] = tiles
        self._shards = {
            i: _Shard(folder / header["shards"][i], spans, self.dim, header["codewords"]) for i, spans in dealt.items() if spans
        }
        self.slides: list[str] = [slide for slide, (_, shard) in header["spans"].items() if shard in dealt]

    @classmethod
    def create(
        cls,
        folder: Path,
        spans: Mapping[str, int],
        dim: int,
        codewords: int,
        *,
        encoder: str,
        grids: str,
        shards: int | Mapping[str, int] = 1,
        sparse: bool = False,
    ) -> "MemoryBank":
        """Make an empty bank, in place of any that is there, and open all of it.

        Args:
            spans: slide id → M; the order is kept.
            codewords: K.
            encoder, grids: fingerprints, checked whenever the bank is opened.
            shards: number of shards, slides dealt in turn; or slide id → shard.
            sparse: take disk space for rows as they are filled, not now.

        Raises:
            StoreError: a slide without tiles, or no room on the disk.
        """
        folder = Path(folder)
        for slide, tiles in spans.items():
            if tiles < 1:
                raise StoreError(f"{folder}: slide {slide} has {tiles} tiles; leave empty slides out")
        (folder / "bank.json").unlink(missing_ok=True)
        dealt = _deal(spans, shards)
        names = _shard_names(max(dealt.values()) + 1, ())
        spans_dealt = {slide: [tiles, dealt[slide]] for slide, tiles in spans.items()}
        header = {"version": VERSION, "dim": dim, "codewords": codewords, "encoder": encoder, "grids": grids, "shards": names}
        bank = cls._allocate(folder, header | {"spans": spans_dealt}, sparse)
        write_json(folder / "bank.json", bank.header)
        return bank

    @classmethod
    def _allocate(cls, folder: Path, header: dict[str, Any], sparse: bool) -> "MemoryBank":
        for i, name in enumerate(header["shards"]):
            spans = {slide: tiles for slide, (tiles, shard) in header["spans"].items() if shard == i}
            if spans:
                _Shard.allocate(folder / name, spans, header["dim"], header["codewords"], sparse)
        bank = cls(folder, header, range(len(header["shards"])))
        for shard in bank._shards.values():
            shard.step[:] = -1
        return bank

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        encoder: str | None = None,
        grids: str | None = None,
        dim: int | None = None,
        codewords: int | None = None,
        shards: Iterable[int] | None = None,
    ) -> "MemoryBank":
        """Open a bank, or only the given shards of it, and repair slides whose write was cut short.

        Raises:
            StoreError: no bank, a damaged one, or one made with another encoder, other grids, another D or K.
        """
        folder = Path(folder)
        try:
            header = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{folder}: no bank here (bank.json: {error}); run pretrain without --resume to make one") from error
        asked = {"version": VERSION, "encoder": encoder, "grids": grids, "dim": dim, "codewords": codewords}
        for key, value in asked.items():
            if value is not None and header.get(key) != value:
                raise StoreError(
                    f"{folder}: the bank was made with {key} {header.get(key)}, asked for {value}; use another --out, or delete it"
                )
        bank = cls(folder, header, range(len(header["shards"])) if shards is None else shards)
        for slide in bank.slides:
            shard, number, _ = bank._find(slide)
            if shard.state[number] == DIRTY:
                log.warning("%s: the write of slide %s was cut short; rebuilding its sums", folder, slide)
                bank.rebuild(slide)
        return bank

    @classmethod
    def reshard(cls, folder: Path, shards: int | Mapping[str, int]) -> "MemoryBank":
        """Deal the slides of a closed bank to other shards (copied, then the header switches over) and open all of it."""
        old = cls.open(folder)
        for orphan in set(old.folder.glob("shard-*")) - {old.folder / name for name in old.header["shards"]}:
            shutil.rmtree(orphan)  # left by a run killed while re-sharding
        dealt = _deal({slide: old.tiles(slide) for slide in old.slides}, shards)
        names = _shard_names(max(dealt.values()) + 1, old.header["shards"])
        spans = {slide: [old.tiles(slide), dealt[slide]] for slide in old.slides}
        new = cls._allocate(old.folder, old.header | {"shards": names, "spans": spans}, sparse=False)
        for shard in new._shards.values():
            if (codebook := old._codebook()) is not None:
                _save_codebook(shard, *codebook)
        for slide in old.slides:
            (source, i, rows), (target, j, there) = old._find(slide), new._find(slide)
            for span, part in source.stream(rows.start, rows.stop):
                target.rows[span.start - rows.start + there.start : span.stop - rows.start + there.start] = part
                target.touched(len(part))
            target.step[there], target.code[there] = source.step[rows], source.code[rows]
            target.sums[j], target.counts[j], target.state[j] = source.sums[i], source.counts[i], source.state[i]
        new.flush()
        write_json(old.folder / "bank.json", new.header)
        for name in old.header["shards"]:
            for file in (*_layout(0, 0, 0, 0), "codebook.npz"):
                (old.folder / name / file).unlink(missing_ok=True)
            if name != ".":
                shutil.rmtree(old.folder / name, ignore_errors=True)
        return new

    # what is there

    def _find(self, slide: str) -> tuple[_Shard, int, slice]:
        tiles, shard = self.header["spans"].get(slide, (0, None))
        if shard not in self._shards:
            raise StoreError(f"{self.folder}: slide {slide} is not in the shards opened here ({len(self.slides)} slides)")
        home = self._shards[shard]
        return home, home.number[slide], slice(home.start[slide], home.start[slide] + tiles)

    def tiles(self, slide: str) -> int:
        """M of a slide."""
        return self.header["spans"][slide][0]

    def shard_of(self, slide: str) -> int:
        """The shard that holds a slide, opened here or not."""
        return self.header["spans"][slide][1]

    def is_filled(self, slide: str) -> bool:
        """Whether every row of the slide was written."""
        shard, number, _ = self._find(slide)
        return bool(shard.state[number] != EMPTY)

    def _codebook(self) -> tuple[np.ndarray, str] | None:
        found = {shard.codebook: shard.codewords for shard in self._shards.values()}
        return None if len(found) != 1 or "" in found else next((words, name) for name, words in found.items())

    @property
    def codebook(self) -> str:
        """Fingerprint of the codebook the sums are for; empty before `set_codebook`, or where it was cut short between shards."""
        found = self._codebook()
        return "" if found is None else found[1]

    def gather(self, slide: str, index: Int[np.ndarray, "n"]) -> Float16[np.ndarray, "n D"]:
        """Rows of some tiles of a slide, in the order asked."""
        shard, _, rows = self._find(slide)
        shard.announce(index + rows.start)
        found = shard.rows.take(index + rows.start, axis=0)
        shard.touched(len(index))
        return found

    def codes(self, slide: str, index: Int[np.ndarray, "n"]) -> UInt16[np.ndarray, "n"]:
        """Codewords of some tiles of a slide."""
        shard, _, rows = self._find(slide)
        return shard.code.take(index + rows.start)

    def residuals(
        self, slide: str, index: Int[np.ndarray, "n"] | None = None, *, without: Int[np.ndarray, "n"] | None = None
    ) -> tuple[Float32[np.ndarray, "K D"], Int32[np.ndarray, "K"]]:
        """Residual sums and counts of a slide's tiles.

        All tiles (no row is read), only the tiles `index`, or all but the tiles `without` (only those rows are read). A codeword
        without tiles has a sum of exactly zero, so nothing of the bank is left once every tile is taken out.
        """
        shard, number, _ = self._find(slide)
        assert shard.codewords is not None and shard.state[number] == CLEAN, f"{slide}: no sums yet; fill it and set a codebook"
        if index is not None:
            return _residual_sums(self.gather(slide, index), self.codes(slide, index), shard.codewords)
        sums, counts = shard.sums[number].copy(), shard.counts[number].copy()
        if without is not None:
            assert len(np.unique(without)) == len(without), f"{slide}: a tile is drawn twice"
            old_sums, old_counts = self.residuals(slide, without)
            sums -= old_sums
            counts -= old_counts
            sums[counts == 0] = 0  # no rounding noise where nothing is left
        return sums, counts

    # writing

    def fill(self, slide: str, features: Float[np.ndarray, "M D"] | Iterable[np.ndarray], step: int = 0) -> None:
        """Write all rows of a slide, given whole or in parts (n, D) one after another.

        Works before there is a codebook. A slide counts as filled once all of it is written; cut short, it is filled anew.

        Raises:
            StoreError: no room on the disk (resume later), a wrong number of rows or width, or features that are not finite.
        """
        shard, number, rows = self._find(slide)
        shard.state[number] = EMPTY
        first = rows.start
        for part in [features] if isinstance(features, np.ndarray) else features:
            rounded = self._rounded(slide, part)
            if first + len(part) > rows.stop:
                raise StoreError(f"{self.folder}: slide {slide}: more features than its {self.tiles(slide)} tiles; tile it again")
            try:  # as a file: where the disk is full a mapped write would kill the process
                with (shard.folder / "rows.f16").open("r+b") as file:
                    file.seek(first * self.dim * 2)
                    file.write(rounded.tobytes())
            except OSError as error:
                free = shutil.disk_usage(self.folder).free / 1e6
                raise StoreError(
                    f"{self.folder}: slide {slide}: cannot write its rows ({error.strerror}, {free:.0f} MB free); make room, run again"
                ) from error
            first += len(part)
        if first != rows.stop:
            raise StoreError(f"{self.folder}: slide {slide}: {first - rows.start} features for {self.tiles(slide)} tiles; tile it again")
        shard.step[rows] = step
        if shard.codewords is None:
            shard.state[number] = CLEAN
        else:
            self.rebuild(slide)

    def _rounded(self, slide: str, features: np.ndarray) -> np.ndarray:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise StoreError(f"{self.folder}: slide {slide}: features of shape {features.shape}; the bank has D {self.dim}")
        with np.errstate(over="ignore"):
            rounded = features.astype(np.float16)
        if not np.isfinite(rounded).all():
            raise StoreError(f"{self.folder}: slide {slide}: features that are not finite, or too large for float16; is the encoder sound?")
        return rounded

    def set_codebook(self, codewords: Float32[np.ndarray, "K D"], fingerprint: str) -> None:
        """Assign every row to these codewords and build all sums, slide by slide in one pass over the rows.

        Cut short at any moment, the bank opens with either the old or the new codebook, its sums repaired.
        """
        expected = (self.header["codewords"], self.dim)
        if codewords.shape != expected:
            raise StoreError(f"{self.folder}: a codebook of shape {codewords.shape}; the bank was made with K, D = {expected}")
        for shard in self._shards.values():
            shard.state[shard.state == CLEAN] = DIRTY
            _save_codebook(shard, codewords, fingerprint)
        for slide in self.slides:
            if self.is_filled(slide):
                self.rebuild(slide)

    def rebuild(self, slide: str) -> None:
        """Recompute codes, sums and counts of a slide from its rows."""
        shard, number, rows = self._find(slide)
        shard.state[number] = DIRTY
        if shard.codewords is not None:
            sums, counts = np.zeros(shard.sums.shape[1:]), np.zeros(shard.counts.shape[1], np.int64)  # float64 over many chunks
            for span, part in shard.stream(rows.start, rows.stop):
                codes = shard.code[span] = nearest(part, shard.codewords)
                more, new = _residual_sums(part, codes, shard.codewords)
                sums += more
                counts += new
            shard.sums[number], shard.counts[number] = sums, counts
        shard.state[number] = CLEAN
        shard.touched(rows.stop - rows.start)

    def write(self, slide: str, index: Int[np.ndarray, "n"], features: Float[np.ndarray, "n D"], step: int) -> Float32[np.ndarray, "n"]:
        """Put fresh features in the place of some tiles' rows; sums follow the rows as rounded to float16.

        Returns the cosine between old and new row of each tile: how far the encoder has drifted since they were written.

        Raises:
            StoreError: features that are not finite, or of another width.
        """
        shard, number, rows = self._find(slide)
        new = self._rounded(slide, features)
        sums, counts = self.residuals(slide, without=index)
        codes = nearest(new, shard.codewords)
        more, more_counts = _residual_sums(new, codes, shard.codewords)
        places = index + rows.start
        old = shard.rows.take(places, axis=0).astype(np.float32)
        shard.state[number] = DIRTY
        shard.rows[places] = new
        shard.step[places] = step
        shard.code[places] = codes
        shard.sums[number] = sums + more
        shard.counts[number] = counts + more_counts
        shard.state[number] = CLEAN
        shard.touched(len(index))
        fresh = new.astype(np.float32)
        return (old * fresh).sum(1) / np.maximum(np.linalg.norm(old, axis=1) * np.linalg.norm(fresh, axis=1), 1e-12)

    def flush(self) -> None:
        """Push everything to the disk (a checkpoint's moment)."""
        for shard in self._shards.values():
            shard.flush()

    # statistics over the shards opened here

    def oldest(self, slide: str, n: int, exclude: Int[np.ndarray, "m"] | None = None) -> Int[np.ndarray, "k"]:
        """The n tiles written longest ago, oldest first, ties in row order, without those in `exclude`; fewer if there are fewer."""
        shard, _, rows = self._find(slide)
        tiles = rows.stop - rows.start
        key = shard.step[rows].astype(np.int64) * tiles + np.arange(tiles)
        if exclude is not None:
            key[exclude] = np.iinfo(np.int64).max
            tiles -= len(np.unique(exclude))
        n = min(n, tiles)
        first = np.argpartition(key, n - 1)[:n] if n else np.empty(0, np.int64)
        return first[np.argsort(key[first])]

    def age(self, step: int) -> dict[str, float]:
        """Steps since a row was written, over all filled slides: mean, 95th percentile (of 1,024 bins) and largest."""
        width = step // 1024 + 1
        bins, total, largest = np.zeros(1025, np.int64), 0, 0
        for slide in self.slides:
            if self.is_filled(slide):
                shard, _, rows = self._find(slide)
                ages = step - shard.step[rows].astype(np.int64)
                bins += np.bincount(ages // width, minlength=1025)
                total, largest = total + int(ages.sum()), max(largest, int(ages.max()))
        tiles = max(int(bins.sum()), 1)
        p95 = int(np.searchsorted(bins.cumsum(), 0.95 * tiles)) * width
        return {"mean": total / tiles, "p95": float(p95), "max": float(largest)}

    def sample(self, per_slide: int, seed: int) -> Float32[np.ndarray, "n D"]:
        """The same number of rows of every filled slide (all, where it has fewer), drawn alike however slides are dealt to shards."""
        drawn = [np.empty((0, self.dim), np.float32)]
        for slide in self.slides:
            if self.is_filled(slide):
                rng = np.random.default_rng([seed, zlib.crc32(slide.encode())])
                index = rng.choice(self.tiles(slide), min(per_slide, self.tiles(slide)), replace=False)
                drawn.append(self.gather(slide, np.sort(index)).astype(np.float32))
        return np.concatenate(drawn)

    def slide_means(self) -> Float32[np.ndarray, "S D"]:
        """Mean feature of each filled slide, from the sums: no row is read."""
        means = [np.empty((0, self.dim), np.float32)]
        for slide in self.slides:
            if self.is_filled(slide):
                shard, _, _ = self._find(slide)
                sums, counts = self.residuals(slide)
                means.append(((sums.sum(0) + counts @ shard.codewords) / counts.sum()).astype(np.float32)[None])
        return np.concatenate(means)

    def mean(self) -> Float32[np.ndarray, "D"]:
        """Mean over slides of their mean feature (equal weight per slide)."""
        return self.slide_means().mean(0)


def _deal(spans: Mapping[str, int], shards: int | Mapping[str, int]) -> dict[str, int]:
    return {slide: i % shards if isinstance(shards, int) else shards[slide] for i, slide in enumerate(spans)}


def _shard_names(count: int, taken: Iterable[str]) -> list[str]:
    """Folders of the shards: the bank's own for a single one, else the next free numbers."""
    if count == 1 and "." not in taken:
        return ["."]
    first = max([int(name[6:]) + 1 for name in taken if name != "."], default=0)
    return [f"shard-{first + i:03d}" for i in range(count)]


def _save_codebook(shard: _Shard, codewords: np.ndarray, fingerprint: str) -> None:
    with atomic(shard.folder / "codebook.npz") as part, part.open("wb") as file:
        np.savez(file, codewords=codewords, fingerprint=np.array(fingerprint))
    shard.codewords, shard.codebook = codewords, fingerprint
