"""The whole path on a synthetic cohort: draw scans and reports, then tile, pretrain, embed, evaluate. No download, no GPU."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Float, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from .cohort import Cohort, prefetch
from .common import ConfigError, StoreError, atomic, progress, read_table, write_table
from .config import PRESETS, EvalConfig, TileConfig, updated
from .embedding import embed
from .evaluation import Result, evaluate
from .tiles import tile_slides
from .trainer import pretrain

MPP = 0.5
FIELD = 256  # px, edge of one field of a slide
SPILL = 60  # px that a field may spill over its edge, so that borders between fields are irregular
SHEET = 896  # px, edge of a sheet of one kind of tissue
BACKGROUND = ("stroma", "lymphocytes", "alveoli")
TUMOUR = {"LUAD": "gland", "LUSC": "squamous", "normal": None}
KINDS = (*BACKGROUND, "gland", "squamous", "gland_mutated", "squamous_mutated")
TUMOUR_MEAN = (52.0, 88.0)  # mean haematoxylin and eosin of every tumour sheet, so that the means tell no class

Points = Float[np.ndarray, "N 2"]
Map = Float[np.ndarray, "H W"]
Real = int | float


# Scans


def write_scan(
    path: Path,
    image: UInt8[np.ndarray, "H W 3"],
    *,
    mpp: Real | None = MPP,
    tile: int | tuple[int, int] = 256,
    levels: Sequence[int] = (4, 16),
    compression: str | None = "jpeg",
    quality: int = 85,
    subsampling: tuple[int, int] = (2, 2),
) -> None:
    """Write a pyramidal BigTIFF laid out as an Aperio SVS: baseline, thumbnail in strips, one image per further level.

    `tile` is the edge, or (width, height), of the stored tiles; `levels` are downsampling factors. `compression` is any
    that tifffile knows (`quality` and `subsampling` are JPEG's). With `mpp` none, the description holds no resolution.
    """
    width, height = (tile, tile) if isinstance(tile, int) else tile
    h, w = image.shape[:2]
    facts = "" if mpp is None else f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    description = f"Aperio Image Library v12.0.15 dreslcl synthetic\n{w}x{h} [0,0 {w}x{h}] ({width}x{height}) Q={quality}{facts}"
    jpeg = {"compressionargs": {"level": quality}, "subsampling": subsampling} if compression == "jpeg" else {}
    common: dict[str, Any] = {"photometric": "rgb", "compression": compression, "metadata": None, **jpeg}

    def shrunk(factor: int) -> np.ndarray:
        size = max(1, w // factor), max(1, h // factor)
        box = (0, 0, min(w, size[0] * factor), min(h, size[1] * factor))  # whole blocks only, so that levels lie exactly over each other
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box))

    with atomic(path) as part, tifffile.TiffWriter(part, bigtiff=True) as writer:
        writer.write(image, description=description, tile=(height, width), **common)
        writer.write(shrunk(max(1, max(w, h) // 512)), description=description, rowsperstrip=16, **common)
        for factor in levels:
            writer.write(shrunk(factor), description=description, tile=(height, width), subfiletype=1, **common)


# Drawing: a sheet is two 8-bit maps, haematoxylin and eosin


class _Canvas:
    """Haematoxylin and eosin as two grey images that shapes are painted on."""

    def __init__(self, haematoxylin: Map, eosin: Map):
        self.images = [Image.fromarray(np.clip(m, 0, 255).astype(np.uint8)) for m in (haematoxylin, eosin)]
        self.draw = [ImageDraw.Draw(image) for image in self.images]

    def fill(self, outline: Points, haematoxylin: Real, eosin: Real, edge: Real | None = None) -> None:
        """Paint one polygon; `edge` is the eosin of its border."""
        points = [tuple(p) for p in outline.tolist()]
        self.draw[0].polygon(points, fill=int(haematoxylin))
        self.draw[1].polygon(points, fill=int(eosin), outline=None if edge is None else int(edge))

    def nuclei(self, rng: Generator, outlines: Float[np.ndarray, "N V 2"], dark: Real, pale: Real = 0.0) -> None:
        """Paint nuclei; `pale` is how much lighter the inside is than the membrane (open chromatin, with a nucleolus)."""
        for outline, shade in zip(outlines, rng.normal(dark, 0.12 * dark, len(outlines)).clip(40, 250)):
            self.fill(outline, shade, 45)
            if pale:
                centre = outline.mean(0)
                self.fill(centre + 0.74 * (outline - centre), shade * (1 - pale), 45)
                spot = centre + rng.normal(0, 1.5, 2)
                self.fill(spot + 0.2 * (outline - centre), shade, 45)

    def sheet(self, rng: Generator) -> UInt8[np.ndarray, "2 H W"]:
        """Both maps with grain, slightly blurred as by the optics."""
        maps = np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32) for image in self.images])
        grain = 1 + 0.10 * _noise(rng, maps.shape[1], 3) + 0.06 * _noise(rng, maps.shape[1], 40)
        return np.clip(maps * grain, 0, 255).astype(np.uint8)


def _noise(rng: Generator, size: int, scale: Real) -> Map:
    """Smooth noise of about unit variance whose bumps are `scale` px wide, (size, size)."""
    n = int(np.ceil(size / scale)) + 3
    small = Image.fromarray(rng.normal(0, 1.25, (n, n)).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC, (1, 1, 1 + size / scale, 1 + size / scale)))


def _scatter(rng: Generator, spacing: Real, jitter: Real = 0.16) -> Points:
    """Points over a sheet: a hexagonal grid, shaken."""
    rows = np.arange(-spacing, SHEET + spacing, spacing * 0.87)
    columns = np.arange(-spacing, SHEET + spacing, spacing, dtype=float)
    x, y = np.meshgrid(columns, rows)
    x[1::2] += spacing / 2
    return np.stack([x, y], -1).reshape(-1, 2) + rng.normal(0, jitter * spacing, (x.size, 2))


def _discs(rng: Generator, radii: tuple[Real, Real], gap: Real, tries: int) -> list[tuple[np.ndarray, float]]:
    """Discs that keep `gap` px from each other, by throwing darts: (centre, radius)."""
    found = np.array([[-1e6, -1e6, 0.0]])
    for x, y, r in np.column_stack([rng.uniform(-20, SHEET + 20, (tries, 2)), np.sort(rng.uniform(*radii, tries))[::-1]]):
        if np.all((found[:, 0] - x) ** 2 + (found[:, 1] - y) ** 2 > (found[:, 2] + r + gap) ** 2):
            found = np.vstack([found, (x, y, r)])
    return [(disc[:2], float(disc[2])) for disc in found[1:]]


def _ovals(rng: Generator, centres: Points, length: Any, width: Any, angle: Any, wobble: Real = 0.1) -> Float[np.ndarray, "N V 2"]:
    """Outlines of wobbly ellipses; length, width (px) and angle (radians) are numbers or one per centre."""
    n = len(centres)
    length, width, angle = (np.broadcast_to(np.asarray(v, float), n)[:, None] for v in (length, width, angle))
    t = np.linspace(0, 2 * np.pi, 16, endpoint=False)[None]
    phase = rng.uniform(0, 2 * np.pi, (2, n, 1))
    r = 1 + wobble * (np.cos(2 * t + phase[0]) + 0.7 * np.cos(3 * t + phase[1]))
    x, y = r * length / 2 * np.cos(t), r * width / 2 * np.sin(t)
    return centres[:, None] + np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], -1)


def _at(values: Map, points: Points) -> Float[np.ndarray, "N"]:
    x, y = np.clip(points, 0, SHEET - 1).astype(int).T
    return values[y, x]


def _stroma(rng: Generator, density: Real = 36) -> _Canvas:
    """Wavy collagen bundles with clefts, and spindle nuclei along them, one per `density` px."""
    y, x = np.mgrid[:SHEET, :SHEET].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x + 34 * _noise(rng, SHEET, 150) + 7 * _noise(rng, SHEET, 45)
    table = _noise(rng, 512, 7) + 0.6 * _noise(rng, 512, 2.5)
    bundles = table[across.astype(int) % 512, (along / 14).astype(int) % 512]
    eosin = np.where(bundles < -1.5, 18, 98 + 22 * bundles)
    canvas = _Canvas(np.full((SHEET, SHEET), 8.0), eosin)
    down, right = np.gradient(across)
    centres = _scatter(rng, density, 0.3)
    tilt = np.arctan2(-_at(right, centres), _at(down, centres)) + rng.normal(0, 0.15, len(centres))
    size = rng.uniform(0.75, 1.25, len(centres))
    canvas.nuclei(rng, _ovals(rng, centres, 26 * size, 7 * size, tilt), 150)
    return canvas


def _lymphocytes(rng: Generator) -> _Canvas:
    """Small round dark nuclei, densely packed."""
    canvas = _Canvas(np.full((SHEET, SHEET), 14.0), 62 + 14 * _noise(rng, SHEET, 12))
    centres = _scatter(rng, 19, 0.2)
    centres = centres[rng.random(len(centres)) < 0.9 + 0.1 * _at(_noise(rng, SHEET, 90), centres)]
    size = rng.normal(13.5, 1.2, len(centres))
    canvas.nuclei(rng, _ovals(rng, centres, size, size * 0.93, rng.uniform(0, 3, len(centres)), 0.05), 190)
    return canvas


def _alveoli(rng: Generator) -> _Canvas:
    """Airspaces between thin walls with flat nuclei."""
    y, x = np.mgrid[: SHEET // 8, : SHEET // 8] * 8.0
    seeds = _scatter(rng, rng.uniform(95, 125), 0.2)
    near = np.partition(np.hypot(x[..., None] - seeds[:, 0], y[..., None] - seeds[:, 1]), 1, axis=-1)
    gap = np.asarray(Image.fromarray((near[..., 1] - near[..., 0]).astype(np.float32)).resize((SHEET, SHEET), Image.Resampling.BICUBIC))
    gap = gap + 2.5 * _noise(rng, SHEET, 25)
    thickness = 19 + 4 * _noise(rng, SHEET, 120)
    wall = gap < thickness
    canvas = _Canvas(np.where(wall, 10.0, 0.0), np.where(wall, 92 + 14 * _noise(rng, SHEET, 8), 7.0))
    down, right = np.gradient(gap)
    centres = _scatter(rng, 13.5, 0.35)
    centres = centres[_at(gap, centres) < 0.75 * _at(thickness, centres)]
    tilt = np.arctan2(_at(right, centres), -_at(down, centres)) + rng.normal(0, 0.3, len(centres))
    canvas.nuclei(rng, _ovals(rng, centres, rng.uniform(11, 18, len(centres)), 8, tilt), 150)
    return canvas


def _glands(rng: Generator, scale: Real) -> _Canvas:
    """Adenocarcinoma, acinar: rings of columnar nuclei around a lumen, in stroma. `scale` enlarges the nuclei."""
    canvas = _stroma(rng, 44)
    t = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    for centre, radius in _discs(rng, (44, 88), -3, 3000):
        shape = 1 + rng.uniform(0, 0.13) * np.cos(2 * t + rng.uniform(0, 6)) + rng.uniform(0, 0.08) * np.cos(3 * t + rng.uniform(0, 6))
        ray = np.stack([np.cos(t), np.sin(t)], -1)
        band = rng.uniform(29, 36) * (1 + scale) / 2

        def ring(depth: Any, ray: Any = ray, shape: Any = shape, radius: Any = radius, centre: Any = centre) -> np.ndarray:
            return centre + ray * (radius * shape - depth)[:, None]

        canvas.fill(ring(0), 18, rng.uniform(95, 125), edge=140)
        canvas.fill(ring(band + rng.normal(0, 1, len(t))), 0, float(rng.choice([6, 6, 35])), edge=135)
        count = int(2 * np.pi * (radius - 12) / (11.5 * scale))
        pick = ((np.arange(count) + rng.normal(0, 0.15, count)) / count * len(t)).astype(int) % len(t)
        depth = 13 * (1 + scale) / 2 + rng.normal(0, 3.5, count)
        spots = centre + ray[pick] * (radius * shape[pick] - depth)[:, None]
        size = scale * rng.uniform(0.85, 1.15, count)
        canvas.nuclei(rng, _ovals(rng, spots, 20 * size, 10.5 * size, t[pick] + rng.normal(0, 0.12, count)), 150, 0.25)
    return canvas


def _squamous(rng: Generator, scale: Real) -> _Canvas:
    """Squamous carcinoma: sheets of polygonal cells with keratin pearls, clefts and strands of stroma. `scale` enlarges the nuclei."""
    canvas = _stroma(rng, 44)
    islands = _noise(rng, SHEET, 120) + 0.12 * _noise(rng, SHEET, 25)
    pearls = [(c, r) for c, r in _discs(rng, (30, 62), 40, 120) if _at(islands, c[None])[0] > -0.8]
    eosin = np.asarray(canvas.images[1], np.float32)
    cleft = np.abs(islands + 1.05) < 0.09
    canvas = _Canvas(np.where(cleft, 0, np.asarray(canvas.images[0], np.float32)), np.where(cleft, 6, eosin))
    spacing = 23 * (1 + scale) / 2
    centres = _scatter(rng, spacing)
    centres = rng.permutation(centres[_at(islands, centres) > -0.95])
    for c, r in pearls:
        centres = centres[np.hypot(*(centres - c).T) > r]
    for outline in _ovals(rng, centres, 1.25 * spacing, 1.15 * spacing, rng.uniform(0, 3, len(centres)), 0.07):
        canvas.fill(outline[::2], 18, rng.normal(108, 9), edge=62)
    for centre in rng.permutation(centres)[: len(centres) // 40]:  # single-cell necrosis leaves holes
        canvas.fill(_ovals(rng, centre[None], 2.2 * spacing, 1.2 * spacing, rng.uniform(0, 3))[0], 0, 8)
    size = scale * rng.uniform(0.85, 1.2, len(centres))
    canvas.nuclei(rng, _ovals(rng, centres, 15.5 * size, 13.5 * size, rng.uniform(0, 3, len(centres))), 150, 0.25)
    for c, r in pearls:
        squeeze, tilt = rng.uniform(0.75, 1), rng.uniform(0, 3)
        for k, depth in enumerate(np.arange(0, r - 3, 4.5)):
            outline = _ovals(rng, c[None], 2 * (r - depth), 2 * (r - depth) * squeeze, tilt, 0.035)[0]
            canvas.fill(outline, 4, (205, 150)[k % 2] + rng.normal(0, 8), edge=120)
        turn = rng.uniform(0, 2 * np.pi, int(r / 5))
        spots = c + (r * rng.uniform(0.5, 1.0, len(turn)))[:, None] * np.stack([np.cos(turn), np.sin(turn)], -1)
        canvas.nuclei(rng, _ovals(rng, spots, 14 * scale, 5 * scale, turn + np.pi / 2), 140)
    return canvas


def _draw(kind: str, rng: Generator) -> UInt8[np.ndarray, "2 H W"]:
    """One sheet of a kind of tissue, (2, SHEET, SHEET): haematoxylin and eosin."""
    if kind in BACKGROUND:
        return {"stroma": _stroma, "lymphocytes": _lymphocytes, "alveoli": _alveoli}[kind](rng).sheet(rng)
    scale = 1.45 if kind.endswith("_mutated") else 1.0
    sheet = (_glands if kind.startswith("gland") else _squamous)(rng, scale).sheet(rng).astype(np.float32)
    sheet *= (np.array(TUMOUR_MEAN) / sheet.mean((1, 2)))[:, None, None]
    return np.clip(sheet, 0, 255).astype(np.uint8)


# Slides


@dataclass(frozen=True)
class _Case:
    """What a slide shows."""

    slide: str
    patient: str
    split: str
    subtype: str
    mutated: bool


def _plan(slides: int, rng: Generator) -> list[_Case]:
    """Deal slides to splits, classes and patients: a patient has one or two slides, one split and one class."""
    held_out = max(3, round(0.4 * slides))
    names = iter(rng.permutation(slides) + 1)  # an id says nothing of split and class
    cases = []
    for split, count in (("train", slides - held_out), ("test", held_out)):
        for c, subtype in enumerate(TUMOUR):
            left, mutated = len(range(c, count, len(TUMOUR))), bool(rng.integers(2))
            while left:
                take = 2 if left > 3 and rng.random() < 0.3 else 1
                patient, left, mutated = f"P{next(names):03d}", left - take, not mutated
                cases += [_Case(f"{patient}-{n + 1}", patient, split, subtype, mutated and subtype != "normal") for n in range(take)]
    return sorted(cases, key=lambda case: case.slide)


def _stain(rng: Generator) -> UInt8[np.ndarray, "65536 4"]:
    """Colour (and a zero) of every pair haematoxylin * 256 + eosin under one slide's stain, scanner and light."""
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]) + rng.normal(0, 0.07, (2, 3))  # Ruifrok and Johnston 2001
    vectors = np.clip(vectors, 0.02, None) * rng.uniform(0.65, 1.5, (2, 1))
    amount = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), -1).reshape(-1, 2) / 128.0
    density = amount ** rng.uniform(0.8, 1.25, 2) @ vectors
    white = rng.uniform(232, 250) + rng.normal(0, 1.5, 3)
    return np.pad(np.clip(white * np.exp(-density), 0, 255).astype(np.uint8), ((0, 0), (0, 1)))


