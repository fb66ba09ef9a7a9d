"""What every module shares: errors that a user can mend, files that are whole or absent, tables, locks, progress.

The message of an error says where, what was asked, what is there and what to do, in one line; the command line prints it and
exits. Anything else that is raised is a bug and stays a traceback.
"""

import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import reprlib
import socket
import sys
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
_warn_once = cache(log.warning)
Item = TypeVar("Item")
Result = TypeVar("Result")

DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)
EVERY_S = 30  # seconds between two lines of the log that tell how far a long loop is
csv.field_size_limit(1 << 24)


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
    """Why something failed, in one line of at most 500 characters."""
    other = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    text = f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error) or other
    return shorten(text, 500, placeholder=" ...")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield `NAME.part` to write to; rename it to `path` on success, remove it on any error.

    Write with Python's own calls: libraries that open files themselves lose the reason why a write failed.
    Raises DiskError: it cannot be written; the message says why.
    """
    part = Path(f"{path}.part")
    with _writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
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
def hdf5_file(path: Path) -> Iterator[Any]:
    """An HDF5 file to fill in memory; written atomically at the end."""
    import h5py

    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        yield file
    write_bytes(path, memory.getbuffer())


@contextmanager
def hold(folder: Path, name: str = ".lock", *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a folder against other processes (`shared`: against all but shared holders); the system lets go when the process ends.

    The lock file `name` stays behind and means nothing by itself. Raises DiskError: the folder cannot be written; BusyError, unless it
    shall `wait`: another process holds the folder. The message says which, on which host.
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


def encoded(picture: Any, **options: Any) -> bytes:
    """The bytes of a matplotlib figure as PNG, or of a PIL image as JPEG."""
    memory = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(memory, format="png", dpi=140, **options)
    else:
        picture.save(memory, "JPEG", quality=88)
    return memory.getvalue()


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
    return (stat := Path(path).stat()).st_size, stat.st_mtime_ns


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

    Raises TableError: the id is empty, holds a path separator or a control character, or starts with a dot.
    """
    if not value or value.startswith(".") or re.search(r"[/\\\x00-\x1f]", value):
        raise TableError(f"{where}: {value!r} cannot be an id; ids hold no slash, no control character and no leading dot")
    return value


MISSING = frozenset(("", "na", "n/a", "nan", "none", "null", "#n/a", "--", "?", "unknown", "not reported", "not available", "missing"))
"""What tables write where they have no value, in lower case and without what `is_missing` strips."""


def is_missing(value: str) -> bool:
    """Whether a cell stands for no value: a word of MISSING in any case, also as GDC, pandas and TCGA write it ('--, <NA>, [Unknown])."""
    return value.strip().strip("'<>[]").lower() in MISSING


def preview(values: Iterable[Any], limit: int = 3) -> str:
    """The first few values, for a message, and how many more there are."""
    texts = [repr(str(value)) for value in values]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


def missing_words(values: Iterable[str]) -> str:
    """The words among these that stand for no value, counted, the most frequent first: "12 '', 3 'NA'"; "" where none does."""
    return ", ".join(f"{count} {word!r}" for word, count in Counter(filter(is_missing, values)).most_common())


def hashed(name: str, salt: str) -> str:
    """A name as a model's folder holds it: a salted hash of its `same_name`; without a salt the name itself."""
    return fingerprint(salt, same_name(name)) if salt else same_name(name)


