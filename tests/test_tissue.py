"""Tissue masks of drawn slides with known answers, fractions against a plain loop, polygons there and back."""

import json

import numpy as np
import pytest
from folders import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl.common import SlideError
from dreslcl.tissue import box_fractions, draw_polygons, mask_polygons, pen_mask, polygons_to_geojson, read_geojson, tissue_mask

MPP = 8.0
PINK, PURPLE, PALE = (214, 150, 190), (120, 70, 150), (236, 218, 232)
INKS = {"blue": (30, 60, 190), "green": (20, 130, 70), "red": (215, 25, 30), "black": (25, 25, 30)}


def glass(colour=(243, 242, 244), size=200, noise=2.0, seed=0) -> np.ndarray:
    """Bare glass with the noise of a camera, (size, size, 3)."""
    rng = np.random.default_rng(seed)
    return np.clip(np.array(colour) + rng.normal(0, noise, (size, size, 3)), 0, 255).astype(np.uint8)


def paint(image: np.ndarray, box: tuple[int, int, int, int], colour, noise=8.0) -> np.ndarray:
    x0, y0, x1, y1 = box
    pixels = np.array(colour) + np.random.default_rng(1).normal(0, noise, (y1 - y0, x1 - x0, 3))
    image[y0:y1, x0:x1] = np.clip(pixels, 0, 255).astype(np.uint8)
    return image


@pytest.mark.parametrize("colour", [PINK, PURPLE, PALE], ids=["eosin", "haematoxylin", "pale stroma"])
@pytest.mark.parametrize("ground", [(243, 242, 244), (240, 232, 215)], ids=["clear glass", "yellowish glass"])
def test_a_drawn_piece_of_tissue_is_found_to_within_a_pixel(colour, ground):
    seen = tuple(np.array(colour) * ground / (243, 242, 244))
    mask = tissue_mask(paint(glass(ground), (40, 60, 140, 150), seen, noise=3), MPP)
    assert mask[61:149, 41:139].all()
    mask[58:152, 38:142] = False
    assert not mask.any()


EMPTY = {
    "white": glass((255, 255, 255), noise=0),
    "noisy glass": glass((244, 244, 244)),
    "tinted glass": glass((238, 229, 212)),
    "black": glass((0, 0, 0), noise=0),
    "noisy black": glass((3, 3, 3), noise=3),
    "grey smear": paint(glass(), (20, 20, 120, 180), (150, 150, 150), noise=3),
    "uneven light": np.repeat(np.linspace(180, 250, 200).astype(np.uint8)[None, :, None], 200, 0).repeat(3, 2),
    "black padding": paint(glass(), (0, 0, 60, 200), (0, 0, 0), noise=3),
}


@pytest.mark.parametrize("slide", EMPTY)
def test_a_slide_without_tissue_stays_empty(slide):
    assert not tissue_mask(EMPTY[slide], MPP).any()


def test_full_slides_fluorescence_and_a_given_threshold():
    assert tissue_mask(paint(glass(PINK), (0, 0, 200, 100), PURPLE), MPP).mean() > 0.98  # all tissue: not split
    mask = tissue_mask(paint(glass((3, 2, 2), noise=1), (50, 50, 150, 150), (40, 4, 4), noise=2), MPP)  # coloured signal on black
    assert mask[52:148, 52:148].all() and mask.sum() < 104**2
    image = paint(glass(), (40, 40, 160, 160), PALE, noise=1)
    assert tissue_mask(image, MPP)[100, 100] and not tissue_mask(image, MPP, threshold=0.2).any()


def test_specks_go_small_holes_fill_lumens_stay_and_a_gap_open_to_the_edge_is_no_hole():
    image = paint(glass(), (20, 0, 180, 180), PURPLE)
    image[60:70, 60:70] = 244  # 80 µm: a gap
    image[90:150, 90:150] = 244  # 480 µm: a lumen
    image[5:10, 5:10] = PURPLE  # 40 µm: dust
    image[0:12, 120:140] = 244  # open to the edge
    mask = tissue_mask(image, MPP)
    assert mask[64, 64] and not mask[120, 120] and not mask[7, 7] and not mask[4, 130]


@pytest.mark.parametrize("ink", INKS)
def test_pen_marks_are_left_out_on_request(ink):
    image = paint(paint(glass(), (20, 20, 120, 180), PURPLE), (20, 100, 120, 180), PINK)
    image = paint(image, (140, 20, 160, 180), INKS[ink])
    mask = tissue_mask(image, MPP, drop_pen=True)
    assert not mask[:, 136:].any()
    assert mask[30:170, 24:116].all()  # and the tissue stays


