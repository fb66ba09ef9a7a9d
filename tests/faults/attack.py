"""What the attacks share: processes to kill, to starve or to forbid things, and a look at what they leave behind.

Processes are forked from one server that has imported the package already (multiprocessing's forkserver), since importing torch takes
longer than most attacks.
"""

import ctypes
import io
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dreslcl.trainer", "dreslcl.embedding", "dreslcl.evaluation", "dreslcl.report", "sklearn.cluster"])
LIBC = ctypes.CDLL(None, use_errno=True)


class Forbidden(Exception):
    """This machine does not let us make the fault."""


class Crash(AssertionError):
    """A process that ended without an answer."""


def started(target: Callable[..., None], *arguments: Any) -> tuple[Any, Any]:
    """A process that runs `target(pipe, *arguments)`, and our end of the pipe."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    return process, ours


def in_child(function: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
    """What `function` returns in a process of its own, which is killed after so many seconds.

    Raises Crash: it raised, was killed by a signal, or took too long.
    """
    process, pipe = started(_answer, function, arguments)
    try:
        if not pipe.poll(seconds):
            raise Crash(f"no answer within {seconds} s")
        good, value = pipe.recv()
    except EOFError:
        process.join()
        raise Crash(f"ended with {process.exitcode} and no answer") from None
    finally:
        process.kill()
        process.join()
    if not good:
        raise value if isinstance(value, Forbidden) else Crash(value)
    return value


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*arguments)))
    except Forbidden as error:
        pipe.send((False, error))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


# commands


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def says(self, *words: str, code: int = 1) -> None:
        """Assert that it failed with `code` and one line on stderr that holds these words."""
        assert self.code == code and self.err.count("\n") == 1 and "Traceback" not in self.err, self
        for word in words:
            assert word in self.err, self


def dreslcl(*arguments: Any) -> Done:
    """Run a command line in this process, quietly and without curves.png, which takes half of the time of a small run."""
    from dreslcl import cli, report

    report.curves = lambda _, path: path.write_bytes(b"\x89PNG")
    sys.argv = ["dreslcl", "--quiet", *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    return Done(int(code or 0), out.getvalue(), err.getvalue())


TILE = ("--size", 64, "--mpp", 2.0, "--workers", 1)
TRAIN = "--epochs 2 --batch 4 --tiles 4 --tile-batch 64 --codewords 4 --width 16 --depth 1 --cache-gb 0".split()
TRAIN += ["--bank-share", 1]  # else a random tile encoder is warned of, a line more


def command(name: str, work: Path, whole: Path) -> list:
    """The command line of one step up to its output folder, its inputs being those of `whole`."""
    probe = "--task subtype --split split --include-seen --bootstrap 20".split()
    return {
        "tile": ["tile", work.parent / "slides", *TILE, "--out"],
        "pretrain": ["pretrain", work, "--reports", work / "reports.csv", *TRAIN, "--out"],
        "embed": ["embed", work, "--model", whole / "pretrain" / "model", "--tile-features", "--workers", 1, "--out"],
        "eval": ["eval", whole / "embed", "--labels", whole / "labels.csv", *probe, "--out"],
    }[name]


def before(place: str, act: Callable[[int], Any]) -> None:
    """Have `act` called, with the number of the call, before each call of a function of the package, like `bank.MemoryBank.write`."""
    where, name = f"dreslcl.{place}".rsplit(".", 1)
    owner, numbers = pkgutil.resolve_name(where), count()
    original = getattr(owner, name)

    def wrapper(*args: Any, **options: Any) -> Any:
        act(next(numbers))
        return original(*args, **options)

    setattr(owner, name, wrapper)


# killing


def moments(places: list[str], *arguments: Any) -> list[tuple[str, int, float]]:
    """Each call of these functions in an undisturbed run: its place, which call of it, and the seconds until the next, or the end."""
    begun: list[tuple[str, int, float]] = []
    for place in places:
        before(place, lambda n, place=place: begun.append((place, n, time.monotonic())))
    assert dreslcl(*arguments).code == 0
    ends = [*(start for *_, start in begun[1:]), time.monotonic()]
    return [(place, n, end - start) for (place, n, start), end in zip(begun, ends)]


def doomed(place: str, nth: int, seconds: float, *arguments: Any) -> None:
    """The command in a process that a signal without a handler ends, so many seconds after the n-th call of a function began."""
    before(place, lambda n: n == nth and signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6)))
    dreslcl(*arguments)
    signal.pause()  # it was faster


# forbidding


def forget_root() -> None:
    """Give up root's right to pass permission bits, so that they bind as they bind a user."""

    class Header(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))

    assert LIBC.capset(ctypes.byref(Header(0x20080522, 0)), (ctypes.c_uint32 * 6)()) == 0, os.strerror(ctypes.get_errno())


def small_disk(place: Path, kilobytes: int, *, read_only: bool = False) -> None:
    """Mount a tmpfs of `kilobytes` that only this process sees. Raises Forbidden: not allowed here."""
    new_mounts, new_users, private = 0x20000, 0x10000000, 0x44000  # CLONE_NEWNS, CLONE_NEWUSER, MS_REC | MS_PRIVATE
    user, root = f"0 {os.getuid()} 1", os.geteuid() == 0
    failed = LIBC.unshare(new_mounts if root else new_mounts | new_users)
    if not failed and not root:
        Path("/proc/self/uid_map").write_text(user)
    if failed or LIBC.mount(b"none", b"/", None, private, None) or _mount(place, kilobytes, read_only):
        raise Forbidden(os.strerror(ctypes.get_errno()))


def resize(place: Path, kilobytes: int) -> None:
    """Make what `small_disk` mounted larger, and writable."""
    assert _mount(place, kilobytes, 32) == 0, os.strerror(ctypes.get_errno())  # MS_REMOUNT


def _mount(place: Path, kilobytes: int, flags: int) -> int:
    return LIBC.mount(b"none", bytes(place), b"tmpfs", flags, f"size={kilobytes}k".encode())
