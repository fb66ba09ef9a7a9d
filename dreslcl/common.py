"""The few errors a user can act on.

A message says where, what was asked, what is there and what to do, in one line; the command line prints it and exits.
Anything else that is raised is a bug and stays a traceback.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import socket
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import h5py
import logging
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class DreslclError(Exception):
    """A mistake or a fault that the user can mend. Base of all errors below."""


class ConfigError(DreslclError):
    """A setting has a value that makes no sense."""


class SlideError(DreslclError):
    """A scan cannot be opened, or not be read as asked."""


class TableError(DreslclError):
    """A table (reports, labels, slides.csv) lacks a column, holds bad ids, or cannot be read."""


class StoreError(DreslclError):
    """A file that dreslcl wrote is missing, damaged, or was made with other settings than asked for now."""


class DiskError(DreslclError):
    """Results cannot be written: the disk is full or read-only, or permissions forbid it."""


class ModelError(DreslclError):
    """An encoder or a model cannot be built, downloaded or loaded."""


class BusyError(DreslclError):
    """Another process holds the folder."""


def reason(error: Exception) -> str:
    """Why a slide failed, in one line."""
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror or error})"
    return " ".join(str(error).split()) or "not enough memory"


csv.field_size_limit(1 << 24)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield `NAME.part` to write to; rename it to `path` on success, remove it on any error.

    Write with Python's own calls: libraries that open files themselves lose the reason why a write failed.

    Raises:
        DiskError: it cannot be written; the message says why.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with _writing(part):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            part.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error says why
                part.unlink(missing_ok=True)
            raise


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn faults of the disk, and of the way to `path`, into a DiskError; an input that cannot be read stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAULTS or (error.filename and str(path).startswith(str(error.filename))):
            why = f"cannot be written ({error.strerror}); make room or mend its permissions, and run the same command again"
            raise DiskError(f"{str(path).removesuffix('.part')}: {why}") from error
        raise


@contextmanager
def hdf5_file(path: Path) -> "Iterator[h5py.File]":
    """An HDF5 file to fill in memory; written atomically at the end."""
    import h5py

    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        yield file
    write_bytes(path, memory.getbuffer())


@contextmanager
def hold(folder: Path, name: str = ".lock", *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other processes. The system lets go when the process ends, however it ends.

    Args:
        name: the lock file; it stays behind and means nothing by itself.
        shared: other shared holders may come in, an exclusive one may not.
        wait: wait for the other holder instead of raising.

    Raises:
        BusyError: another process holds the folder; the message says which, on which host.
        DiskError: the folder cannot be written.
    """
    path = Path(folder) / name
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode().strip() or "another process"
            raise BusyError(f"{folder} is in use by {holder}; wait until it ends, or choose another folder") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):  # a file system without locks
                raise
        with _writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-able values (16 hex digits)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns: what tells a re-run that a scan changed."""
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def slide_id(path: Path, root: Path) -> str:
    """The id of a scan: its path relative to the input folder, without suffix, `/` → `__`."""
    path, root = Path(path), Path(root)
    relative = path.relative_to(root) if path != root else Path(path.name)
    return "__".join(relative.with_suffix("").parts)


_SUFFIXES = re.compile(r"(\.(svs|tiff?|ndpi|scn|bif|qptiff|png|jpe?g|mrxs|dcm|h5|pt))+$", re.IGNORECASE)


def same_name(text: str) -> str:
    """What to compare names of slides by: the name without suffix (in any case) and blanks around it, in one Unicode form, "/" as "__".

    So `A/é.SVS` of a table, written with a composed or a decomposed é, finds the slide `A__é`.
    """
    return re.sub(r"[/\\]+", "__", _SUFFIXES.sub("", unicodedata.normalize("NFC", text).strip()))


def check_id(value: str, where: str) -> str:
    """Return an id that can safely name a file.

    Raises:
        TableError: the id is empty, holds a path separator or a control character, or starts with a dot.
    """
    if not value or value.startswith(".") or re.search(r"[/\\\x00-\x1f]", value):
        raise TableError(f"{where}: {value!r} cannot be an id; ids hold no slash, no control character and no leading dot")
    return value


def read_table(path: Path, required: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV or TSV file as dictionaries of strings ("007" stays "007").

    UTF-8 with or without a byte-order mark, and UTF-16 with one, are read.

    Raises:
        TableError: no such file, not text, no header, a column twice, or a required one absent (those there are listed).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not a UTF-8 text table (byte {error.start}); save it as CSV, UTF-8") from error
    if "\x00" in text:
        raise TableError(f"{path}: holds NUL characters, so it is no text table; save it as CSV, UTF-8")
    lines = text.splitlines(keepends=True)
    if not lines:
        raise TableError(f"{path}: empty; a header line is needed")
    delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in lines[0] else ";" if ";" in lines[0] and "," not in lines[0] else ","
    reader = csv.DictReader(lines, delimiter=delimiter)
    try:
        rows = [{k.strip(): (v or "").strip() for k, v in row.items() if k is not None and not isinstance(v, list)} for row in reader]
    except csv.Error as error:
        raise TableError(f"{path}: line {reader.line_num}: {error}") from error
    columns = [c.strip() for c in reader.fieldnames or []]
    if twice := [c for c, times in Counter(columns).items() if c and times > 1]:
        raise TableError(f"{path}: column {twice[0]!r} comes twice; keep one")
    missing = [c for c in required if c not in columns]
    if missing:
        raise TableError(f"{path}: no column {', '.join(map(repr, missing))}; there are {', '.join(columns)}")
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically. A text cell that a spreadsheet would run as a formula gets a leading apostrophe."""
    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([_inert(cell) for cell in row] for row in rows)


def _inert(cell: Any) -> Any:
    formula = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _NUMBER.fullmatch(cell)
    return "'" + cell if formula else cell


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without torchrun.

    Raises:
        ConfigError: RANK, WORLD_SIZE and MASTER_ADDR do not go together.
    """
    rank, world, address = (os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if not rank or not world:
        _tell_of_half_set_ranks(rank, world)
        return 0, 1
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)) or (int(world) > 1 and not address):
        said = f"RANK={rank} WORLD_SIZE={world} MASTER_ADDR={address}"
        raise ConfigError(f"{said}: torchrun sets all three, RANK from 0 to WORLD_SIZE - 1; unset them, or start with torchrun")
    return int(rank), int(world)


@cache
def _tell_of_half_set_ranks(rank: str, world: str) -> None:
    if rank or world:
        log.warning("RANK=%s WORLD_SIZE=%s: torchrun sets both, so this is taken for one process that does all the work", rank, world)


log = logging.getLogger(__name__)

EVERY_S = 30
"""Seconds between two lines of the log."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2f}/s")


class _Progress(Progress):
    logged = time.monotonic()

    def advance(self, task_id: Any, advance: int | float = 1) -> None:
        super().advance(task_id, advance)
        if self.disable and time.monotonic() - self.logged >= EVERY_S:
            self.logged = time.monotonic()
            task = self.tasks[0]
            cells = (column.render(task) for column in self.columns if isinstance(column, ProgressColumn) and type(column) is not BarColumn)
            log.info("%s left", " ".join(map(str, cells)))


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Progress]:
    """A bar over `total` units; move it on with `bar.advance(bar.task_ids[0], n)`.

    Args:
        title: what is being done.
        total: units of work.
        unit: what is counted, in the plural.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), _Rate(), TimeRemainingColumn())
    quiet = logging.getLogger("dreslcl").level > logging.INFO
    with _Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        bar.logged = time.monotonic()
        bar.add_task(title, total=total)
        yield bar