def test_real_tissue_is_not_taken_for_ink(test_data):
    from PIL import Image

    tiles = sorted((test_data / "tiles_crc").glob("*/*.jpg"))[::50]
    page = np.vstack([np.hstack([np.asarray(Image.open(t).convert("RGB").resize((16, 16), Image.Resampling.BOX)) for t in tiles[i : i + 6]])
                      for i in range(0, len(tiles) // 6 * 6, 6)])  # fmt: skip
    assert pen_mask(page, MPP).mean() < 0.01


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.integers(3, 40), st.floats(0.7, 9), st.integers(2, 60))
def test_box_fractions_equal_a_plain_loop_over_pixels(seed, h, w, scale, extent):
    rng = np.random.default_rng(seed)
    mask = rng.random((h, w)) < 0.5
    size = (int(w * scale) + 1, int(h * scale) + 1)
    xy = np.stack([rng.integers(0, size[0], 5), rng.integers(0, size[1], 5)], axis=1)
    step = size[0] / w, size[1] / h
    expected = []
    for x, y in xy:
        inside = 0.0
        for row, column in zip(*np.nonzero(mask)):
            across = min((column + 1) * step[0], x + extent) - max(column * step[0], x)
            down = min((row + 1) * step[1], y + extent) - max(row * step[1], y)
            inside += max(across, 0) * max(down, 0)
        expected.append(inside / extent**2)
    np.testing.assert_allclose(box_fractions(mask, xy, extent, size), expected, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_mask_survives_the_way_through_geojson_with_its_holes(tmp_path_factory, seed):
    from scipy import ndimage

    mask = ndimage.zoom(np.random.default_rng(seed).random((8, 10)), 8, order=1) > 0.6
    size = (mask.shape[1] * 32, mask.shape[0] * 32)
    path = tmp_path_factory.mktemp("g") / "a.geojson"
    path.write_text(json.dumps(polygons_to_geojson(mask_polygons(mask, size))))
    polygons = read_geojson(path)
    assert all((ring[0] == ring[-1]).all() for rings in polygons for ring in rings)
    back = draw_polygons(polygons, mask.shape, size)
    around = np.ones((3, 3), bool)
    edge = ndimage.binary_dilation(mask, around) & ~ndimage.binary_erosion(mask, around)
    assert not (back ^ mask)[~edge].any()  # simplified outlines stay within a pixel
    assert (back ^ mask).sum() <= 0.08 * edge.sum() + 2


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.lists(st.lists(st.tuples(st.integers(-30, 130), st.integers(-30, 130)), min_size=3, max_size=7), min_size=1, max_size=2))
def test_a_drawn_polygon_holds_the_pixels_whose_centres_are_inside_by_the_even_odd_rule(corners):
    rings = [np.array(ring) + np.array([np.sqrt(2) / 5, np.pi / 9]) for ring in corners]  # no edge runs through a centre
    mask = draw_polygons([rings], (20, 25), (100, 100))
    for row in range(20):
        for column in range(25):
            x, y, inside = (column + 0.5) * 4, (row + 0.5) * 5, False
            for ring in rings:
                for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0)):
                    if (y0 > y) != (y1 > y) and x < x0 + (y - y0) * (x1 - x0) / (y1 - y0):
                        inside = not inside
            assert mask[row, column] == inside


def test_qupath_exports_are_read_in_their_several_shapes(tmp_path):
    square = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
    area = {"type": "Polygon", "coordinates": [square]}
    feature = {"type": "Feature", "id": "x", "geometry": area, "properties": {"classification": None}}
    ignored = {**feature, "properties": {"classification": {"name": "Ignore*"}}}
    many = {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [[square], [square]]}, "properties": {}}
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}}
    path = tmp_path / "a.geojson"
    for data, count in [(feature, 1), ([feature, ignored, point], 1), ({"type": "FeatureCollection", "features": [feature, many]}, 3)]:
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path.write_text(json.dumps(data | {"é": 1} if isinstance(data, dict) else data, ensure_ascii=False), encoding=encoding)
            assert len(read_geojson(path)) == count


WRONG = [b"", b"{", b"[]", b"3", b'{"features": [7]}', b'{"type": "Polygon", "coordinates": 4}', b'{"features": []}', b"\xff\xe9", b"\0"]


@pytest.mark.parametrize("data", WRONG)
def test_a_file_that_is_no_annotation_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "a.geojson").write_bytes(data)
    for name, message in (("a.geojson", r"a\.geojson: "), ("missing.geojson", "export one from QuPath")):
        with refused(SlideError, message):
            read_geojson(tmp_path / name)
