"""A full disk, a read-only one, files that may not be read or written, inputs that vanish, clocks that lie."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from attack import Done, contents, dreslcl, forget_root, hdf5, in_child, set_read_only, small_disk
from test_kill import assert_whole_run, tiled

from dreslcl.files import read_table, write_table

TILE = ("--size", 64, "--mpp", 2.0, "--mask-mpp", 8.0, "--workers", 1)
TRAIN = "--epochs 2 --batch 4 --tiles 4 --tile-batch 64 --codewords 4 --width 16 --heads 2 --depth 1 --cache-gb 0 --resume".split()


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory) -> Path:
    """A folder with undisturbed results of all four commands."""
    folder = tmp_path_factory.mktemp("whole")
    labels = [(f"s{i}", f"p{i}", "ab"[i % 2], "train" if i < 4 else "test") for i in range(8)]
    write_table(folder / "labels.csv", ["slide_id", "patient_id", "subtype", "split"], labels)
    for name in ("tile", "pretrain", "embed", "eval"):
        done = in_child(dreslcl, *command(name, work, folder, folder / name))
        assert done.code == 0, done
    return folder


def command(name: str, work: Path, whole: Path, out: Path) -> list:
    """The command line of one step that writes into `out`, its inputs being those of `whole`."""
    return {
        "tile": ["tile", work.parent / "slides", *TILE],
        "pretrain": ["pretrain", work, "--reports", work / "reports.csv", *TRAIN],
        "embed": ["embed", work, "--model", whole / "pretrain" / "model", "--tile-features", "--workers", 1],
        "eval": ["eval", whole / "embed", "--labels", whole / "labels.csv", "--task", "subtype", "--split-column", "split", "--include-seen"]
        + ["--bootstrap", 20],
    }[name] + ["--out", out]


def assert_like_whole(name: str, out: Path, whole: Path) -> None:
    """The results are those of an undisturbed run."""
    assert not list(out.rglob("*.part"))
    if name == "pretrain":
        assert_whole_run(out, 2)
    elif name == "tile":
        assert tiled(out) == tiled(whole / "tile")
    elif name == "embed":
        assert contents(out) == contents(whole / "embed")
    else:
        assert {p.name for p in out.iterdir()} == {"metrics.json", "predictions.csv", "report.html"}
        assert (out / "metrics.json").read_bytes() == (whole / "eval" / "metrics.json").read_bytes()


def starved(limit: int, *arguments) -> Done:
    """The command where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return dreslcl(*arguments)


def limits(folder: Path, count: int) -> list[int]:
    """File sizes at which a run that writes `folder` must fail, spread over the sizes of its files."""
    sizes = sorted({p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".lock", "events."))})
    return sorted({sizes[i] - 1 for i in np.linspace(0, len(sizes) - 1, min(count, len(sizes))).astype(int)})


@pytest.mark.parametrize("count", [2, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_a_file_that_may_not_grow_stops_the_command_in_one_line(work, whole, tmp_path, name, count):
    tried = limits(whole / name, count)
    for limit in tried:
        out = tmp_path / str(limit)
        done = in_child(starved, limit, *command(name, work, whole, out))
        done.says("File too large", "run the same command again")
        assert not list(out.rglob("*.part"))
        assert in_child(dreslcl, *command(name, work, whole, out)).code == 0
        assert_like_whole(name, out, whole)
    print(f"\n{name}: {len(tried)} limits")


def on_small_disk(disk: Path, kilobytes: int, out: Path, arguments: list) -> tuple[Done, list[str], Done]:
    """The command on a disk of so many kB, then with room; the results are copied to `out`."""
    small_disk(disk, f"{kilobytes}k")
    first = dreslcl(*arguments, "--out", disk / "out")
    parts = [p.name for p in (disk / "out").rglob("*.part")]
    resize(disk)
    second = dreslcl(*arguments, "--out", disk / "out")
    shutil.copytree(disk / "out", out)
    return first, parts, second
