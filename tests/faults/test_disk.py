"""A full disk, a read-only one, files that may not be read or written, inputs that vanish, clocks that lie."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from attack import TILE, Done, Forbidden, before, command, dreslcl, forget_root, in_child, resize, small_disk
from folders import hdf5
from test_kill import assert_like_whole

from dreslcl.common import read_table

ROOM = 1 << 20  # kB
every_command = pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])


def starved(limit: int, *arguments) -> Done:
    """The command where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return dreslcl(*arguments)


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.slow)])
@every_command
def test_a_file_that_may_not_grow_stops_the_command_in_one_line(work, whole, tmp_path, name, count):
    files = (p for p in (whole / name).rglob("*") if p.is_file() and not p.name.startswith((".lock", "events.")))
    sizes = sorted({p.stat().st_size for p in files})  # limits are spread over the sizes of the files that the run writes
    limits = {sizes[i] - 1 for i in np.linspace(len(sizes) - 1, 0, min(count, len(sizes))).astype(int)}
    for limit in sorted(limits):
        out = tmp_path / str(limit)
        in_child(starved, limit, *command(name, work, whole), out).says("File too large")
        assert not list(out.rglob("*.part"))
        assert in_child(dreslcl, *command(name, work, whole), out).code == 0
        assert_like_whole(name, out, whole)
    print(f"\n{name}: {len(limits)} limits")


def on_small_disk(disk: Path, kilobytes: int | None, out: Path, arguments: list) -> tuple[Done, list[str], Done | None]:
    """The command on a full disk of so many kB, then on one with room, kept in `out`; without a number only on a read-only disk."""
    small_disk(disk, kilobytes or ROOM, read_only=not kilobytes)
    first, second = dreslcl(*arguments, disk / "out"), None
    parts = [p.name for p in disk.rglob("*.part")]
    if kilobytes:
        resize(disk, ROOM)
        second = dreslcl(*arguments, disk / "out")
        shutil.copytree(disk / "out", out)
    return first, parts, second


