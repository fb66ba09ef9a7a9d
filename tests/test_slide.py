"""Slide against openslide, against the pixels it was written from, under threads and forks, and on damaged files."""

import os
import pickle
import random
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dreslcl import segments
from dreslcl.common import SlideError
from dreslcl.slide import Slide


@pytest.fixture(scope="module")
def cmu(test_data) -> Path:
    return test_data / "slides/CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A lossless three-level scan of noise, so that each pixel tells its place, and its pixels. 0.5 µm/px, 112 x 80 px stored tiles."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1000, 1300, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("slide") / "drawn.tif"
    options = {"photometric": "rgb", "tile": (80, 112), "compression": "deflate", "metadata": None}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, resolution=(20000, 20000), resolutionunit="CENTIMETER", **options)
        for factor in (2, 4):
            writer.write(np.asarray(Image.fromarray(image).reduce(factor)), **options)
    return path, image


def on_white(image: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """The window of `size` at (x, y), white outside the image: the plain way."""
    window = np.full((size, size, 3), 255, np.uint8)
    inside = [i for i in range(size) if 0 <= x + i < image.shape[1]]
    for row in range(size if inside else 0):
        if 0 <= y + row < image.shape[0]:
            window[row, inside] = image[y + row, [x + i for i in inside]]
    return window


def openslide_tile(scan: openslide.OpenSlide, x: int, y: int, size: int) -> Image.Image:
    read = scan.read_region((x, y), 0, (size, size))
    white = Image.new("RGB", read.size, "white")
    white.paste(read, mask=read.getchannel("A"))
    return white


ALIGNED = [(0, 0), (240, 480), (1200, 1200)]
SHIFTED = [(7, 13), (239, 241), (1001, 2003)]
EDGES = [(-100, -50), (2120, 100), (100, 2900), (2219, 2966), (-256, 0), (5000, 5000)]


@pytest.mark.parametrize("places", [ALIGNED, SHIFTED, EDGES], ids=["aligned", "shifted", "edges"])
@pytest.mark.parametrize("threads", [1, 3])
def test_level_0_pixels_equal_openslide(cmu, places, threads):
    with openslide.OpenSlide(cmu) as theirs, Slide.open(cmu) as slide:
        for size in (256, 240, 37):
            tiles = slide.read_tiles(np.array(places), size, slide.mpp, threads=threads)
            for (x, y), tile in zip(places, tiles):
                assert np.array_equal(tile, openslide_tile(theirs, x, y, size))


@pytest.mark.parametrize("mpp", [0.6, 0.998, 1.0, 1.37, 2.0])
def test_resampled_tiles_equal_openslide_and_a_box_filter(cmu, mpp):
    with openslide.OpenSlide(cmu) as theirs, Slide.open(cmu) as slide:
        extent = slide.extent(224, mpp)
        assert extent == pytest.approx(224 * mpp / 0.499, abs=2)
        places = [(0, 0), (301, 77), (2000, 2800)]
        for (x, y), tile in zip(places, slide.read_tiles(np.array(places), 224, mpp, threads=2)):
            reference = openslide_tile(theirs, x, y, extent).resize((224, 224), Image.Resampling.BOX)
            assert np.abs(tile.astype(int) - np.asarray(reference)).mean() <= 2


def test_real_ndpi_equals_openslide_on_every_level(test_data):
    path = test_data / "slides/test3-TRITC 2 (560).ndpi"
    with openslide.OpenSlide(path) as theirs, Slide.open(path) as slide:
        assert (slide.vendor, slide.objective, slide.mpp_source) == ("hamamatsu", 40.0, "TIFF resolution")
        assert slide.mpp == pytest.approx(float(theirs.properties["openslide.mpp-x"]))
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0, 8.0]  # no macro, no map
        for level in slide.levels:
            step = int(level.downsample)
            xy = np.array([(160 * step, 100 * step), (0, 0)])
            tiles = slide.read_tiles(xy, 200, slide.mpp * step)
            for (x, y), tile in zip(xy.tolist(), tiles):
                reference = np.asarray(theirs.read_region((x, y), level.index, (200, 200)))
                assert np.array_equal(tile, reference[..., :3])
                assert reference[..., :3].max() > 0


def test_the_real_svs_describes_itself(cmu):
    with Slide.open(cmu) as slide:
        assert (slide.size, slide.mpp, slide.mpp_source) == ((2220, 2967), 0.499, "Aperio MPP")
        assert (slide.vendor, slide.objective, len(slide.levels)) == ("aperio", 20.0, 1)
        assert "CMU-1-Small-Region.svs" in repr(slide)


