"""One shard of the memory bank: its mapped files, and residual arithmetic on their rows.

Stored as plain arrays in C order: `rows.f16` (ΣM, D) features · `step.i32` (ΣM,) step at which a row was written, −1 never ·
`code.u16` (ΣM,) nearest codeword · `sums.f32` (S, K, D) Σ (row − codeword) · `counts.i32` (S, K) · `state.u8` (S,) empty, clean or
dirty · `codebook.npz` the codewords the sums are for.

Random rows of a file larger than memory: MADV_RANDOM stops read-ahead, and posix_fadvise announces all rows of a gather before the
first is touched, so that the disk serves them together (~125× plain mmap, measured). A touched row maps 64 kB around it, or 1.6 MB where
a recent kernel keeps a file just written in large folios (measured, Linux 6.18); these pages are let go again before they make up
`RESIDENT`: RSS stays flat, the page cache keeps them. Reading through the mapping takes 0.2 µs a warm row, `pread` 1.3; writing 0.4 µs (12
where the page must be mapped again) against 22 for `pwrite` (ext4).
"""

import mmap
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float16, Float32, Int32, Integer, UInt16

from .errors import StoreError
from .files import atomic

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
