"""Scans read through the extra [openslide]: its own pixels, many files as one slide, threads, forks, damage; and without the extra."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scanners
from folders import refused, stamps
from scanners import write_dicom
from test_slide import check_levels, openslide_tile
from test_slide_vendors import picture

from dreslcl.common import SlideError
from dreslcl.config import TileConfig
from dreslcl.slide import Slide
from dreslcl.tiles import TileGrid, TilePixels, grid_path, read_slides, tile_slides

IMAGE = picture(896, 704)
KINDS = {"dicom": ("dicom", [1, 2, 4]), "mrxs": ("mirax", [1, 2]), "trestle": ("trestle", [1]), "vms": ("hamamatsu", [1, 2, 4, 8, 16, 32])}
SMALL = TileConfig(size=64)


def test_tiles_of_the_real_dicom_file_equal_openslides(openslide, test_data, tmp_path):
    path = test_data / "slides/multi_frame_jpeg_camelyon_challenge_image.dcm"
    [row] = tile_slides(path, tmp_path, TileConfig(size=64, mpp=28.9685))
    assert (row["status"], row["reader"], row["vendor"], row["mpp_source"]) == ("ok", "openslide", "dicom", "openslide.mpp")
    assert row["mpp"] == pytest.approx(28.9685) and row["tiles"] > 20 and "no light microscope" in row["warning"]
    grid = TileGrid.load(grid_path(tmp_path, row["slide_id"]))
    with openslide.OpenSlide(path) as theirs:
        for (x, y), tile in zip(grid.xy.tolist(), TilePixels(tmp_path, path, grid).read(np.arange(len(grid)))):
            assert np.array_equal(tile, openslide_tile(theirs, x, y, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_every_level_equals_openslides_and_level_0_the_picture(openslide, tmp_path, kind):
    path, (vendor, downsamples) = getattr(scanners, kind)(tmp_path, IMAGE), KINDS[kind]
    with Slide.open(path) as slide, openslide.OpenSlide(path) as theirs:
        assert (slide.reader, slide.vendor, slide.mpp, slide.mpp_source) == ("openslide", vendor, 0.5, "openslide.mpp")
        assert [level.downsample for level in slide.levels] == downsamples
        w, h = slide.size
        whole, shown = slide.read_region((0, 0), 0, slide.size), IMAGE[:h, :w].copy()
        if kind == "mrxs":  # the photo that is missing, without what its neighbours show of it
            shown[128:224, 128:224] = 255
        assert np.abs(whole.astype(int) - shown).mean() < 2.5 if kind == "vms" else np.array_equal(whole, shown)
        check_levels(slide, theirs, [(0, 0), (64, 96), (-32, 640), (20, 11)], 100, threads=2)
        slide.check()


FORK = """
import os, pathlib, signal, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, openslide
from dreslcl.slide import Slide

slide, right = Slide.open(pathlib.Path(sys.argv[1])), np.load(sys.argv[2])
slide._file.handle().set_cache(openslide.OpenSlideCache(0))

def reads_right(times):
    xy = np.array([(300, 200), (100, 301), (500, 500)])
    return all(slide.release() or np.array_equal(slide.read_tiles(xy, 90, 0.5), right) for _ in range(times))

