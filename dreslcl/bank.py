"""MemoryBank: the newest feature of every tile of every slide, on disk, and each slide's residual sums beside them.

The residual encoding of a slide sums over all its M tiles. The bank keeps that sum, so a training step takes out the T old
rows it replaces, puts T fresh ones in, and never touches the other M − T: its cost does not depend on M.

`bank.json` says which slide lies in which shard (a folder, or the bank's own where there is one; see shard.py for its files). It is
written last, so a header means a whole bank. Each shard is written by one process only.

Crashes. A slide is marked dirty before its write and clean after it. Stores into a shared mapping reach the page cache in program
order and outlive the process, so after SIGKILL at any moment the rows are there (one may be half old, half new) and only the sums
of slides marked dirty can be wrong: `open` rebuilds those from their rows. Power loss keeps no order: call `rebuild` then.

Size, planned for 3·10⁸ rows of D = 384 in 30,000 slides, K = 32: 2·D + 6 = 774 bytes a row = 232 GB, sums 4·K·D = 49 kB a slide = 1.5 GB.
Rebuilding everything reads the 230 GB once (4 min at 1 GB/s) and multiplies twice with the codewords (4·K·D flop a row, 15 TFLOP): at
350,000 rows/s, measured on 2 shared cores, 14 min; shards divide both. A step reads T rows a slide, 4 kB each from a cold disk:
B·T = 512 rows are 2 MB.
"""

import json
import logging
import mmap
import os
import shutil
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Float, Float16, Float32, Int32, Integer, UInt16

from .common import StoreError, atomic, write_json

EMPTY, CLEAN, DIRTY = 0, 1, 2  # state of a slide
CHUNK = 8192  # rows in memory at a time when many are read
RESIDENT = 1 << 30  # bytes of mapped pages before they are let go
TOUCHES = 64  # rows between two looks at how much is mapped
STATM = Path("/proc/self/statm")