def _turned(image: np.ndarray, rng: Generator) -> np.ndarray:
    """One of the eight flips and turns of the last two axes."""
    image = np.rot90(image, int(rng.integers(4)), (-2, -1))
    return image[..., ::-1] if rng.integers(2) else image


def _patch(rng: Generator) -> np.ndarray:
    """Irregular mask of a field: all of its square, and bays beyond its edges, (FIELD + 2 SPILL) squared."""
    size = FIELD + 2 * SPILL
    inset = np.minimum(np.arange(size), np.arange(size)[::-1])
    return np.minimum(inset[:, None], inset) > 0.5 * SPILL + 16 * _noise(rng, size, 55) + 3 * _noise(rng, size, 12)


def _outline(rng: Generator, columns: int, rows: int) -> Map:
    """Height that is positive inside the tissue, at 16 px per value."""
    y, x = np.mgrid[: rows * 16, : columns * 16].astype(np.float32)
    x, y = 2 * x / (columns * 16) - 1, 2 * y / (rows * 16) - 1
    n = max(rows, columns) * 16
    bumps = 0.10 * _noise(rng, n, 50) + 0.04 * _noise(rng, n, 12)
    return (0.87 + bumps[: rows * 16, : columns * 16] - (np.abs(x) ** 2.6 + np.abs(y) ** 2.6) ** (1 / 2.6)).astype(np.float32)