assert reads_right(1)  # Pillow's imports, whose lock is another matter
with ThreadPoolExecutor(3) as pool:
    busy, children = [pool.submit(reads_right, 100) for _ in range(3)], []
    for _ in range(25):
        if not (pid := os.fork()):
            signal.alarm(30)
            os._exit(0 if reads_right(3) else 1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 25 and all(done.result() for done in busy)
"""


def test_children_forked_while_threads_read_do_so_too(openslide, tmp_path):
    """Threads hold locks of the handle that nobody would let go in a child. Without beartype, whose lock has that fault."""
    path = scanners.dicom(tmp_path, IMAGE)
    np.save(tmp_path / "right.npy", [IMAGE[y : y + 90, x : x + 90] for x, y in [(300, 200), (100, 301), (500, 500)]])
    subprocess.run([sys.executable, "-c", FORK, path, tmp_path / "right.npy"], check=True)


def test_a_pickled_slide_reads_and_a_closed_one_does_not(openslide, tmp_path):
    with Slide.open(scanners.dicom(tmp_path, IMAGE)) as slide, pickle.loads(pickle.dumps(slide)) as again:
        assert np.array_equal(again.read_region((300, 200), 0, (90, 90)), IMAGE[200:290, 300:390])
    with pytest.raises(SlideError, match="closed"):
        slide.read_region((300, 200), 0, (90, 90))


def test_a_damaged_or_vanished_file_is_named_and_the_rest_still_read(openslide, tmp_path):
    path = scanners.mrxs(tmp_path, IMAGE)
    data = tmp_path / "a" / "Data0000.dat"
    whole = bytearray(data.read_bytes())
    with Slide.open(path) as slide:
        right = slide.read_region((512, 512), 0, (128, 128))
        data.write_bytes(bytes(64) + whole[64:])  # the first photo
        for call in (lambda: slide.read_region((0, 0), 0, (64, 64)), slide.check):
            with refused(SlideError, r"a.mrxs: level 0: stored tile 0 .*copy it again"):
                call()
            slide.release()
            assert np.array_equal(slide.read_region((512, 512), 0, (128, 128)), right)
        data.unlink()
        with pytest.raises(SlideError, match=r"stored tile 2 .*copy it again"):
            slide.read_region((600, 0), 0, (50, 50))
    (tmp_path / "a" / "Index.dat").unlink()
    with pytest.raises(SlideError, match=r"a MIRAX scan that openslide cannot open \(.*copy all its files again"):
        Slide.open(path)


def test_many_files_are_one_slide_in_ids_and_fingerprints(openslide, tmp_path):
    source, work = tmp_path / "in", tmp_path / "w"
    for maker in (scanners.dicom, scanners.mrxs, scanners.vms):
        (source / maker.__name__).mkdir(parents=True)
        maker(source / maker.__name__, IMAGE)
    write_dicom(source / "other.dcm", IMAGE, series="5.6", mpp=0.5)  # alone: named after its file
    for _ in range(2):
        tile_slides(source, work, SMALL)
    rows = {row["slide_id"]: row for row in read_slides(work)}
    assert {name: Path(row["path"]).name for name, row in rows.items()} == {
        "dicom__case": "0.dcm", "mrxs__a": "a.mrxs", "other": "other.dcm", "vms__a": "a.vms",
    }  # fmt: skip
    assert {row["status"] for row in rows.values()} == {"ok"} and rows["dicom__case"]["levels"] == "3"
    parts = {"dicom__case": "dicom/case/2.dcm", "mrxs__a": "mrxs/a/Index.dat", "vms__a": "vms/a 1.jpg"}
    for name, part in parts.items():
        before = stamps(work, "rows/*.json")
        os.utime(source / part)
        tile_slides(source, work, SMALL)
        assert [stem for stem, time in stamps(work, "rows/*.json").items() if time != before[stem]] == [name]
        beside = source / (part if name != "mrxs__a" else "mrxs/a.mrxs")
        [row] = tile_slides(beside, tmp_path / "single", SMALL)  # any file of it that lies beside the one to open
        assert row["slide_id"] == name.split("__")[1] and row["tiles"] == int(rows[name]["tiles"])
    for part in parts.values():
        (source / part).unlink()
    rows = {row["slide_id"]: (row["status"], row["levels"]) for row in tile_slides(source, work, SMALL)}
    assert rows == {"dicom__case": ("ok", 2), "mrxs__a": ("error", ""), "vms__a": ("error", ""), "other": ("ok", 1)}


def test_two_dicom_series_of_several_files_in_one_folder_are_told_apart(tmp_path):
    scanners.dicom(tmp_path, IMAGE)
    for n in (1, 2):
        write_dicom(tmp_path / "case" / f"b{n}.dcm", IMAGE[::n, ::n], series="7.8", instance=n)
    write_dicom(tmp_path / "case" / "single.dcm", IMAGE, series="7.9")
    rows = {row["slide_id"]: row["error"] for row in tile_slides(tmp_path, tmp_path / "w", SMALL)}
    assert set(rows) == {"case", "case__single"} and "0.dcm and b1.dcm would share this id" in rows["case"]


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openslide", None)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        path = getattr(scanners, kind)(tmp_path / kind, IMAGE)
        with refused(SlideError, rf"^{path.name}: a .*which openslide reads; install it with: pip install 'dreslcl\[openslide\]'$"):
            Slide.open(path)
