"""What the attacks share: processes to kill, to starve or to forbid things, and a look at what they leave behind.

Processes are forked from one server that has imported the package already (multiprocessing's forkserver), since importing torch takes
longer than most attacks.
"""

import ctypes
import io
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import wraps
from itertools import islice
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


def told(pipe: Any) -> Iterator[Any]:
    """What a process sends until it ends."""
    with suppress(EOFError):
        while True:
            yield pipe.recv()


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


# killing


def marked(pipe: Any, phases: dict[str, tuple[type | Any, str]], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run `function` and tell through the pipe when each phase (a function, by its owner and name) begins and ends."""
    import torch

    torch.set_num_threads(1)

    def mark(phase: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapper(*args: Any, **options: Any) -> Any:
            pipe.send((phase, "begins", time.monotonic()))
            value = original(*args, **options)
            pipe.send((phase, "ends", time.monotonic()))
            return value

        return wrapper

    for phase, (owner, name) in phases.items():
        setattr(owner, name, mark(phase, getattr(owner, name)))
    mark("whole", function)(*arguments)


def durations(target: Callable[..., None], *arguments: Any) -> dict[str, list[float]]:
    """Seconds that each call of each phase takes in an undisturbed run; `target(pipe, *arguments)` calls `marked`."""
    process, pipe = started(target, *arguments)
    begun: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for phase, what, moment in told(pipe):
        if what == "begins":
            begun[phase] = moment
        else:
            found.setdefault(phase, []).append(moment - begun[phase])
    process.join()
    assert process.exitcode == 0
    return found


def kill(phase: str, nth: int, delay: float, target: Callable[..., None], *arguments: Any) -> bool:
    """SIGKILL a run `delay` seconds after its phase began for the n-th time. Returns whether it was still in that call."""
    process, pipe = started(target, *arguments)
    begins = (moment for name, what, moment in told(pipe) if (name, what) == (phase, "begins"))
    time.sleep(max(0.0, next(islice(begins, nth, None)) + delay - time.monotonic()))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return all(said[:2] != (phase, "ends") for said in told(pipe))


def kills(phases: dict[str, list[float]], times: int, seed: int) -> list[tuple[str, int, float]]:
    """`times` random moments of each phase: (phase, which call of it, seconds after it began)."""
    draw = random.Random(seed)
    chosen = [(phase, draw.randrange(len(taken)), draw.random()) for phase, taken in phases.items() for _ in range(times)]
    return [(phase, nth, share * phases[phase][nth]) for phase, nth, share in chosen]


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
