"""A full disk, a read-only one, files that may not be read or written, inputs that vanish, clocks that lie."""

import importlib
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from attack import TILE, Done, Forbidden, command, contents, dreslcl, forget_root, hdf5, in_child, resize, small_disk
from test_kill import assert_whole_run, tiled

from dreslcl.common import read_table


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
        assert {p.name for p in out.iterdir()} == {".lock", "metrics.json", "predictions.csv", "report.html"}
        assert (out / "metrics.json").read_bytes() == (whole / "eval" / "metrics.json").read_bytes()


def starved(limit: int, *arguments) -> Done:
    """The command where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return dreslcl(*arguments)


def limits(folder: Path, count: int) -> list[int]:
    """File sizes at which a run that writes `folder` must fail, spread over the sizes of its files."""
    sizes = sorted({p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith((".lock", "events."))})
    return sorted({sizes[i] - 1 for i in np.linspace(len(sizes) - 1, 0, min(count, len(sizes))).astype(int)})


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_a_file_that_may_not_grow_stops_the_command_in_one_line(work, whole, tmp_path, name, count):
    tried = limits(whole / name, count)
    for limit in tried:
        out = tmp_path / str(limit)
        done = in_child(starved, limit, *command(name, work, whole), out)
        done.says("File too large")
        assert not list(out.rglob("*.part"))
        assert in_child(dreslcl, *command(name, work, whole), out).code == 0
        assert_like_whole(name, out, whole)
    print(f"\n{name}: {len(tried)} limits")


def on_small_disk(disk: Path, kilobytes: int | None, out: Path, arguments: list) -> tuple[Done, list[str], Done]:
    """The command on a full disk of so many kB, then on one with room, kept in `out`; without a number only on a read-only disk."""
    small_disk(disk, kilobytes or ROOM, read_only=not kilobytes)
    first = dreslcl(*arguments, disk / "out")
    parts = [p.name for p in disk.rglob("*.part")]
    if not kilobytes:
        return first, parts, first
    resize(disk, ROOM)
    second = dreslcl(*arguments, disk / "out")
    shutil.copytree(disk / "out", out)
    return first, parts, second


ROOM = 1 << 20  # kB


@pytest.mark.parametrize("shares", [(0.6,), pytest.param(np.linspace(0.02, 0.98, 25), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_a_full_disk_stops_the_command_in_one_line(work, whole, tmp_path, name, shares):
    need = sum(-(-p.stat().st_size // 4096) * 4 for p in (whole / name).rglob("*") if p.is_file())
    (tmp_path / "disk").mkdir()
    stopped = 0
    for share in shares:
        out = tmp_path / str(share)
        kilobytes = max(8, int(need * share))
        try:
            first, parts, second = in_child(on_small_disk, tmp_path / "disk", kilobytes, out, command(name, work, whole))
        except Forbidden as error:
            pytest.skip(f"cannot make a small disk here: {error}")
        first.says("No space left on device")
        assert not parts and second.code == 0
        assert_like_whole(name, out, whole)
        stopped += 1
    print(f"\n{name}: {stopped} disks, of {need} kB needed")


@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_a_read_only_disk_stops_the_command_in_one_line(work, whole, tmp_path, name):
    (tmp_path / "disk").mkdir()
    try:
        first, parts, _ = in_child(on_small_disk, tmp_path / "disk", None, tmp_path / "out", command(name, work, whole))
    except Forbidden as error:
        pytest.skip(f"cannot make a read-only disk here: {error}")
    first.says("cannot be written (Read-only file system)", "run the same command again")
    assert not parts


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


@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval"])
def test_a_folder_that_may_not_be_written_stops_the_command_in_one_line(work, whole, tmp_path, name):
    done = in_child(forbidden, tmp_path, 0o555, [*command(name, work, whole), tmp_path / "out"])
    done.says("cannot be written (Permission denied)", str(tmp_path / "out"))
    (tmp_path / "there").mkdir()
    done = in_child(forbidden, tmp_path / "there", 0o555, [*command(name, work, whole), tmp_path / "there"])
    done.says("cannot be written (Permission denied)", str(tmp_path / "there"))


@pytest.mark.parametrize(
    "name, place",
    [
        ("pretrain", "work/slides.csv"), ("pretrain", "work/tiles/s3.h5"), ("pretrain", "slides/s3.svs"), ("pretrain", "out/bank/rows.f16"),
        ("pretrain", "out/bank/bank.json"), ("pretrain", "out/checkpoint.pt"),
        ("embed", "whole/pretrain/model/weights.safetensors"), ("embed", "whole/pretrain/model/open_clip/open_clip_model.safetensors"),
        ("eval", "whole/embed/embeddings.h5"),
    ],
)  # fmt: skip
def test_an_input_that_may_not_be_read_is_named_in_one_line(work, whole, tmp_path, name, place):
    shutil.copytree(work.parent, tmp_path / "in")
    shutil.copytree(whole, tmp_path / "in" / "whole")
    shutil.copytree(whole / "pretrain", tmp_path / "in" / "out")
    for table in (tmp_path / "in" / "work").rglob("slides.csv"):
        table.write_text(table.read_text().replace(str(work.parent), str(tmp_path / "in")))
    arguments = command(name, tmp_path / "in" / "work", tmp_path / "in" / "whole")
    arguments[-1:-1] = ["--epochs", 3] if name == "pretrain" else []
    done = in_child(forbidden, tmp_path / "in" / place, 0, [*arguments, tmp_path / "in" / "out"])
    done.says("pretrain/model" if "/model/" in place else Path(place).stem)


def test_a_scan_that_may_not_be_read_gets_its_row(work, tmp_path):
    shutil.copytree(work.parent / "slides", tmp_path / "slides")
    arguments = ["tile", tmp_path / "slides", *TILE, "--out", tmp_path / "out"]
    done = in_child(forbidden, tmp_path / "slides" / "s3.svs", 0, arguments)
    assert done.code == 1 and "1 of 8 slides failed" in done.err
    assert [(r["slide_id"], r["error"]) for r in read_table(tmp_path / "out" / "slides.csv") if r["status"] != "ok"] == [
        ("s3", "s3.svs: cannot be opened (Permission denied)")
    ]


# inputs that vanish or are cut while they are read


def vanishing(scan: Path, module: str, name: str, cut: bool, arguments: list) -> Done:
    """The command where `scan` is deleted, or cut to a tenth, just before the function `name` is called for the first time."""
    owner = importlib.import_module(module)
    *path, name = name.split(".")
    for step in path:
        owner = getattr(owner, step)
    original, calls = getattr(owner, name), []

    def wrapper(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            os.truncate(scan, scan.stat().st_size // 10) if cut else scan.unlink()
        return original(*args, **options)

    setattr(owner, name, wrapper)
    return dreslcl(*arguments)


@pytest.fixture
def own(work, tmp_path) -> Path:
    """A WORK folder and scans of its own, to damage."""
    shutil.copytree(work.parent, tmp_path / "in")
    table = tmp_path / "in" / "work" / "slides.csv"
    table.write_text(table.read_text().replace(str(work.parent), str(tmp_path / "in")))
    return tmp_path / "in" / "work"


@pytest.mark.parametrize("cut", [False, True])
def test_a_scan_that_vanishes_while_tiling_gets_its_row_and_the_next_run_completes(own, tmp_path, cut):
    scan = own.parent / "slides" / "s5.svs"
    data, stamp = scan.read_bytes(), scan.stat()
    arguments = ["tile", own.parent / "slides", *TILE, "--out", tmp_path / "out"]
    done = in_child(vanishing, scan, "dreslcl.tiles", "_tile", cut, arguments)
    assert done.code == 1 and "1 of 8 slides failed" in done.err and "Traceback" not in done.err
    bad = [row for row in read_table(tmp_path / "out" / "slides.csv") if row["status"] != "ok"]
    assert [row["slide_id"] for row in bad] == ["s5"] and ("damaged or incomplete" if cut else "No such file") in bad[0]["error"]
    scan.write_bytes(data)
    os.utime(scan, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert in_child(dreslcl, *arguments).code == 0
    assert in_child(dreslcl, "tile", own.parent / "slides", *TILE, "--out", tmp_path / "undisturbed").code == 0
    assert tiled(tmp_path / "out") == tiled(tmp_path / "undisturbed")


@pytest.mark.parametrize("cut", [False, True])
def test_a_scan_that_vanishes_while_training_is_named_and_the_run_goes_on_when_it_is_back(own, whole, tmp_path, cut):
    scan = own.parent / "slides" / "s6.svs"
    data = scan.read_bytes()
    arguments = [*command("pretrain", own, whole), tmp_path / "out"]
    done = in_child(vanishing, scan, "dreslcl.trainer", "MemoryBank.fill", cut, arguments)
    if cut or done.code:  # a deleted scan that is open already can be read to the end
        done.says("s6.svs")
    scan.write_bytes(data)
    assert in_child(dreslcl, *arguments).code == 0
    assert_whole_run(tmp_path / "out", 2)


@pytest.mark.parametrize("cut", [False, True])
def test_a_scan_that_vanishes_while_embedding_leaves_the_others_embedded(own, whole, tmp_path, cut):
    scan = own.parent / "slides" / "s6.svs"
    data = scan.read_bytes()
    arguments = [*command("embed", own, whole), tmp_path / "out"]
    done = in_child(vanishing, scan, "dreslcl.model", "DRESLCL.embed_features", cut, arguments)
    assert done.code == 1 and "s6" in done.err.splitlines()[-1] and "Traceback" not in done.err
    assert {p.stem for p in (tmp_path / "out" / "slide_features").glob("*.h5")} == {f"s{i}" for i in range(8) if i != 6}
    scan.write_bytes(data)
    assert in_child(dreslcl, *arguments).code == 0
    assert_like_whole("embed", tmp_path / "out", whole)


# clocks


def test_times_of_files_that_lie_neither_hide_a_change_nor_redo_what_is_done(own, whole, tmp_path):
    scans, out, emb = own.parent / "slides", tmp_path / "out", tmp_path / "emb"
    tile, embed = ["tile", scans, *TILE, "--out", out], [*command("embed", out, whole), emb]
    assert in_child(dreslcl, *tile).code == in_child(dreslcl, *embed).code == 0

    def made() -> dict[str, int]:
        return {p.name: p.stat().st_ino for folder in (out / "rows", emb / "slide_features") for p in folder.glob("s*")}

    before = made()
    for age in (0, 4_000_000_000):  # written in 1970, or in 2096
        for path in (p for folder in (out, emb) for p in folder.rglob("*") if p.is_file()):
            os.utime(path, (age, age))
        assert in_child(dreslcl, *tile).code == in_child(dreslcl, *embed).code == 0
        assert made() == before
    old = scans / "s2.svs"
    shutil.copy(scans / "s1.svs", old)
    os.utime(old, (1, 1))  # another scan, older than all results
    assert in_child(dreslcl, *tile).code == in_child(dreslcl, *embed).code == 0
    assert {name for name, number in made().items() if before[name] != number} == {"s2.json", "s2.h5"}
    assert hdf5(emb / "slide_features" / "s2.h5")["features"] == pytest.approx(hdf5(emb / "slide_features" / "s1.h5")["features"], abs=1e-6)