@pytest.mark.parametrize("shares", [(None, 0.6), pytest.param(np.linspace(0.02, 0.98, 25), marks=pytest.mark.slow)])
@every_command
def test_a_full_or_read_only_disk_stops_the_command_in_one_line(work, whole, tmp_path, name, shares):
    need = sum(-(-p.stat().st_size // 4096) * 4 for p in (whole / name).rglob("*") if p.is_file())
    (tmp_path / "disk").mkdir()
    for share in shares:
        out, kilobytes = tmp_path / str(share), share and max(8, int(need * share))
        try:
            first, parts, second = in_child(on_small_disk, tmp_path / "disk", kilobytes, out, command(name, work, whole))
        except Forbidden as error:
            pytest.skip(f"cannot make a small disk here: {error}")
        first.says("No space left on device" if share else "cannot be written (Read-only file system)", "run the same command again")
        assert not parts
        if share:
            assert second.code == 0
            assert_like_whole(name, out, whole)
    print(f"\n{name}: {len(shares)} disks, of {need} kB needed")


# permissions


def forbidden(place: Path, mode: int, arguments: list) -> Done:
    """The command where `place` has other permission bits, which bind root too."""
    before = place.stat().st_mode
    place.chmod(mode)
    try:
        forget_root()
        return dreslcl(*arguments)
    finally:
        place.chmod(before)


@every_command
def test_a_folder_that_may_not_be_written_stops_the_command_in_one_line(work, whole, tmp_path, name):
    (tmp_path / "there").mkdir()
    for folder, out in ((tmp_path, tmp_path / "new"), (tmp_path / "there", tmp_path / "there")):
        done = in_child(forbidden, folder, 0o555, [*command(name, work, whole), out])
        done.says("cannot be written (Permission denied)", str(out))


@pytest.fixture
def own(work, tmp_path) -> Path:
    """A WORK folder and scans of its own, to damage."""
    shutil.copytree(work.parent, tmp_path / "in")
    for table in (tmp_path / "in" / "work").rglob("slides.csv"):
        table.write_text(table.read_text().replace(str(work.parent), str(tmp_path / "in")))
    return tmp_path / "in" / "work"


@pytest.mark.parametrize(
    "name, place",
    [
        ("pretrain", "work/slides.csv"), ("pretrain", "out/bank/bank.json"),
        ("pretrain", "out/text/text.json"), ("pretrain", "out/checkpoint.pt"), ("embed", "whole/pretrain/model/weights.safetensors"),
        ("embed", "whole/pretrain/model/open_clip/open_clip_model.safetensors"), ("eval", "whole/embed/embeddings.h5"),
    ],
)  # fmt: skip
def test_an_input_that_may_not_be_read_is_named_in_one_line(own, whole, name, place):
    there = own.parent
    shutil.copytree(whole, there / "whole")
    shutil.copytree(whole / "pretrain", there / "out")
    arguments = command(name, own, there / "whole")
    arguments[-1:-1] = ["--epochs", 3] if name == "pretrain" else []
    done = in_child(forbidden, there / place, 0, [*arguments, there / "out"])
    done.says("pretrain/model" if "/model/" in place else Path(place).stem)


# inputs that vanish or are cut while they are read


def vanishing(scan: Path, place: str, cut: bool, arguments: list) -> Done:
    """The command where `scan` is deleted, or cut to a tenth, just before a function is called for the first time."""
    size = scan.stat().st_size // 10
    before(place, lambda n: n or (os.truncate(scan, size) if cut else scan.unlink()))
    return dreslcl(*arguments)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name, place", [("tile", "tiles._tile"), ("pretrain", "bank.MemoryBank.fill"), ("embed", "model.DRESLCL.bag_of")])
def test_a_scan_that_vanishes_is_named_and_the_next_run_completes(own, whole, tmp_path, name, place, cut):
    scan, out = own.parent / "slides" / "s6.svs", tmp_path / "out"
    data, stamp = scan.read_bytes(), scan.stat()
    arguments = command(name, own, whole)
    done = in_child(vanishing, scan, place, cut, [*arguments, out])
    if name == "pretrain":
        if cut or done.code:  # a deleted scan that is open already can be read to the end
            *warnings, line = done.err.splitlines()  # one slide in eight is more than a run goes on without
            assert done.code == 1 and "Traceback" not in done.err and "1 of 8 slides cannot be read" in line and "s6.svs" in line, done
            assert len(warnings) <= 2, done
    else:
        assert done.code == 1 and "Traceback" not in done.err and "1 of 8 slides failed" in done.err, done
        done = {p.stem for p in (out / "slide_features").glob("*.h5")}
        if name == "tile":
            table = read_table(out / "slides.csv")
            done = {row["slide_id"] for row in table if row["status"] == "ok"}
            assert ("damaged or incomplete" if cut else "No such file") in table[6]["error"]
        assert done == {f"s{i}" for i in range(8) if i != 6}
    scan.write_bytes(data)
    os.utime(scan, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert in_child(dreslcl, *arguments, out).code == 0
    if name == "tile":
        whole = tmp_path  # an undisturbed run on the same scans
        assert in_child(dreslcl, *arguments, whole / "tile").code == 0
    assert_like_whole(name, out, whole)


# clocks


def test_times_of_files_that_lie_neither_hide_a_change_nor_redo_what_is_done(own, whole, tmp_path):
    scans, out, emb = own.parent / "slides", tmp_path / "out", tmp_path / "emb"
    tile, embed = ["tile", scans, *TILE, "--out", out], [*command("embed", out, whole), emb]

    def made() -> dict[str, int]:
        assert in_child(dreslcl, *tile).code == in_child(dreslcl, *embed).code == 0
        return {p.name: p.stat().st_ino for folder in (out / "rows", emb / "slide_features") for p in folder.glob("s*")}

    before = made()
    for age in (0, 4_000_000_000):  # written in 1970, or in 2096
        for path in (p for folder in (out, emb) for p in folder.rglob("*") if p.is_file()):
            os.utime(path, (age, age))
        assert made() == before
    shutil.copy(scans / "s1.svs", scans / "s2.svs")
    os.utime(scans / "s2.svs", (1, 1))  # another scan, older than all results
    assert {name for name, number in made().items() if before[name] != number} == {"s2.json", "s2.h5"}
    assert hdf5(emb / "slide_features" / "s2.h5")["features"] == pytest.approx(hdf5(emb / "slide_features" / "s1.h5")["features"], abs=1e-6)