@settings(deadline=None, max_examples=40)
@given(
    places=st.lists(st.tuples(st.integers(-200, 1500), st.integers(-200, 1200)), min_size=0, max_size=12),
    size=st.integers(1, 150),
    threads=st.sampled_from([1, 2]),
)
@example(places=[(0, 1001), (1301, 0), (-2, 0)], size=2, threads=1)  # just outside, within the last stored tile
def test_any_windows_equal_the_source_pixels_in_the_callers_order(drawn, places, size, threads):
    path, image = drawn
    xy = np.array(places, np.int64).reshape(-1, 2)
    with Slide.open(path) as slide:
        for _ in range(2):  # the second time from what the first carried over
            tiles = slide.read_tiles(xy, size, 0.5, threads=threads)
            assert tiles.shape == (len(xy), size, size, 3)
            for (x, y), tile in zip(places, tiles):
                assert np.array_equal(tile, on_white(image, x, y, size))


def test_out_is_filled_and_returned_whatever_it_held(drawn):
    path, image = drawn
    out = np.full((2, 64, 64, 3), 77, np.uint8)
    with Slide.open(path) as slide:
        assert slide.read_tiles(np.array([(-10, -10), (1290, 990)]), 64, 0.5, out=out) is out
    assert np.array_equal(out, [on_white(image, -10, -10, 64), on_white(image, 1290, 990, 64)])


@pytest.mark.parametrize(
    "mpp, index, extent", [(0.5, 0, 64), (0.501, 0, 64), (0.97, 0, 124), (1.0, 1, 128), (1.9, 1, 243), (2.01, 2, 256), (5.0, 2, 640)]
)
def test_the_coarsest_level_that_is_fine_enough_is_read(drawn, mpp, index, extent):
    with Slide.open(drawn[0]) as slide:
        assert slide._choose(64, mpp)[0].index == index
        assert slide.extent(64, mpp) == extent