def _kinds(rng: Generator, case: _Case, inside: np.ndarray) -> np.ndarray:
    """Kind of tissue of every field, an index into KINDS: background in regions, tumour as one or two foci."""
    rows, columns = inside.shape
    mix = rng.dirichlet(np.full(len(BACKGROUND), 1.5)) + 1e-3
    shade = [np.log(p) + 1.1 * _noise(rng, max(rows, columns), 1.8)[:rows, :columns] for p in mix]
    kinds = np.argmax(shade, axis=0)
    name = TUMOUR[case.subtype]
    if name:
        places = np.argwhere(inside)
        foci = places[rng.choice(len(places), int(rng.integers(1, 3)), replace=False)]
        far = np.hypot(*(places[:, None] - foci[None]).transpose(2, 0, 1)).min(1) + rng.normal(0, 0.35, len(places))
        own = places[np.argsort(far)[: max(1, round(rng.uniform(0.15, 0.35) * len(places)))]]
        kinds[own[:, 0], own[:, 1]] = KINDS.index(name + "_mutated" * case.mutated)
    return kinds


def _compose(
    case: _Case, rng: Generator, sheets: dict[tuple[str, str], list[np.ndarray]], side: tuple[int, int]
) -> tuple[np.ndarray, list]:
    """Draw one slide; returns its pixels and the rows of cells.csv (fields that are at least half tissue)."""
    columns, rows = rng.integers(side[0], side[1] + 1, 2).tolist()
    outline = _outline(rng, columns, rows)
    covered = (outline > 0).reshape(rows, 16, columns, 16).mean((1, 3))
    kinds = _kinds(rng, case, covered >= 0.5)
    maps = np.zeros((2, rows * FIELD + 2 * SPILL, columns * FIELD + 2 * SPILL), np.uint8)
    patches = [_patch(rng) for _ in range(8)]
    cells = []
    for row, column in rng.permutation(np.argwhere(covered > 0)).tolist():
        kind = KINDS[kinds[row, column]]
        number = int(rng.integers(len(sheets[case.split, kind])))
        size = FIELD + 2 * SPILL
        x, y = rng.integers(0, SHEET - size + 1, 2)
        field = _turned(sheets[case.split, kind][number][:, y : y + size, x : x + size], rng)
        field = np.clip(field * rng.uniform(0.85, 1.15, (2, 1, 1)), 0, 255).astype(np.uint8)
        here = np.s_[:, row * FIELD : row * FIELD + size, column * FIELD : column * FIELD + size]
        np.copyto(maps[here], field, where=_turned(patches[rng.integers(len(patches))], rng))
        if covered[row, column] >= 0.5:
            cells.append((case.slide, column * FIELD, row * FIELD, kind, f"{case.split}-{kind}-{number}"))
    whole = (columns * FIELD, rows * FIELD)
    edge = np.asarray(Image.fromarray(outline).resize(whole, Image.Resampling.BICUBIC)) > 0
    blur = ImageFilter.BoxBlur(rng.uniform(0.2, 1.2))
    blurred = [np.asarray(Image.fromarray(m[SPILL:-SPILL, SPILL:-SPILL] * edge).filter(blur), np.uint16) for m in maps]
    colours = _stain(rng).view(np.uint32)[:, 0]  # one gather of whole colours is 10x faster than one per channel
    image = colours[blurred[0] << 8 | blurred[1]].view(np.uint8).reshape(*edge.shape, 4)[..., :3]
    return np.ascontiguousarray(image), sorted(cells, key=lambda cell: (cell[2], cell[1]))


