"""Where tissue is on a scan: a mask from a thumbnail, pen marks, sharpness, polygons in and out, the picture to check it by.

Otsu's method always splits an image in two, tissue or not. So its threshold is only followed inside a range in which
glass and tissue differ on real scans; a slide on which nothing passes is empty. Tissue must be coloured *and* absorb
light: grey dust, pencil, slide edges and black padding are not coloured, compression noise on glass does not absorb.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import find_contours

from .common import SlideError, TableError, read_text

SATURATION_RANGE = (0.04, 0.08)  # Otsu's threshold is followed inside; 99 % of glass stays below 0.03, 95 % of dense tissue above 0.08
DENSITY_RANGE = (0.02, 0.05)  # the same for optical density (log10)
SIGNAL_RANGE = (8.0, 24.0)  # the same for fluorescence: grey levels between the strongest and the weakest channel
SPECK_UM2 = 8_000.0  # tissue smaller than this is dust
HOLE_UM2 = 100_000.0  # a hole smaller than this is part of the tissue
PEN_UM2 = 20_000.0  # ink smaller than this is a stained cell or a pigment
PEN_MARGIN_UM = 40.0  # ink fades out over this distance


def tissue_mask(
    thumbnail: UInt8[np.ndarray, "h w 3"], mpp: float, *, threshold: float | None = None, drop_pen: bool = False
) -> Bool[np.ndarray, "h w"]:
    """Find tissue on a thumbnail of `mpp` µm per pixel (about 8).

    Bright field: saturation and optical density, relative to the colour of the glass, are both above a threshold. Without
    any bright pixel the slide is taken for fluorescence: coloured signal on black. Grey, white and black slides are empty.

    `threshold` is the saturation (0-1) above which a pixel is tissue; none: Otsu's method within `SATURATION_RANGE`. With
    `drop_pen` ink is left out, see `pen_mask`.
    """
    smooth = np.moveaxis(np.asarray(Image.fromarray(thumbnail).filter(ImageFilter.BoxBlur(1))), 2, 0)
    smooth = np.ascontiguousarray(smooth)  # one plane per channel: reductions run five times as fast
    low, high = smooth.min(axis=0), smooth.max(axis=0)
    if np.percentile(low[::4, ::4], 99.5) < 60:  # no glass anywhere
        signal = (high - low).astype(np.float32)
        mask = signal > (_otsu_within(signal, SIGNAL_RANGE) if threshold is None else 255 * threshold)
    else:
        glass = np.percentile(smooth[:, ::4, ::4].reshape(3, -1), 98, axis=1).astype(np.float32)
        if glass.min() < 190 or glass.min() < 0.85 * glass.max():  # the brightest pixels are no bare glass
            glass[:] = 255
        balanced = np.minimum(smooth * (255 / glass)[:, None, None], 255)
        low, high = balanced.min(axis=0), balanced.max(axis=0)
        saturation = np.where(high < 60, 0, 1 - low / np.maximum(high, 60))  # near black, noise has any hue
        density = -np.log10((balanced.mean(axis=0) + 1) / 256)
        mask = saturation > (_otsu_within(saturation, SATURATION_RANGE) if threshold is None else threshold)
        mask &= density > _otsu_within(density, DENSITY_RANGE)
        if drop_pen:
            mask &= ~pen_mask(thumbnail, mpp)
    labels, _ = ndimage.label(np.pad(~mask, 1, constant_values=True))  # glass that reaches the edge is no hole
    hole = np.bincount(labels.ravel()) < HOLE_UM2 / mpp**2
    hole[[0, labels[0, 0]]] = False
    mask |= hole[labels[1:-1, 1:-1]]
    return _without_small(mask, SPECK_UM2 / mpp**2)


def _otsu_within(values: Float32[np.ndarray, "h w"], span: tuple[float, float]) -> float:
    return span[1] if values.min() == values.max() else float(np.clip(threshold_otsu(values), *span))


def _without_small(mask: Bool[np.ndarray, "h w"], pixels: float) -> Bool[np.ndarray, "h w"]:
    labels, _ = ndimage.label(mask)
    keep = np.bincount(labels.ravel()) >= pixels
    keep[0] = False
    return keep[labels]


def pen_mask(thumbnail: UInt8[np.ndarray, "h w 3"], mpp: float) -> Bool[np.ndarray, "h w"]:
    """Blue, green, red and black ink: hues that neither H&E nor brown stains reach, and wide strokes of black, with a margin."""
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(thumbnail).convert("HSV")), 2, 0)  # 0-255 each
    turn = 255 / 360
    ink = (hue > 185 * turn) & (hue <= 242 * turn) & (saturation > 100)  # blue
    ink |= (hue > 70 * turn) & (hue <= 185 * turn) & (saturation > 50)  # green
    ink |= ((hue > 352 * turn) | (hue < 12 * turn)) & (saturation > 165) & (value > 110)  # red
    ink |= (value < 80) & (saturation < 90)  # black
    close_px = max(1, round(12 / mpp))
    ink = ndimage.binary_closing(np.pad(ink, close_px), iterations=close_px)[close_px:-close_px, close_px:-close_px]
    ink = _without_small(ink, PEN_UM2 / mpp**2)
    return ndimage.binary_dilation(ink, iterations=max(1, round(PEN_MARGIN_UM / mpp))) if ink.any() else ink


def sharpness(tiles: UInt8[np.ndarray, "n h w 3"]) -> Float32[np.ndarray, "n"]:
    """Variance of the Laplacian of each tile, grey levels²: near 0 for blurry tiles and for plain background."""
    greys = (tile.mean(axis=2, dtype=np.float32) for tile in tiles)
    return np.array([ndimage.laplace(grey)[1:-1, 1:-1].var() for grey in greys], np.float32)


def box_fractions(
    mask: Bool[np.ndarray, "h w"], xy: Int64[np.ndarray, "n 2"], extent: int, level0_size: tuple[int, int]
) -> Float32[np.ndarray, "n"]:
    """The share of tissue in square boxes of edge `extent` at the corners `xy` (level-0 pixels), exact also for parts of mask pixels.

    The mask is spread over the scan; what lies past it counts as glass. Between pixel corners an integral image is bilinear, so
    four interpolated look-ups per box give its area of tissue.
    """
    h, w = mask.shape
    integral = np.pad(np.cumsum(np.cumsum(mask, axis=0, dtype=np.int64), axis=1), ((1, 0), (1, 0))).astype(np.float64)
    scale = np.array([w / level0_size[0], h / level0_size[1]])

    def area(dx: int, dy: int) -> np.ndarray:
        at = np.clip((xy + np.array([dx, dy])) * scale, 0, [w, h])
        return ndimage.map_coordinates(integral, at.T[::-1], order=1)

    covered = area(extent, extent) - area(0, extent) - area(extent, 0) + area(0, 0)
    return np.clip(covered / (extent**2 * scale.prod()), 0, 1).astype(np.float32)


def mask_polygons(mask: Bool[np.ndarray, "h w"], level0_size: tuple[int, int]) -> list[list[np.ndarray]]:
    """Each piece of tissue as rings of (x, y) level-0 pixels: its outline, then its holes. Rings are closed."""
    scale = np.array([level0_size[0] / mask.shape[1], level0_size[1] / mask.shape[0]])
    labels, pieces = ndimage.label(mask)[0], []
    for label, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        rings = map(_simplify, find_contours(np.pad(labels[rows, columns] == label, 1).astype(np.float32), 0.5))
        corner = np.array([columns.start - 0.5, rows.start - 0.5])  # of the padded piece, from pixel centres
        rings = [(ring[:, ::-1] + corner) * scale for ring in rings if len(ring) > 3]
        pieces.append(sorted(rings, key=lambda ring: -np.prod(np.ptp(ring, axis=0))))  # the outline spans the most
    return [rings for rings in pieces if rings]


def _simplify(ring: Float64[np.ndarray, "n 2"]) -> Float64[np.ndarray, "k 2"]:
    """A closed ring without the corners that lie within half a pixel of the line through their neighbours.

    Every other corner is tried at once, a few times over: ten times as fast as scikit-image's approximate_polygon.
    """
    ring = ring[:-1]
    for _ in range(6):
        odd = np.arange(1, len(ring), 2)
        before, after = ring[odd - 1], ring[(odd + 1) % len(ring)]
        (dy, dx), (y, x) = (after - before).T, (ring[odd] - before).T
        flat = np.abs(dx * y - dy * x) < 0.5 * np.hypot(dx, dy)
        if len(ring) - flat.sum() < 4:
            break
        ring = np.delete(ring, odd[flat], axis=0)
    return np.concatenate([ring, ring[:1]])


def polygons_to_geojson(polygons: list[list[np.ndarray]]) -> dict[str, Any]:
    """QuPath annotations, level-0 pixels, with TRIDENT's `tissue_id`."""
    features = []
    for number, rings in enumerate(polygons):
        area = {"type": "Polygon", "coordinates": [np.round(ring, 1).tolist() for ring in rings]}
        look = {"objectType": "annotation", "classification": {"name": "Tissue", "color": [50, 160, 80]}, "tissue_id": number}
        features.append({"type": "Feature", "geometry": area, "properties": look})
    return {"type": "FeatureCollection", "features": features}


