"""Slide against openslide, against the pixels it was written from, under threads and forks, and on damaged files."""

import os
import pickle
import random
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import tifffile
from folders import refused
from hypothesis import assume, example, given, settings
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
    image = np.random.default_rng(0).integers(0, 255, (1000, 1300, 3), dtype=np.uint8)
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


def openslide_tile(scan: Any, x: int, y: int, size: int, level: int = 0) -> Image.Image:
    read = scan.read_region((x, y), level, (size, size))
    white = Image.new("RGB", read.size, "white")
    white.paste(read, mask=read.getchannel("A"))
    return white


def check_levels(slide: Slide, theirs: Any, places: list[tuple[int, int]], size: int, threads: int) -> None:
    """Tiles and regions at places of every level, in its own pixels, equal openslide's."""
    for level in slide.levels:
        step = int(level.downsample)
        tiles = slide.read_tiles(np.array(places) * step, size, slide.mpp * step, threads=threads)
        for (x, y), tile in zip(places, tiles):
            assert np.array_equal(tile, openslide_tile(theirs, x * step, y * step, size, level.index)), (level, x, y)
            assert np.array_equal(tile, slide.read_region((x * step, y * step), level.index, (size, size)))


ALIGNED = [(0, 0), (240, 480), (1200, 1200)]
SHIFTED = [(7, 13), (239, 241), (1001, 2003)]
EDGES = [(-100, -50), (2120, 100), (100, 2900), (2219, 2966), (-256, 0), (5000, 5000)]


FACTS = {  # of real scans: vendor, size, downsamples (no macro, no map)
    "CMU-1-Small-Region.svs": ("aperio", (2220, 2967), "Aperio MPP", [1]),
    "test3-TRITC 2 (560).ndpi": ("hamamatsu", (3968, 4864), "TIFF resolution", [1, 2, 4, 8]),
}


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("threads, places", [(1, ALIGNED), (3, SHIFTED), (1, EDGES), (3, EDGES)])
def test_pixels_of_every_level_equal_openslides(openslide, test_data, name, places, threads):
    path, (vendor, extent, source, downsamples) = test_data / "slides" / name, FACTS[name]
    with openslide.OpenSlide(path) as theirs, Slide.open(path) as slide:
        assert (slide.vendor, slide.size, slide.mpp_source) == (vendor, extent, source) and name in repr(slide)
        assert (
            slide.mpp == pytest.approx(float(theirs.properties["openslide.mpp-x"]))
            and [level.downsample for level in slide.levels] == downsamples
        )
        for size in (256, 240, 37):
            check_levels(slide, theirs, places, size, threads)


@pytest.mark.parametrize("mpp", [0.6, 0.998, 1.0, 1.37, 2.0])
def test_resampled_tiles_equal_openslide_and_a_box_filter(openslide, cmu, mpp):
    with openslide.OpenSlide(cmu) as theirs, Slide.open(cmu) as slide:
        extent = slide.extent(224, mpp)
        assert extent == pytest.approx(224 * mpp / 0.499, abs=2)
        places = [(0, 0), (301, 77), (2000, 2800)]
        for (x, y), tile in zip(places, slide.read_tiles(np.array(places), 224, mpp, threads=2)):
            right = openslide_tile(theirs, x, y, extent).resize((224, 224), Image.Resampling.BOX)
            assert np.abs(tile - np.asarray(right).astype(float)).mean() <= 2


