"""Two processes on one folder."""

import os
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from attack import command, dreslcl, in_child, started
from folders import tiled

from dreslcl.common import hold
from dreslcl.tiles import TileGrid


def holder(pipe, folder: Path) -> None:
    """Hold a folder until the end."""
    with hold(folder):
        pipe.send("held")
        time.sleep(600)


@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_the_second_process_is_told_who_holds_the_folder_and_a_crash_lets_go(work, whole, tmp_path, name):
    process, pipe = started(holder, tmp_path)
    assert pipe.recv() == "held"
    arguments = [*command(name, work, whole), tmp_path]
    done = in_child(dreslcl, *arguments)
    done.says("BusyError", f"is in use by process {process.pid} on {socket.gethostname()}")
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert in_child(dreslcl, *arguments).code == 0


def race(work: Path, out: Path, start: float) -> list[str]:
    """Tile at a given moment; who was told to wait, tries again. Every grid that another process can see is whole."""
    time.sleep(max(0, start - time.monotonic()))
    told = []
    while (done := dreslcl(*command("tile", work, work), out)).code:
        done.says("BusyError")
        told.append(done.err)
        for path in out.glob("tiles/*.h5"):
            TileGrid.load(path)
        time.sleep(0.02)
    return told


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_runs_of_tile_on_one_folder_at_once_leave_no_broken_file(work, whole, tmp_path, times):
    expected, told = tiled(whole / "tile"), 0
    for n in range(times):
        start = time.monotonic() + 0.5
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(in_child, race, work, tmp_path / f"two{n}", start) for _ in range(2)]
            told += sum(bool(answer.result()) for answer in answers)
        assert tiled(tmp_path / f"two{n}") == expected
        shutil.rmtree(tmp_path / f"two{n}")
    assert told >= times / 2  # they did meet
    print(f"\n{told} of {times} pairs met")