# Reports

# Wordings of a fact stand between bars.
_SPECIMEN = (
    "Lung, {side} {lobe} lobe, lobectomy. | Specimen: wedge resection of the {side} {lobe} lobe of the lung. | "
    "Core biopsy of the {side} lung. | Lung, {side} {lobe} lobe, segmentectomy. | Received: lung tissue from the {side} {lobe} lobe."
)
_DIAGNOSIS = {
    "LUAD": "Invasive adenocarcinoma, acinar pattern. | Adenocarcinoma of the lung with a predominantly acinar growth pattern. | "
    "Histology shows malignant glands lined by columnar cells, consistent with adenocarcinoma. | "
    "Gland-forming carcinoma, diagnosed as pulmonary adenocarcinoma, acinar type. | "
    "Non-small cell carcinoma with acinar glands around open lumens: adenocarcinoma. | Lung adenocarcinoma with acinar architecture.",
    "LUSC": "Squamous cell carcinoma with keratinisation. | Keratinizing squamous cell carcinoma of the lung. | "
    "Histology shows sheets of polygonal malignant cells with keratin pearls, consistent with squamous cell carcinoma. | "
    "Non-small cell carcinoma with keratin pearls: squamous cell carcinoma. | "
    "Epidermoid carcinoma (squamous cell), keratinising, with intercellular bridges. | Squamous carcinoma of lung, with keratin pearls.",
    "normal": "No malignancy is identified. | Benign lung parenchyma, negative for malignancy. | "
    "Histology shows lung tissue without evidence of carcinoma. | No tumour is seen, benign lung tissue. | "
    "Alveolated lung parenchyma with no evidence of a neoplasm. | Negative for tumour; reactive changes only.",
}
_NUCLEI = {
    True: "The tumour cells have markedly enlarged nuclei. | Nuclei are strikingly large and pleomorphic. | "
    "Marked nuclear enlargement is noted in the neoplastic cells.",
    False: "Tumour nuclei are of small to moderate size. | Nuclear enlargement is mild. | Tumour nuclei are relatively small.",
}
_TUMOUR_FACTS = [
    "Moderately differentiated (G2). | Grade 2 of 3. | Poorly differentiated (G3). | Histologic grade: G2. | Grade 3.",
    "Resection margins are free of tumour. | Margins negative. | The bronchial margin is uninvolved. | Tumour is 2 mm from the margin.",
    "No lymph node metastasis (0/{nodes}). | {nodes} regional lymph nodes, all negative. | Metastasis in 1 of {nodes} lymph nodes.",
    "No lymphovascular invasion. | Lymphovascular invasion is present. | Visceral pleura is not invaded.",
]
_OTHER_FACTS = [
    "Mild chronic inflammation. | Background lung shows patchy lymphoid infiltrates. | Focal fibrosis of the surrounding parenchyma.",
    "Anthracotic pigment is present. | Emphysematous change is noted. | The pleura is unremarkable.",
]
_GROSS = (
    "Gross description: the specimen is received in formalin, labelled with the name of the patient, and measures {a} x {b} x {c} cm. "
    "The pleural surface is smooth and glistening with focal puckering, inked blue. The specimen is sectioned from the hilum "
    "to the periphery; the cut surface is tan-grey to pink and spongy with focal firm areas. Sections are submitted in {nodes} "
    "cassettes, including the bronchial and vascular margins, and all peribronchial lymph nodes that were found. | "
    "Macroscopy: a fresh portion of lung weighing {nodes} g and measuring {a} x {b} x {c} cm, oriented by the surgeon with a suture at the "
    "bronchial stump. The pleura is intact, dull in places and covered by fibrinous strands. On sectioning the parenchyma is crepitant "
    "and dark red, with anthracotic streaks along the septa. Tissue is sampled from the centre, edge and periphery, and the rest is "
    "kept in formalin. Blocks A1 to A4 show the margins, blocks B1 to B6 the parenchyma, and block C the hilar nodes."
)