def read_geojson(path: Path) -> list[list[np.ndarray]]:
    """The areas that QuPath (or we) annotated, level-0 pixels; not points, lines and classes that start with "Ignore".

    Raises SlideError: no such file, not UTF-8 or UTF-16 text, no GeoJSON, or no area in it.
    """
    if not path.exists():
        raise SlideError(f"no tissue annotation {path}; export one from QuPath under that name")
    try:
        data = json.loads(read_text(path))
        features = data if isinstance(data, list) else data.get("features", [data])
        classes = [((feature.get("properties") or {}).get("classification") or {}).get("name", "") for feature in features]
        meant = [f.get("geometry") or f for f, name in zip(features, classes) if not str(name).startswith("Ignore")]
        polygons = [[np.asarray(ring, np.float64)[:, :2] for ring in area] for geometry in meant for area in _areas(geometry)]
    except (TableError, ValueError, TypeError, AttributeError, KeyError, IndexError, RecursionError) as error:
        raise SlideError(f"{path}: not GeoJSON as QuPath exports it ({error})") from error
    if not polygons or not all(np.isfinite(ring).all() for rings in polygons for ring in rings):
        raise SlideError(f"{path}: holds no polygon, or one without finite corners; draw the tissue as an area annotation")
    return polygons


def _areas(geometry: dict[str, Any]) -> Iterator[list]:
    if geometry["type"] in ("Polygon", "MultiPolygon"):
        yield from [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    for part in geometry.get("geometries", []):
        yield from _areas(part)


def draw_polygons(polygons: list[list[np.ndarray]], shape: tuple[int, int], level0_size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A mask of `shape` (h, w) that is true where a pixel's centre lies inside a polygon and in none of its holes.

    Even-odd scan lines: Pillow's polygons have whole-number corners, scikit-image's visit every edge for every pixel.
    """
    (h, w), mask = shape, np.zeros(shape, bool)
    for rings in polygons:
        rings = [ring * np.array([w / level0_size[0], h / level0_size[1]]) - 0.5 for ring in rings]  # pixel centres are whole
        (x0, y0), (x1, y1) = np.concatenate(rings).T, np.concatenate([np.roll(ring, -1, axis=0) for ring in rings]).T
        first, last = (np.clip(np.ceil(y), 0, h).astype(np.int64) for y in (np.minimum(y0, y1), np.maximum(y0, y1)))
        edge = np.repeat(np.arange(len(first)), last - first)  # each edge once for each row that it crosses
        row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
        across = x0[edge] + (row - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
        column = np.clip(np.ceil(across), 0, w).astype(np.int64)
        if len(row):
            top, height = row.min(), np.ptp(row) + 1
            crossings = np.bincount((row - top) * (w + 1) + column, minlength=height * (w + 1)).reshape(height, w + 1)
            mask[top : top + height] |= np.cumsum(crossings, axis=1)[:, :w] % 2 == 1
    return mask


def draw_overlay(
    thumbnail: UInt8[np.ndarray, "h w 3"], polygons: list[list[np.ndarray]], xy: Int64[np.ndarray, "n 2"], extent: int,
    level0_size: tuple[int, int], longest_px: int = 1600, colours: UInt8[np.ndarray, "n 4"] | None = None,
) -> Image.Image:  # fmt: skip
    """The thumbnail, at most three times as large, with the outline of the tissue (green) and the kept tiles.

    Tiles are filled with their `colours` (RGBA); without, all are tinted blue, with a thin edge.
    """
    image = Image.fromarray(thumbnail)
    grow = min(3.0, longest_px / max(image.size))
    size = max(1, round(image.width * grow)), max(1, round(image.height * grow))
    image = image.resize(size, Image.Resampling.BOX if grow < 1 else Image.Resampling.BICUBIC)
    scale = np.array(size) / level0_size
    draw = ImageDraw.Draw(tint := Image.new("RGBA", size))
    fills = [((30, 90, 255, 36), (30, 90, 255, 130))] * len(xy) if colours is None else [(tuple(c), None) for c in colours.tolist()]
    for (x0, y0), (x1, y1), (fill, edge) in zip(np.round(xy * scale).tolist(), np.round((xy + extent) * scale).tolist(), fills):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=fill, outline=edge)
    for ring in (ring for rings in polygons for ring in rings):
        draw.line([(float(x), float(y)) for x, y in ring * scale], fill=(0, 190, 60, 255), width=2)
    return Image.alpha_composite(image.convert("RGBA"), tint).convert("RGB")