@pytest.mark.parametrize("mpp", [0.8, 1.0, 1.5, 2.0, 3.3, 11.0])
def test_each_level_shows_the_same_place(drawn, mpp):
    path, image = drawn
    with Slide.open(path) as slide:
        extent = slide.extent(40, mpp)
        for (x, y), tile in zip(places := [(120, 80), (412, 304)], slide.read_tiles(np.array(places), 40, mpp)):
            window = on_white(image, x, y, extent)
            reference = np.asarray(Image.fromarray(window).resize((40, 40), Image.Resampling.BOX)).astype(float)
            shifted = np.asarray(Image.fromarray(on_white(image, x + extent // 20, y, extent)).resize((40, 40), Image.Resampling.BOX))
            assert np.abs(tile - reference).mean() < 0.7 * np.abs(shifted - reference).mean()


def test_a_region_is_the_tiles_it_consists_of(drawn):
    path, image = drawn
    with Slide.open(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), (1300, 1000), 0.5), image)
        region = slide.read_region((-20, 30), (700, 530), 0.5)
        assert np.array_equal(region[:530, :530], on_white(image, -20, 30, 530))
        for mpp in (1.0, 1.25, 2.0, 4.0):
            whole = slide.read_region((0, 0), (60, 40), mpp)
            assert np.array_equal(whole[:32, :32], slide.read_tiles(np.array([(0, 0)]), 32, mpp)[0])
        assert slide.thumbnail(4.0).shape == (125, 162, 3)
        assert np.array_equal(slide.thumbnail(0.1), image)
        assert slide.thumbnail(4.0).astype(float).mean() == pytest.approx(image.mean(), abs=1)


def test_0_2999_and_0_3000_give_the_same_field_of_view(drawn):
    for size, mpp in [(256, 0.5), (256, 1.2), (224, 0.3), (512, 2.4)]:
        extents = []
        for level0 in (0.2999, 0.3000):
            with Slide.open(drawn[0], mpp=level0) as slide:
                assert slide.mpp == level0 and slide.mpp_source == "given"
                extents.append(slide.extent(size, mpp))
        assert abs(extents[0] - extents[1]) <= 1


def test_each_segment_is_decoded_once_over_calls_in_raster_order(drawn, monkeypatch):
    path, _ = drawn
    decoded = []
    load = segments.Segments.load
    monkeypatch.setattr(segments.Segments, "load", lambda self, fd, index, buffer: decoded.append(index) or load(self, fd, index, buffer))
    rows = [np.array([(x, y) for x in range(0, 1250, 50)]) for y in range(0, 950, 50)]
    with Slide.open(path) as slide:
        for row in rows:
            slide.read_tiles(row, 50, 0.5)
        assert sorted(decoded) == sorted(set(decoded)) and decoded == sorted(decoded)
        assert len(slide._carries[0][1].decoded) <= slide._stored[0].grid[0]  # what is carried over stays small
        decoded.clear()
        slide.read_tiles(np.concatenate(rows[::-1]), 50, 0.5, threads=2)
        assert len(decoded) == len(set(decoded))


def test_a_finer_resolution_than_the_scans_is_refused_with_the_next_step(drawn):
    with Slide.open(drawn[0]) as slide:
        for call in (lambda: slide.extent(256, 0.1), lambda: slide.read_tiles(np.array([(0, 0)]), 256, 0.25)):
            with pytest.raises(SlideError, match=r"drawn.tif: asked for 0\.\d+ µm/px but the scan has 0.5; use --mpp 0.5 or larger"):
                call()


def test_a_scan_without_resolution_opens_and_says_what_to_give(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((100, 100, 3), np.uint8), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    with Slide.open(tmp_path / "a.tif") as slide:
        assert slide.mpp is None and slide.mpp_xy is None and slide.mpp_source == "none"
        for call in (lambda: slide.extent(256, 0.5), lambda: slide.thumbnail(8.0)):
            with pytest.raises(SlideError, match="--mpp-csv or --default-mpp"):
                call()
    for mpp in (0, -1, float("nan"), float("inf"), 500):
        with pytest.raises(SlideError, match="no resolution of a scan"):
            Slide.open(tmp_path / "a.tif", mpp=mpp)


def test_a_closed_slide_says_so(drawn):
    slide = Slide.open(drawn[0])
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read_tiles(np.array([(0, 0)]), 64, 0.5)


def read_in_threads(path: Path, image: np.ndarray, count: int) -> int:
    """Wrong tiles of `count` that 8 threads read at once from one slide."""
    wrong = []
    with Slide.open(path) as slide:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(count // 8 // 5):
                xy = rng.integers(0, (1236, 936), (5, 2))
                if seed % 2:  # half of the threads read neighbours, which share and carry segments
                    xy = xy[0] + np.array([(0, 0), (32, 0), (64, 0), (0, 32), (32, 32)]) - 64
                tiles = slide.read_tiles(xy, 64, 0.5, threads=1 + seed % 3)
                wrong.extend(
                    1 for (x, y), t in zip(xy.tolist(), tiles) if not np.array_equal(t, padded[y + 64 : y + 128, x + 64 : x + 128])
                )

        padded = np.pad(image, ((64, 64), (64, 64), (0, 0)), constant_values=255)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return len(wrong)


def test_8_threads_share_a_slide_without_a_wrong_pixel(drawn):
    assert read_in_threads(*drawn, count=800) == 0


@pytest.mark.slow
def test_8_threads_read_10_000_tiles_without_a_wrong_pixel(drawn, cmu, tmp_path):
    assert read_in_threads(*drawn, count=10_000) == 0
    with Slide.open(cmu) as slide:
        image = slide.read_region((0, 0), (1300, 1000), slide.mpp)
        Image.fromarray(image).save(tmp_path / "part.png")
        tifffile.imwrite(tmp_path / "part.tif", image, photometric="rgb", compression="jpeg", tile=(240, 240), subsampling=(1, 1))
    with Slide.open(tmp_path / "part.tif", mpp=0.5) as part:
        stored = part.read_region((0, 0), (1300, 1000), 0.5)
    tifffile.imwrite(
        tmp_path / "mpp.tif", stored, photometric="rgb", tile=(240, 240), resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    assert read_in_threads(tmp_path / "mpp.tif", stored, count=10_000) == 0


def first_tile(slide: Slide) -> np.ndarray:
    return slide.read_tiles(np.array([(100, 100)]), 64, slide.mpp)[0]


def test_a_slide_survives_pickling_with_its_given_resolution(drawn):
    with Slide.open(drawn[0], mpp=0.25) as slide, pickle.loads(pickle.dumps(slide)) as again:
        assert (again.mpp, again.mpp_source) == (0.25, "given")
        assert np.array_equal(first_tile(again), first_tile(slide))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_read_a_slide_of_their_parent(drawn, method):
    with Slide.open(drawn[0]) as slide, ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        expected = first_tile(slide)
        for tile in pool.map(first_tile, [slide] * 4):
            assert np.array_equal(tile, expected)


def test_a_forked_child_reads_while_its_parent_does(drawn):
    path, image = drawn
    with Slide.open(path) as slide:
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                signal.alarm(60)
                good = all(np.array_equal(first_tile(slide), image[100:164, 100:164]) for _ in range(50))
                os._exit(0 if good else 1)
            children.append(pid)
        assert all(np.array_equal(first_tile(slide), image[100:164, 100:164]) for _ in range(50))
        assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def truncations(path: Path, folder: Path, count: int) -> int:
    """Cut a scan at random lengths; each must raise SlideError or give its right pixels. Returns how many were refused."""
    with Slide.open(path) as slide:
        places = np.array([(x, y) for y in range(0, slide.size[1], 256) for x in range(0, slide.size[0], 256)])
        mpp, right = slide.mpp, slide.read_tiles(places, 256, slide.mpp)
    data, refused, draw = path.read_bytes(), 0, random.Random(1)
    for length in [draw.randrange(1, len(data)) for _ in range(count)]:
        cut = folder / path.name
        cut.write_bytes(data[:length])
        try:
            with Slide.open(cut, mpp=mpp) as slide:
                assert np.array_equal(slide.read_tiles(places, 256, mpp), right)
        except SlideError as error:
            refused += 1
            assert "\n" not in str(error)
    return refused


def test_a_scan_cut_at_random_lengths_never_shows_wrong_pixels(drawn, tmp_path):
    assert truncations(drawn[0], tmp_path, 20) == 20


def test_the_real_svs_cut_at_random_lengths_never_shows_wrong_pixels(cmu, tmp_path):
    assert truncations(cmu, tmp_path, 20) >= 10  # its label and macro lie behind the scan


def jpeg_scan(path: Path) -> tuple[int, int]:
    """Write a scan of four JPEG tiles; returns where the second one lies."""
    y, x = np.mgrid[:512, :512]
    image = np.stack([x / 2, y / 2, (x + y) / 4], axis=2).astype(np.uint8)
    tifffile.imwrite(path, image, photometric="rgb", compression="jpeg", tile=(256, 256), metadata=None)
    with tifffile.TiffFile(path) as tif:
        return tif.pages.first.dataoffsets[1], tif.pages.first.databytecounts[1]


@pytest.mark.parametrize("damage", ["ends early", "other size", "noise", "no start"])
def test_a_damaged_jpeg_tile_is_named_and_its_neighbours_are_read(tmp_path, damage):
    path = tmp_path / "a.tif"
    at, count = jpeg_scan(path)
    data = bytearray(path.read_bytes())
    if damage == "ends early":
        data[at + count // 2 : at + count] = bytes(count - count // 2)
    elif damage == "other size":
        wide = simplejpeg.encode_jpeg(np.zeros((128, 512, 3), np.uint8))  # as many pixels, in another shape
        data[at : at + count] = wide.ljust(count, b"\0")
        assert len(wide) <= count
    elif damage == "noise":
        scan = data.index(b"\xff\xda", at) + 20
        data[scan : at + count] = random.Random(0).randbytes(at + count - scan)
    else:
        data[at : at + 2] = b"\0\0"
    path.write_bytes(data)
    with Slide.open(path, mpp=0.5) as slide:
        slide.read_tiles(np.array([(0, 0), (0, 256), (256, 256)]), 256, 0.5)
        for threads in (1, 2):
            with pytest.raises(SlideError, match=r"a.tif: level 0: stored tile 1 .*copy it again") as caught:
                slide.read_tiles(np.array([(0, 0), (200, 0)]), 256, 0.5, threads=threads)
            assert "\n" not in str(caught.value)


def test_a_file_cut_after_it_was_opened_is_noticed(drawn, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(drawn[0].read_bytes())
    with Slide.open(path) as slide:
        os.truncate(path, 1000)
        with pytest.raises(SlideError, match="runs past the end of the file"):
            slide.read_tiles(np.array([(0, 0)]), 256, 0.5)


@pytest.mark.parametrize(
    "tag, value", [("ImageWidth", 2**31 - 1), ("ImageLength", 2**31 - 1), ("TileWidth", 2**20), ("TileWidth", 0), ("TileLength", 0)]
)
def test_a_claim_of_impossible_size_is_refused_before_memory_is_taken(tmp_path, tag, value):
    path = tmp_path / "a.tif"
    jpeg_scan(path)
    with tifffile.TiffFile(path, mode="r+b") as tif:
        tif.pages.first.tags[tag].overwrite(value, dtype="I")
    with pytest.raises(SlideError) as caught:
        Slide.open(path)
    assert "\n" not in str(caught.value)


def test_offsets_and_byte_counts_beyond_the_file_are_refused(tmp_path):
    for tag in ("TileOffsets", "TileByteCounts"):
        path = tmp_path / f"{tag}.tif"
        jpeg_scan(path)
        with tifffile.TiffFile(path, mode="r+b") as tif:
            values = list(tif.pages.first.tags[tag].value)
            tif.pages.first.tags[tag].overwrite([values[0], 2**32 - 5, *values[2:]], dtype="I")
        with pytest.raises(SlideError, match="1 of 4 stored tiles lie beyond the end of the file"):
            Slide.open(path)