def file_layout(tiles: int, slides: int, dim: int, codewords: int) -> dict[str, tuple[type, tuple[int, ...], int]]:
    """Type, shape and bytes of each file of a shard."""
    layout = {
        "rows.f16": (np.float16, (tiles, dim)),
        "step.i32": (np.int32, (tiles,)),
        "code.u16": (np.uint16, (tiles,)),
        "sums.f32": (np.float32, (slides, codewords, dim)),
        "counts.i32": (np.int32, (slides, codewords)),
        "state.u8": (np.uint8, (slides,)),
    }
    return {name: (dtype, shape, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize) for name, (dtype, shape) in layout.items()}


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, without BLAS threads where it is small: waking them on a busy machine took 24 ms for a product of 0.1 ms (measured)."""
    small = a.size * b.shape[1] <= 1 << 23
    return np.einsum("ij,jk->ik", a, b) if small else a @ b


def nearest(features: Float[np.ndarray, "n D"], codewords: Float32[np.ndarray, "K D"]) -> UInt16[np.ndarray, "n"]:
    """The nearest codeword of each row: argmin of |c|² − 2 x·c."""
    return ((codewords**2).sum(1) - 2 * _product(features.astype(np.float32), codewords.T)).argmin(1).astype(np.uint16)


def sum_residuals(
    rows: Float[np.ndarray, "n D"], codes: Integer[np.ndarray, "n"], codewords: Float32[np.ndarray, "K D"]
) -> tuple[Float32[np.ndarray, "K D"], Int32[np.ndarray, "K"]]:
    """Residual sums and counts of some rows; exactly zero for a codeword without rows."""
    residuals = rows.astype(np.float32) - codewords[codes]
    members = (codes == np.arange(len(codewords))[:, None]).astype(np.float32)  # (K, n): one product sums them all
    return _product(members, residuals), np.bincount(codes, minlength=len(codewords)).astype(np.int32)


def _mapped_bytes() -> int:
    """Bytes of files that are mapped into this process and in its memory; 0 where the system does not tell (Linux does)."""
    return int(STATM.read_text().split()[2]) * mmap.PAGESIZE if STATM.exists() else 0


class Shard:
    """The mapped files of one shard; rows are numbered over all its slides."""

    def __init__(self, folder: Path, spans: Mapping[str, int], dim: int, codewords: int):
        self.folder, self.dim = folder, dim
        self.number = {slide: i for i, slide in enumerate(spans)}
        self.start = dict(zip(spans, np.cumsum([0, *spans.values()]).tolist()))  # first row of each slide
        self._maps: list[mmap.mmap] = []
        self._touched, self._mapped = 0, _mapped_bytes()
        arrays = [self._map(name, *file) for name, file in file_layout(sum(spans.values()), len(spans), dim, codewords).items()]
        self.rows, self.step, self.code, self.sums, self.counts, self.state = arrays
        self._file = (folder / "rows.f16").open("r+b", buffering=0)
        weakref.finalize(self, self._file.close)
        self.codewords: np.ndarray | None = None
        self.codebook = ""
        if (folder / "codebook.npz").exists():
            with np.load(folder / "codebook.npz", allow_pickle=False) as file:
                self.codewords, self.codebook = file["codewords"], str(file["fingerprint"])

    def _map(self, name: str, dtype: type, shape: tuple[int, ...], size: int) -> np.ndarray:
        path = self.folder / name
        there = path.stat().st_size if path.exists() else 0
        if there != size:
            raise StoreError(f"{path}: should hold {size:,} bytes, has {there:,}; the bank is damaged, delete it and run again")
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        self._maps.append(mapped)
        return np.frombuffer(mapped, dtype).reshape(shape)

    @staticmethod
    def allocate(folder: Path, spans: Mapping[str, int], dim: int, codewords: int, sparse: bool) -> None:
        """Create the files and take their disk space now: a mapped write to a full disk would kill the process.

        Raises:
            StoreError: no room; what was created is removed again.
        """
        folder.mkdir(parents=True, exist_ok=True)
        layout = file_layout(sum(spans.values()), len(spans), dim, codewords)
        try:
            for name, (_, _, size) in layout.items():
                with (folder / name).open("wb") as file:
                    if (sparse and name == "rows.f16") or not hasattr(os, "posix_fallocate"):
                        file.truncate(size)
                    else:
                        os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            for name in layout:
                (folder / name).unlink(missing_ok=True)
            need, free = (f"{size / 1e9:.3g} GB" for size in (sum(size for *_, size in layout.values()), shutil.disk_usage(folder).free))
            raise StoreError(
                f"{folder}: the bank needs {need}, {free} are free ({error.strerror}); make room or use fewer tiles"
            ) from error

    def gather(self, rows: Integer[np.ndarray, "n"]) -> Float16[np.ndarray, "n D"]:
        """Rows in the order asked."""
        if hasattr(os, "posix_fadvise"):
            size = self.dim * 2
            for row in rows.tolist():
                os.posix_fadvise(self._file.fileno(), row * size, size, os.POSIX_FADV_WILLNEED)
        found = self.rows.take(rows, axis=0)
        self.touched(len(rows))
        return found

    def touched(self, rows: int) -> None:
        """Count rows used through the mapping; let mapped pages go now and then."""
        self._touched += rows
        if self._touched < TOUCHES:
            return
        self._touched, now = 0, _mapped_bytes()
        if now - self._mapped > RESIDENT:
            for mapped in self._maps:  # of a shared mapping: changed pages stay in the page cache and reach the disk
                mapped.madvise(mmap.MADV_DONTNEED)
            now = self._mapped = _mapped_bytes()
        self._mapped = min(self._mapped, now)

    def stream(self, rows: slice) -> Iterator[tuple[slice, Float16[np.ndarray, "n D"]]]:
        """Consecutive rows a chunk at a time, read as a file (with read-ahead) and not through the mapping."""
        for first in range(rows.start, rows.stop, CHUNK):
            span = slice(first, min(first + CHUNK, rows.stop))
            count, offset = (span.stop - first) * self.dim, first * self.dim * 2
            yield span, np.fromfile(self.folder / "rows.f16", np.float16, count, offset=offset).reshape(-1, self.dim)

    def put(self, first: int, part: Float16[np.ndarray, "n D"]) -> None:
        """Write consecutive rows as a file, so that a full disk is an OSError."""
        left = memoryview(np.ascontiguousarray(part)).cast("B")
        self._file.seek(first * self.dim * 2)
        while left:
            left = left[self._file.write(left) :]

    def set_codebook(self, codewords: Float32[np.ndarray, "K D"], fingerprint: str) -> None:
        """Keep other codewords; the caller rebuilds the sums, or `open` does, since all slides are marked dirty first."""
        self.state[self.state == CLEAN] = DIRTY
        with atomic(self.folder / "codebook.npz") as part, part.open("wb") as file:
            np.savez(file, codewords=codewords, fingerprint=np.array(fingerprint))
        self.codewords, self.codebook = codewords, fingerprint

    def rebuild(self, slide: int, rows: slice) -> None:
        """Recompute codes, sums and counts of a slide, given by its number, from its rows."""
        self.state[slide] = DIRTY
        if self.codewords is not None:
            sums, counts = np.zeros(self.sums.shape[1:]), np.zeros(self.counts.shape[1], np.int64)  # float64 over many chunks
            for span, part in self.stream(rows):
                codes = self.code[span] = nearest(part, self.codewords)
                more, new = sum_residuals(part, codes, self.codewords)
                sums += more
                counts += new
            self.sums[slide], self.counts[slide] = sums, counts
        self.state[slide] = CLEAN
        self.touched(1 + (rows.stop - rows.start) // CHUNK)

    def flush(self) -> None:
        """Push changed pages to the disk."""
        for mapped in self._maps:
            mapped.flush()


log = logging.getLogger(__name__)

VERSION = 1


def bank_bytes(spans: Mapping[str, int], dim: int, codewords: int) -> int:
    """Bytes on disk of a bank for these slides (id → M), D = `dim` and K = `codewords`."""
    return sum(size for *_, size in file_layout(sum(spans.values()), len(spans), dim, codewords).values())


class MemoryBank:
    """Features of all tiles of all slides on disk, with residual sums kept up to date.

    A process opens the shards it owns; nobody else may have them open. Not safe for two threads on one slide.
    """

    def __init__(self, folder: Path, header: dict[str, Any], shards: Iterable[int]):
        self.folder, self.header = folder, header
        self.dim: int = header["dim"]
        dealt: dict[int, dict[str, int]] = {i: {} for i in shards}
        for slide, (tiles, shard) in header["spans"].items():
            if shard in dealt:
                dealt[shard][slide] = tiles
        names, K = header["shards"], header["codewords"]
        self._shards = {i: Shard(folder / names[i], spans, self.dim, K) for i, spans in dealt.items() if spans}
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
        _remove_shards(folder, keep=())
        header = {"version": VERSION, "dim": dim, "codewords": codewords, "encoder": encoder, "grids": grids}
        bank = cls._allocate(folder, header, spans, shards, (), sparse)
        write_json(folder / "bank.json", bank.header)
        return bank

    @classmethod
    def _allocate(
        cls,
        folder: Path,
        header: dict[str, Any],
        spans: Mapping[str, int],
        shards: int | Mapping[str, int],
        taken: Iterable[str],
        sparse: bool,
    ) -> "MemoryBank":
        """Deal slides to shards in folders whose names are not taken, and create the files but not the header."""
        dealt = {slide: i % shards if isinstance(shards, int) else shards[slide] for i, slide in enumerate(spans)}
        count, first = max(dealt.values()) + 1, max([int(name[6:]) + 1 for name in taken if name != "."], default=0)
        names = ["."] if count == 1 and "." not in taken else [f"shard-{first + i:03d}" for i in range(count)]
        for i, name in enumerate(names):
            own = {slide: tiles for slide, tiles in spans.items() if dealt[slide] == i}
            if own:
                Shard.allocate(folder / name, own, header["dim"], header["codewords"], sparse)
        header = header | {"shards": names, "spans": {slide: [tiles, dealt[slide]] for slide, tiles in spans.items()}}
        bank = cls(folder, header, range(count))
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
            header = dict(json.loads((folder / "bank.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{folder}: no bank here (bank.json: {error}); run pretrain without --resume to make one") from error
        asked = {"version": VERSION, "encoder": encoder, "grids": grids, "dim": dim, "codewords": codewords}
        for key, value in asked.items():
            if value is not None and header.get(key) != value:
                raise StoreError(
                    f"{folder}: the bank was made with {key} {header.get(key)}, asked for {value}; use another --out, or delete it"
                )
        try:
            bank = cls(folder, header, range(len(header["shards"])) if shards is None else shards)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
            raise StoreError(f"{folder}: the bank cannot be opened ({type(error).__name__}: {error}); mend or delete it") from error
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
        _remove_shards(old.folder, keep=old.header["shards"])  # left by a run killed while re-sharding
        spans = {slide: old.tiles(slide) for slide in old.slides}
        new = cls._allocate(old.folder, old.header, spans, shards, old.header["shards"], sparse=False)
        if old.codebook:
            for shard in new._shards.values():
                shard.set_codebook(next(iter(old._shards.values())).codewords, old.codebook)
        for slide in old.slides:
            (source, i, rows), (target, j, there) = old._find(slide), new._find(slide)
            for span, part in source.stream(rows):
                target.put(span.start - rows.start + there.start, part)
            target.step[there], target.code[there] = source.step[rows], source.code[rows]
            target.sums[j], target.counts[j], target.state[j] = source.sums[i], source.counts[i], source.state[i]
        new.flush()
        write_json(old.folder / "bank.json", new.header)
        _remove_shards(old.folder, keep=new.header["shards"])
        return new

    # what is there

    def _find(self, slide: str) -> tuple[Shard, int, slice]:
        """The shard of a slide, its number in the shard, and its rows."""
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

    @property
    def codebook(self) -> str:
        """Fingerprint of the codebook the sums are for; empty before `set_codebook`, or where that was cut short between shards."""
        found = {shard.codebook for shard in self._shards.values()}
        return found.pop() if len(found) == 1 else ""

    def gather(self, slide: str, index: Integer[np.ndarray, "n"]) -> Float16[np.ndarray, "n D"]:
        """Rows of some tiles of a slide, in the order asked."""
        shard, _, rows = self._find(slide)
        return shard.gather(index + rows.start)

    def codes(self, slide: str, index: Integer[np.ndarray, "n"]) -> UInt16[np.ndarray, "n"]:
        """Codewords of some tiles of a slide."""
        shard, _, rows = self._find(slide)
        return shard.code.take(index + rows.start)

    def read(self, slide: str, index: Integer[np.ndarray, "n"]) -> tuple[Float16[np.ndarray, "n D"], UInt16[np.ndarray, "n"]]:
        """Rows and codewords of some tiles of a slide."""
        return self.gather(slide, index), self.codes(slide, index)

    def residuals(
        self, slide: str, index: Integer[np.ndarray, "n"] | None = None, *, without: Integer[np.ndarray, "n"] | None = None
    ) -> tuple[Float32[np.ndarray, "K D"], Int32[np.ndarray, "K"]]:
        """Residual sums and counts of a slide's tiles.

        All tiles (no row is read), only the tiles `index`, or all but the tiles `without` (only those rows are read). A codeword
        without tiles has a sum of exactly zero, so nothing of the bank is left once every tile is taken out.
        """
        shard, number, _ = self._find(slide)
        assert shard.codewords is not None and shard.state[number] == CLEAN, f"{slide}: no sums yet; fill it and set a codebook"
        if index is not None:
            sums, counts = np.zeros_like(shard.sums[number]), np.zeros_like(shard.counts[number])
            for part in np.split(index, range(CHUNK, len(index), CHUNK)):
                more, new = sum_residuals(self.gather(slide, part), self.codes(slide, part), shard.codewords)
                sums += more
                counts += new
            return sums, counts
        sums, counts = shard.sums[number].copy(), shard.counts[number].copy()
        shard.touched(1)
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
            try:
                shard.put(first, rounded)
            except OSError as error:
                why = f"{error.strerror}, {shutil.disk_usage(self.folder).free / 1e6:.0f} MB free"
                raise StoreError(f"{self.folder}: cannot write the rows of slide {slide} ({why}); make room and run again") from error
            first += len(part)
        if first != rows.stop:
            raise StoreError(f"{self.folder}: slide {slide}: {first - rows.start} features for {self.tiles(slide)} tiles; tile it again")
        shard.step[rows] = step
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

        Raises:
            StoreError: codewords of another number or width than the bank's.
        """
        expected = (self.header["codewords"], self.dim)
        if codewords.shape != expected:
            raise StoreError(f"{self.folder}: a codebook of shape {codewords.shape}; the bank was made with K, D = {expected}")
        for shard in self._shards.values():
            shard.set_codebook(codewords, fingerprint)
        for slide in self.slides:
            if self.is_filled(slide):
                self.rebuild(slide)

    def rebuild(self, slide: str) -> None:
        """Recompute codes, sums and counts of a slide from its rows."""
        shard, number, rows = self._find(slide)
        shard.rebuild(number, rows)

    def write(self, slide: str, index: Integer[np.ndarray, "n"], features: Float[np.ndarray, "n D"], step: int) -> Float32[np.ndarray, "n"]:
        """Put fresh features in the place of some tiles' rows; sums follow the rows as rounded to float16.

        Returns the cosine between old and new row of each tile: how far the encoder has drifted since they were written.

        Raises:
            StoreError: features that are not finite, or of another width.
        """
        shard, number, rows = self._find(slide)
        new = self._rounded(slide, features)
        sums, counts = self.residuals(slide, without=index)
        codes = nearest(new, shard.codewords)
        more, more_counts = sum_residuals(new, codes, shard.codewords)
        places = index + rows.start
        old, fresh = shard.rows.take(places, axis=0).astype(np.float32), new.astype(np.float32)
        shard.state[number] = DIRTY
        shard.rows[places], shard.step[places], shard.code[places] = new, step, codes
        shard.sums[number], shard.counts[number] = sums + more, counts + more_counts
        shard.state[number] = CLEAN
        return (old * fresh).sum(1) / np.maximum(np.linalg.norm(old, axis=1) * np.linalg.norm(fresh, axis=1), 1e-12)

    def flush(self) -> None:
        """Push everything to the disk (a checkpoint's moment)."""
        for shard in self._shards.values():
            shard.flush()

    # statistics over the shards opened here

    def oldest(self, slide: str, n: int, exclude: Integer[np.ndarray, "m"] | None = None) -> Integer[np.ndarray, "k"]:
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
                ages = np.maximum(step - shard.step[rows].astype(np.int64), 0)  # a resumed run may find rows of its own future
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


def _remove_shards(folder: Path, keep: Iterable[str]) -> None:
    """Delete the files of all shards but those to keep."""
    for orphan in folder.glob("shard-*"):
        if orphan.name not in keep:
            shutil.rmtree(orphan)
    if "." not in keep:
        for name in (*file_layout(0, 0, 0, 0), "codebook.npz"):
            (folder / name).unlink(missing_ok=True)