def _report(case: _Case, rng: Generator) -> str:
    """The report of one slide: the diagnosis always, other facts mostly, each in one of several wordings, in random order."""

    def one(wordings: str) -> str:
        return str(rng.choice(wordings.split(" | ")))

    facts = [_SPECIMEN, *_OTHER_FACTS]
    if case.subtype != "normal":
        facts += [_NUCLEI[case.mutated], *_TUMOUR_FACTS]
    said = [one(_DIAGNOSIS[case.subtype]), *(one(fact) for fact in facts if rng.random() < 0.75)]
    said = [said[i] for i in rng.permutation(len(said))]
    if rng.random() < 0.25:
        said.append(one(_GROSS))
    words = {"side": one("right | left"), "lobe": one("upper | lower"), "nodes": int(rng.integers(4, 25))}
    words |= {axis: round(float(rng.uniform(1, 14)), 1) for axis in "abc"}
    return " ".join(said).format(**words)


def write_cohort(out: Path, slides: int = 72, seed: int = 0, *, side: tuple[int, int] = (7, 10)) -> None:
    """Write a synthetic cohort; the same arguments give the same files.

    `out/slides/*.svs`; `reports.csv` (slide_id, patient_id, split, report); `labels.csv` (slide_id, patient_id, split,
    subtype, recognition, mutation; mutation is 0 for normal slides); `cells.csv` (slide_id, x, y, kind, sheet): the
    level-0 top-left corner of each field of 256 px, what it shows, and the sheet it was cut from. About 60 % of the slides are
    `train`, the others `test`; no patient and no sheet is in both. A slide is `side` fields wide and high.

    Raises:
        ConfigError: fewer than 6 slides.
    """
    if slides < 6:
        raise ConfigError(f"a synthetic cohort needs at least 6 slides (two splits of three classes), got {slides}")
    out = Path(out)
    cases = _plan(slides, np.random.default_rng([seed, 0]))
    counts = {"train": min(5, 1 + slides // 16), "test": min(4, 1 + slides // 20)}
    jobs = [(split, kind, n) for split, count in counts.items() for kind in KINDS for n in range(count)]

    def drawn(job: tuple[str, str, int]) -> np.ndarray:
        split, kind, n = job
        return _draw(kind, np.random.default_rng([seed, 1, split == "test", KINDS.index(kind), n]))

    def made(number: int) -> list:
        image, cells = _compose(cases[number], np.random.default_rng([seed, 2, number]), sheets, side)
        write_scan(out / "slides" / f"{cases[number].slide}.svs", image)
        return cells

    threads, cells = min(8, os.cpu_count() or 1), []
    sheets: dict[tuple[str, str], list[np.ndarray]] = {}
    with progress("drawing tissue", len(jobs), "sheets") as bar:
        for (split, kind, _), sheet in zip(jobs, prefetch(drawn, jobs, threads, ahead=threads)):
            sheets.setdefault((split, kind), []).append(sheet)
            bar.advance(bar.task_ids[0])
    with progress("drawing slides", slides, "slides") as bar:
        for rows in prefetch(made, range(slides), threads, ahead=threads):
            cells += rows
            bar.advance(bar.task_ids[0])
    key = ("slide_id", "patient_id", "split")
    rng = np.random.default_rng([seed, 3])
    write_table(out / "reports.csv", (*key, "report"), [(c.slide, c.patient, c.split, _report(c, rng)) for c in cases])
    facts = [(c.slide, c.patient, c.split, c.subtype, int(c.subtype != "normal"), int(c.mutated)) for c in cases]
    write_table(out / "labels.csv", (*key, "subtype", "recognition", "mutation"), facts)
    write_table(out / "cells.csv", ("slide_id", "x", "y", "kind", "sheet"), cells)


log = logging.getLogger(__name__)

TASKS = ("subtype", "recognition", "mutation")
TILES = TileConfig(size=64, mpp=2.0)
"""Structure of glands and sheets shows at 2 µm/px, and the tiny encoder takes 64 px."""
SETTINGS = PRESETS["tiny"]


def run_demo(out: Path, *, slides: int = 120, seed: int = 0) -> dict[str, Result]:
    """Write a synthetic cohort into `out` and run the four steps on it. Returns the evaluation of each task.

    Training sees the reports of the training patients only; test patients' slides are drawn from fields never used in training.

    Raises:
        StoreError: `out` holds a demo already.
    """
    out = Path(out)
    if (out / "run").exists():
        raise StoreError(f"{out}: holds a demo already; choose another --out, or delete it")
    log.info("1/5 drawing %d synthetic scans with reports and labels (nothing here is real tissue)", slides)
    write_cohort(out, slides=slides, seed=seed)
    log.info("2/5 dreslcl tile: finding tissue")
    tile_slides(out / "slides", out / "work", TILES)
    log.info("3/5 dreslcl pretrain: training on the reports of the training patients")
    cohort = Cohort.load(out / "work", patients=out / "labels.csv")
    train, _ = cohort.with_reports(out / "reports.csv").split("split=test", out / "reports.csv")
    settings = updated(SETTINGS, train={"seed": seed})
    model = pretrain(train, out / "run", settings)
    log.info("4/5 dreslcl embed: every tile of every slide, with the trained and with the untrained encoder")
    trained = embed(cohort, out / "embeddings", model=model)
    untrained = embed(cohort, out / "untrained", encoder=settings.encoder)
    log.info("5/5 dreslcl eval: a linear probe on the training patients, measured on the test patients")
    results = {}
    for task in TASKS:
        results[task] = evaluate(
            (trained, untrained),
            out / "labels.csv",
            task,
            split="split",
            texts=[row for row in read_table(out / "reports.csv") if row["split"] == "train"],
            config=EvalConfig(seed=seed),
        )
        results[task].save(out / "eval" / task)
    return results