def remember(seen: Iterable[str], selected: Iterable[str], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Names of slides and patients for a model's folder: those it learnt from and those that chose its epoch, hashed with one salt.

    Nobody can read a name from it; who guesses one can test it. `before`: what is remembered of a run that this one starts from.
    """
    names = {"seen": sorted(set(map(same_name, seen))), "selected": sorted(set(map(same_name, selected)))}
    before = before or {"salt": fingerprint(names)}
    salt = before["salt"]
    return {"salt": salt} | {kind: sorted({*before.get(kind, ()), *(hashed(name, salt) for name in of)}) for kind, of in names.items()}


def read_text(path: Path) -> str:
    """A text file, UTF-8 with or without a byte-order mark, or UTF-16 with one. Raises TableError: no such file, or not text."""
    try:
        data = Path(path).read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except OSError as error:
        raise TableError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8 (a table: as CSV, UTF-8)") from error
    if "\x00" in text:
        raise TableError(f"{path}: holds NUL characters, so it is no text; save it as UTF-8 (a table: as CSV, UTF-8)")
    return text.replace("\ufeff", "")  # marks stand in the middle too, where files were joined


class Row(dict[str, str]):
    """A row of a table: column -> text, "" where its cell is empty; `where` is its place in the file."""

    def __init__(self, cells: Any, where: str = ""):
        super().__init__(cells)
        self.where = where


def read_table(path: Path, required: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV or TSV file, cells as texts ("007" stays "007"). Columns are parted by tab, comma, semicolon or bar.

    Raises TableError: as `read_text`; no header, a column twice, or a required one absent (those there are listed); a quote that does not
    close, or a row of more cells than there are columns.
    """
    path, rows, line, text = Path(path), [], 1, read_text(path)
    first, end, _ = re.split("(\r\n|\r|\n)", text.lstrip("\r\n") + "\n", maxsplit=1)
    delimiter = next((d for d in "\t,;|" if d in first), "\t" if path.suffix.lower() == ".tsv" else ",")
    if end != "\r":  # then a lone return is part of a text, which not every program quotes; a NUL keeps its place
        text = re.sub("\r(?!\n)", "\0", text)
    lines = io.StringIO(text, newline="")  # cut at line ends only, not at form feeds and the like
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for cells in reader:
            if cells:
                rows.append((line, [cell.replace("\0", "\r").strip() for cell in cells]))
            line = reader.line_num + 1
    except csv.Error as error:
        why = "a quote opens that never closes" if "end of data" in str(error) else f"{error}; quotes in a quoted text are doubled"
        raise TableError(f"{path}: line {line}: {why}") from error
    if not rows:
        raise TableError(f"{path}: empty; a header line is needed")
    columns = rows.pop(0)[1]
    if twice := [c for c, times in Counter(columns).items() if c and times > 1]:
        raise TableError(f"{path}: column {twice[0]!r} comes twice; keep one")
    if missing := [c for c in required if c not in columns]:
        raise TableError(f"{path}: no column {', '.join(map(repr, missing))}; there are {', '.join(columns)}")
    for line, cells in rows:
        if any(cells[len(columns) :]):
            raise TableError(f"{path}: line {line}: {len(cells)} cells for {len(columns)} columns; quote texts that hold {delimiter!r}")
    return [Row(zip(columns, cells + [""] * len(columns)), f"line {line}") for line, cells in rows]


def read_list(path: Path) -> list[str]:
    """Names (`same_name`) of slides or patients: one on each line, or those of a table (`read_table`) with slide_id or patient_id."""
    names = re.split("[\r\n]+", read_text(path).strip())
    keys = {"slide_id", "patient_id"}.intersection(re.split(r"[\t,;|\s\"]+", names[0]))
    if keys:
        names = [row[key] for row in read_table(path, sorted(keys)) for key in sorted(keys)]
    return list(dict.fromkeys(same_name(name.strip(' "')) for name in names if not is_missing(name)))


def one_value(path: Path, rows: Iterable[Row], key: str, column: str) -> dict[str, str]:
    """Name in the column `key` -> value in `column`, of rows that have both. Raises TableError: a name has two values; names both rows."""
    found: dict[str, Row] = {}
    for row in rows:
        name, value = same_name(row.get(key, "")), row.get(column, "")
        if not is_missing(name) and not is_missing(value):
            first = found.setdefault(name, row)
            if first[column] != value:
                both = " and ".join(f"{reprlib.repr(r[column])} ({r.where})" for r in (first, row))
                raise TableError(f"{path}: {key} {name!r} has more than one {column}: {both}; keep one")
    return {name: row[column] for name, row in found.items()}


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically. A text cell that a spreadsheet would run as a formula gets a leading apostrophe."""

    def inert(cell: Any) -> Any:
        formula = isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _NUMBER.fullmatch(cell)
        return "'" + cell if formula else cell

    with atomic(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *([inert(cell) for cell in row] for row in rows)])


def cores() -> int:
    """Processor cores for this process: torchrun's processes on one machine share them."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun sets them; (0, 1) without. Raises ConfigError: set wrongly."""
    rank, world, address = (os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if not rank or not world:
        if rank or world:
            _warn_once("RANK=%s WORLD_SIZE=%s: torchrun sets both, so this is taken for one process that does all the work", rank, world)
        return 0, 1
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)) or (int(world) > 1 and not address):
        said = f"RANK={rank} WORLD_SIZE={world} MASTER_ADDR={address}"
        raise ConfigError(f"{said}: torchrun sets all three, RANK from 0 to WORLD_SIZE - 1; unset them, or start with torchrun")
    return int(rank), int(world)


@contextmanager
def counting(title: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """A bar over `total` units on stderr, or a line of the log every EVERY_S without a terminal; yields what to call with units done."""
    began = logged = time.monotonic()
    count, hidden = 0, logging.getLogger("dreslcl").level > logging.INFO or not sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit + " {task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total, rate="")

        def done(units: int = 1) -> None:
            nonlocal count, logged
            count, now = count + units, time.monotonic()
            speed = max(count, 1) / max(now - began, 1e-9)
            rate = f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.2f}/s"
            bar.update(task, advance=units, rate=rate)
            if hidden and now - logged >= EVERY_S:
                logged = now
                log.info("%s %d/%d %s %s %s left", title, count, total, unit, rate, timedelta(seconds=round((total - count) / speed)))

        yield done


def track(items: Iterable[Item], title: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar that counts them; `total` where they have no length."""
    with counting(title, len(items) if total is None else total, unit) as done:
        for item in items:
            yield item
            done()


def prefetch(work: Callable[[Item], Result], jobs: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """Results of `work` on each job, in order, computed on threads up to `ahead` jobs early."""
    pool, queue = ThreadPoolExecutor(workers), deque[Future[Result]]()
    try:
        for job in jobs:
            queue.append(pool.submit(work, job))
            if len(queue) > ahead:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