@given(st.integers(1, 90), st.floats(1.001, 2), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_shrinking_is_pillows_box_filter_but_for_its_second_rounding(size, scale, x, y, seed):
    edge, cuts = size * scale, np.arange(size + 1) * scale
    assume(min(np.abs((cuts + at) % 1 - 0.5).min() for at in (x, y)) > 1e-9)  # a pixel's middle on a border: rounding decides
    reach = int(np.ceil(edge + max(x, y)))
    pixels = np.random.default_rng(seed).integers(0, 256, (reach, reach, 3), dtype=np.uint8)
    box = (x, y, min(x + edge, reach), min(y + edge, reach))
    theirs = Image.fromarray(pixels).resize((size, size), Image.Resampling.BOX, box=box)
    assert np.abs(segments.shrink(pixels, (x, y), edge, size) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize("cut", [(0, 0), (1, 0), (24, 96)])
@pytest.mark.parametrize("lossless", [False, True])
def test_tiles_at_half_the_resolution_are_means_of_two_by_two_pixels_wherever_they_lie(cmu, tmp_path, cut, lossless):
    with Slide.open(cmu) as slide:
        image = slide.read_region((0, 0), 0, (600 - cut[0], 500 - cut[1]))
    options = {} if lossless else {"compression": "jpeg"}
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(112, 96), photometric="rgb", **options)
    with Slide.open(tmp_path / "a.tif", mpp=0.25) as slide:
        w, h = slide.size
        assert bool(slide._halves[0]) == (w % 2 == h % 2 == 0)
        white = np.full((1000, 1000, 3), 255, np.uint16)
        white[100 : 100 + h, 100 : 100 + w] = slide.read_region((0, 0), 0, slide.size)
        even, odd = [(0, 0), (100, 96), (-50, 30), (w - 40, h - 90), (w - 2, 4), (-100, h)], [(3, 8), (51, 7), (w - 31, h - 31)]
        for places in (even, even + odd):
            for (x, y), tile in zip(places, slide.read_tiles(np.array(places), 70, 0.5, threads=2)):
                window = white[100 + y :, 100 + x :][:140, :140]
                assert np.array_equal(tile, (window.reshape(70, 2, 70, 2, 3).sum((1, 3)) + 2) // 4)


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
        for _ in range(2):  # the second time from what the first kept
            out = np.full((len(xy), size, size, 3), 77, np.uint8)
            assert slide.read_tiles(xy, size, 0.5, threads=threads, out=out) is out
            for (x, y), tile in zip(places, out):
                assert np.array_equal(tile, on_white(image, x, y, size))


@pytest.mark.parametrize(
    "mpp, index, extent", [(0.5, 0, 64), (0.501, 0, 64), (0.97, 0, 124), (1.0, 1, 128), (1.9, 1, 243), (2.01, 2, 256), (5.0, 2, 640)]
)
def test_the_coarsest_level_that_is_fine_enough_is_read(drawn, mpp, index, extent):
    with Slide.open(drawn[0]) as slide:
        assert slide._choose(64, mpp)[0].index == index
        assert slide.extent(64, mpp) == extent


def test_thumbnails_and_regions_are_the_tiles_they_consist_of(drawn, monkeypatch):
    path, image = drawn
    monkeypatch.setattr("dreslcl.slide.BLOCK", 200)
    with Slide.open(path) as slide:
        assert np.array_equal(slide.read_region((0, 0), 0, (1300, 1000)), image)
        assert np.array_equal(slide.read_region((-20, 30), 0, (700, 530))[:, :530], on_white(image, -20, 30, 530))
        assert np.array_equal(slide.read_region((40, 80), 2, (50, 50)), slide.read_tiles(np.array([(40, 80)]), 50, 2.0)[0])
        assert np.array_equal(slide.thumbnail(0.1), image)
        for mpp in (1.0, 1.25, 2.0, 4.0):
            whole = slide.thumbnail(mpp)
            assert whole.shape == (round(500 / mpp), round(650 / mpp), 3)
            assert np.array_equal(whole[:32, :32], slide.read_tiles(np.array([(0, 0)]), 32, mpp)[0])
            assert whole.astype(float).mean() == pytest.approx(image.mean(), abs=1)


@pytest.mark.parametrize("edge", [(256, 256), (240, 240), (512, 512), (31, 7)])
def test_no_buffer_begins_where_the_decoder_would_write_past_the_cache(edge):
    cache = segments.DecodeCache()
    held = [cache.buffer(edge) for _ in range(4)]  # at once, so that no two share memory
    assert all(buffer.ctypes.data % 16 == 8 and buffer.shape == (*edge[::-1], 3) and buffer.flags.c_contiguous for buffer in held)


def test_each_segment_is_decoded_once_over_calls_in_raster_order(drawn, spy):
    loads = spy(segments.Segments, "load")
    rows = [np.array([(x, y) for x in range(0, 1250, 50)]) for y in range(0, 950, 50)]
    with Slide.open(drawn[0]) as slide:
        for row in rows:
            slide.read_tiles(row, 50, 0.5)
        decoded = [index for _, _, index, _ in loads]
        assert decoded == sorted(set(decoded))
        assert len(slide._caches[0][1].decoded) <= slide._caches[0][0].grid[0]  # what is kept stays small
        loads.clear()
        slide.read_tiles(np.concatenate(rows[::-1]), 50, 0.5, threads=2)
        assert len(loads) == len({index for _, _, index, _ in loads})


def test_what_cannot_be_read_as_asked_is_refused_with_the_next_step(drawn, tmp_path):
    with Slide.open(drawn[0]) as slide:
        for call in (lambda: slide.extent(256, 0.1), lambda: slide.read_tiles(np.array([(0, 0)]), 256, 0.25)):
            with pytest.raises(SlideError, match=r"drawn.tif: asked for 0\.\d+ µm/px but the scan has 0.5; use --mpp 0.5 or larger"):
                call()
    with pytest.raises(SlideError, match="closed"):
        slide.read_tiles(np.array([(0, 0)]), 64, 0.5)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((100, 100, 3), np.uint8), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    with Slide.open(path) as slide, Slide.open(path, default_mpp=1) as second:
        assert slide.mpp is None and slide.mpp_xy is None and slide.mpp_source == "none"
        assert (second.mpp, second.mpp_source) == (1, "default")
        for call in (lambda: slide.extent(256, 0.5), lambda: slide.thumbnail(8.0)):
            with pytest.raises(SlideError, match="--overrides or --default-mpp"):
                call()
    for mpp in (0, -1, float("nan"), float("inf"), 500):
        with pytest.raises(SlideError, match="no resolution of a scan"):
            Slide.open(path, mpp=mpp)


@pytest.mark.parametrize("count", [800, pytest.param(10_000, marks=pytest.mark.slow)])
def test_8_threads_share_a_slide_without_a_wrong_pixel(drawn, count):
    path, image = drawn
    padded = np.pad(image, ((64, 64), (64, 64), (0, 0)), constant_values=255)
    with Slide.open(path) as slide, ThreadPoolExecutor(8) as pool:

        def wrong(seed: int) -> list:
            rng, places = np.random.default_rng(seed), []
            for _ in range(count // 8 // 5):
                xy = rng.integers(0, (1236, 936), (5, 2))
                if seed % 2:  # half of the threads read neighbours, which share and keep segments
                    xy = xy[0] + np.array([(0, 0), (32, 0), (64, 0), (0, 32), (32, 32)]) - 64
                tiles = slide.read_tiles(xy, 64, 0.5, threads=1 + seed % 3)
                right = [padded[y + 64 : y + 128, x + 64 : x + 128] for x, y in xy.tolist()]
                places.extend(place for place, tile, good in zip(xy.tolist(), tiles, right) if not np.array_equal(tile, good))
            return places

        assert list(pool.map(wrong, range(8))) == 8 * [[]]


def first_tile(slide: Slide) -> np.ndarray:
    return slide.read_tiles(np.array([(100, 100)]), 64, slide.mpp)[0]


def test_another_process_reads_a_pickled_slide(drawn):
    with Slide.open(drawn[0], mpp=0.25) as slide, pickle.loads(pickle.dumps(slide)) as again:
        assert (again.mpp, again.mpp_source) == (0.25, "given")
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            assert all(np.array_equal(tile, first_tile(again)) for tile in pool.map(first_tile, [slide] * 4))


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


@pytest.mark.parametrize("name", ["drawn", "cmu"])
def test_a_scan_cut_at_random_lengths_never_shows_wrong_pixels(request, tmp_path, name):
    path = request.getfixturevalue(name)
    path = path if name == "cmu" else path[0]
    with Slide.open(path) as slide:
        places = np.array([(x, y) for y in range(0, slide.size[1], 256) for x in range(0, slide.size[0], 256)])
        mpp, right = slide.mpp, slide.read_tiles(places, 256, slide.mpp)
    data, refused, draw = path.read_bytes(), 0, random.Random(1)
    for length in [draw.randrange(1, len(data)) for _ in range(20)]:
        cut = tmp_path / path.name
        cut.write_bytes(data[:length])
        try:
            with Slide.open(cut, mpp=mpp) as slide:
                assert np.array_equal(slide.read_tiles(places, 256, mpp), right)
        except SlideError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused >= (10 if name == "cmu" else 20)  # the label and macro of the real one lie behind its scan


@pytest.mark.parametrize("damage", ["ends early", "other size", "noise", "no start"])
def test_a_damaged_jpeg_tile_is_named_and_its_neighbours_are_read(tmp_path, damage):
    path, (y, x) = tmp_path / "a.tif", np.mgrid[:512, :512]
    image = np.stack([x / 2, y / 2, (x + y) / 4], axis=2).astype(np.uint8)
    tifffile.imwrite(path, image, photometric="rgb", compression="jpeg", tile=(256, 256), metadata=None)
    with tifffile.TiffFile(path) as tif:
        at, count = tif.pages.first.dataoffsets[1], tif.pages.first.databytecounts[1]
    data = bytearray(path.read_bytes())
    if damage == "ends early":
        data[at + count // 2 : at + count] = bytes(count - count // 2)
    elif damage == "other size":
        wide = simplejpeg.encode_jpeg(np.zeros((128, 512, 3), np.uint8))  # as many pixels, in another shape
        data[at : at + count] = wide.ljust(count, b"\0")
    elif damage == "noise":
        scan = data.index(b"\xff\xda", at) + 20
        data[scan : at + count] = random.Random(0).randbytes(at + count - scan)
    else:
        data[at : at + 2] = b"\0\0"
    path.write_bytes(data)
    with Slide.open(path, mpp=0.5) as slide:
        slide.read_tiles(np.array([(0, 0), (0, 256), (256, 256)]), 256, 0.5)
        slide.check(1)  # a sample may miss it
        for most in (0, 4, 99):
            with pytest.raises(SlideError, match="stored tile 1 "):
                slide.check(most)
        for threads in (1, 2):
            with refused(SlideError, r"a.tif: level 0: stored tile 1 .*copy it again"):
                slide.read_tiles(np.array([(0, 0), (200, 0)]), 256, 0.5, threads=threads)


def test_a_file_cut_after_it_was_opened_is_noticed(drawn, tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(drawn[0].read_bytes())
    with Slide.open(path) as slide:
        os.truncate(path, 1000)
        with pytest.raises(SlideError, match="runs past the end of the file"):
            slide.read_tiles(np.array([(0, 0)]), 256, 0.5)
