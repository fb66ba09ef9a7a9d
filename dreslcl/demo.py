"""The whole path on a synthetic cohort: draw scans and reports, then tile, pretrain, embed, evaluate. No download, no GPU."""

import json
import logging
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from jaxtyping import Float, UInt8
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from .cohort import Cohort
from .common import ConfigError, StoreError, atomic, cores, prefetch, read_table, track, write_table
from .config import PRESETS, EvalConfig, TileConfig, updated
from .embedding import embed
from .evaluation import Result, evaluate
from .tiles import tile_slides
from .trainer import pretrain

log = logging.getLogger(__name__)

TILES = TileConfig(size=64, mpp=2.0)  # the structure of glands and sheets shows at 2 µm/px, and the tiny encoder takes 64 px
SETTINGS = PRESETS["tiny"]
FIELD = 256  # px, edge of one field of a slide
SPILL = 60  # px that a field may spill over its edge, so that borders between fields are irregular
SHEET = 896  # px, edge of a sheet of one kind of tissue
BACKGROUND = ("stroma", "lymphocytes", "alveoli")
TUMOUR = {"LUAD": "gland", "LUSC": "squamous", "normal": None}
KINDS = (*BACKGROUND, "gland", "squamous", "gland_mutated", "squamous_mutated")
TUMOUR_MEAN = (52.0, 88.0)  # mean haematoxylin and eosin of every tumour sheet, so that the means tell no class

Points = Float[np.ndarray, "N 2"]
Map = Float[np.ndarray, "H W"]
Pixels = UInt8[np.ndarray, "H W 3"]
Pair = tuple[int, int]
Real = int | float


def write_scan(
    path: Path, image: Pixels, *, mpp: Real | None = 0.5, tile: int | Pair = 256, levels: tuple = (4, 16), subsampling: Pair = (2, 2)
) -> None:
    """Write a pyramidal BigTIFF laid out as an Aperio SVS, in JPEG: baseline, thumbnail in strips, one image per further level.

    `tile` is the edge, or (width, height), of the stored tiles; `levels` are downsampling factors. With `mpp` none, the description
    holds no resolution.
    """
    width, height = (tile, tile) if isinstance(tile, int) else tile
    h, w = image.shape[:2]
    facts = "" if mpp is None else f"|AppMag = {10 / mpp:g}|MPP = {mpp:g}"
    text = f"Aperio Image Library v12.0.15 dreslcl synthetic\n{w}x{h} [0,0 {w}x{h}] ({width}x{height}) Q=85{facts}"
    common: dict[str, Any] = {"photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 85}, "subsampling": subsampling}
    common |= {"metadata": None, "description": text}

    def shrunk(factor: int) -> np.ndarray:
        size = max(1, w // factor), max(1, h // factor)
        box = (0, 0, min(w, size[0] * factor), min(h, size[1] * factor))  # whole blocks only, so that levels lie exactly over each other
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX, box))

    with atomic(path) as part, tifffile.TiffWriter(part, bigtiff=True) as writer:
        writer.write(image, tile=(height, width), **common)
        writer.write(shrunk(max(1, max(w, h) // 512)), rowsperstrip=16, **common)
        for factor in levels:
            writer.write(shrunk(factor), tile=(height, width), subfiletype=1, **common)


class _Canvas:
    """A sheet of tissue as two grey images that shapes are painted on: haematoxylin and eosin."""

    def __init__(self, rng: Generator, haematoxylin: Any, eosin: Map):
        self.rng = rng
        self.images = [Image.fromarray(np.clip(m, 0, 255).astype(np.uint8)) for m in np.broadcast_arrays(haematoxylin, eosin)]
        self.draw = [ImageDraw.Draw(image) for image in self.images]

    def fill(self, outline: Points, haematoxylin: Real, eosin: Real, edge: Real | None = None) -> None:
        """Paint one polygon; `edge` is the eosin of its border."""
        points = [tuple(p) for p in outline.tolist()]
        self.draw[0].polygon(points, fill=int(haematoxylin))
        self.draw[1].polygon(points, fill=int(eosin), outline=None if edge is None else int(edge))

    def nuclei(self, centres: Points, *axes: Any, dark: Real = 150, pale: Real = 0, **shape: Any) -> None:
        """Paint nuclei (`_ovals`); `pale` is how much lighter the inside is than the membrane (open chromatin, with a nucleolus)."""
        outlines = _ovals(self.rng, centres, *axes, **shape)
        for outline, shade in zip(outlines, self.rng.normal(dark, 0.12 * dark, len(outlines)).clip(40, 250)):
            self.fill(outline, shade, 45)
            if pale:
                centre = outline.mean(0)
                self.fill(centre + 0.74 * (outline - centre), shade * (1 - pale), 45)
                self.fill(centre + self.rng.normal(0, 1.5, 2) + 0.2 * (outline - centre), shade, 45)


def _noise(rng: Generator, size: int, scale: Real) -> Map:
    """Smooth noise of about unit variance whose bumps are `scale` px wide, (size, size)."""
    small = Image.fromarray(rng.normal(0, 1.25, [int(np.ceil(size / scale)) + 3] * 2).astype(np.float32))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC, (1, 1, 1 + size / scale, 1 + size / scale)))


def _scatter(rng: Generator, spacing: Real, jitter: Real = 0.16) -> Points:
    """Points over a sheet: a hexagonal grid, shaken."""
    x, y = np.meshgrid(np.arange(-spacing, SHEET + spacing, spacing, dtype=float), np.arange(-spacing, SHEET + spacing, spacing * 0.87))
    x[1::2] += spacing / 2
    return np.stack([x, y], -1).reshape(-1, 2) + rng.normal(0, jitter * spacing, (x.size, 2))


def _ovals(rng: Generator, centres: Points, *axes: Any, wobble: Real = 0.1, spread: Real = 0.12, vertices: int = 16) -> np.ndarray:
    """Outlines (N, vertices, 2) of wobbly ellipses; axes: length, width (px) and angle (any where not given), numbers or one per centre."""
    n = len(centres)
    axes = (*axes, rng.uniform(0, np.pi, n))[:3]
    length, width, angle = (np.broadcast_to(np.asarray(v, float), n)[:, None] for v in axes)
    t, phase = np.linspace(0, 2 * np.pi, vertices, endpoint=False)[None], rng.uniform(0, 2 * np.pi, (2, n, 1))
    r = rng.normal(1, spread, (n, 1)).clip(0.7, 1.4) * (1 + wobble * (np.cos(2 * t + phase[0]) + 0.7 * np.cos(3 * t + phase[1]))) / 2
    x, y = r * length * np.cos(t), r * width * np.sin(t)
    return centres[:, None] + np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)], -1)


def _at(values: Map, points: Points) -> Float[np.ndarray, "N"]:
    return values[tuple(np.clip(points, 0, SHEET - 1).astype(int).T[::-1])]


def _stroma(rng: Generator, density: Real = 36) -> _Canvas:
    """Wavy collagen bundles with clefts, and spindle nuclei along them, one per `density` px."""
    y, x = np.mgrid[:SHEET, :SHEET].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x + 34 * _noise(rng, SHEET, 150) + 7 * _noise(rng, SHEET, 45)
    table = _noise(rng, 512, 7) + 0.6 * _noise(rng, 512, 2.5)
    bundles = table[across.astype(int) % 512, (along / 14).astype(int) % 512]
    canvas, centres = _Canvas(rng, 8, np.where(bundles < -1.5, 18, 98 + 22 * bundles)), _scatter(rng, density, 0.3)
    down, right = (_at(slope, centres) for slope in np.gradient(across))
    canvas.nuclei(centres, 26, 7, np.arctan2(-right, down) + rng.normal(0, 0.15, len(centres)))
    return canvas


def _lymphocytes(rng: Generator) -> _Canvas:
    """Small round dark nuclei, densely packed."""
    canvas, centres = _Canvas(rng, 14, 62 + 14 * _noise(rng, SHEET, 12)), _scatter(rng, 19, 0.2)
    centres = centres[rng.random(len(centres)) < 0.9 + 0.1 * _at(_noise(rng, SHEET, 90), centres)]
    canvas.nuclei(centres, 13.5, 12.5, wobble=0.05, spread=0.09, dark=190)
    return canvas


def _alveoli(rng: Generator) -> _Canvas:
    """Airspaces between thin walls with flat nuclei: the edges of Voronoi cells."""
    y, x = np.mgrid[: SHEET // 8, : SHEET // 8] * 8.0
    seeds = _scatter(rng, rng.uniform(95, 125), 0.2)
    near = np.partition(np.hypot(x[..., None] - seeds[:, 0], y[..., None] - seeds[:, 1]), 1, axis=-1)
    gap = np.asarray(Image.fromarray((near[..., 1] - near[..., 0]).astype(np.float32)).resize((SHEET, SHEET), Image.Resampling.BICUBIC))
    gap = gap + 2.5 * _noise(rng, SHEET, 25) - 4 * _noise(rng, SHEET, 120)
    canvas = _Canvas(rng, np.where(gap < 19, 10, 0), np.where(gap < 19, 92 + 14 * _noise(rng, SHEET, 8), 7))
    centres = _scatter(rng, 13.5, 0.35)
    centres = centres[_at(gap, centres) < 14]
    down, right = (_at(slope, centres) for slope in np.gradient(gap))
    canvas.nuclei(centres, 14.5, 8, np.arctan2(right, -down) + rng.normal(0, 0.3, len(centres)), spread=0.17)
    return canvas


def _glands(rng: Generator, scale: Real) -> _Canvas:
    """Adenocarcinoma, acinar: rings of columnar nuclei around a lumen, in stroma. `scale` enlarges the nuclei."""
    canvas, centres = _stroma(rng, 44), _scatter(rng, 160, 0.07)
    radii = rng.uniform(46, 90, len(centres))
    for centre, radius, outline in zip(centres, radii, _ovals(rng, centres, 2 * radii, 2 * radii, wobble=0.06, spread=0, vertices=240)):
        reach = np.hypot(*(outline - centre).T)[:, None]
        ray = (outline - centre) / reach
        band = rng.uniform(29, 36) * (1 + scale) / 2
        canvas.fill(outline, 18, rng.uniform(95, 125), edge=140)
        canvas.fill(centre + ray * (reach - band - rng.normal(0, 1, reach.shape)), 0, (6, 6, 35)[rng.integers(3)], edge=135)
        count = int(2 * np.pi * (radius - 12) / (11.5 * scale))
        pick = ((np.arange(count) + rng.normal(0, 0.15, count)) / count * len(ray)).astype(int) % len(ray)
        spots = centre + ray[pick] * (reach[pick] - 13 * (1 + scale) / 2 - rng.normal(0, 3.5, (count, 1)))
        tilt = np.arctan2(ray[pick, 1], ray[pick, 0]) + rng.normal(0, 0.12, count)
        canvas.nuclei(spots, 20 * scale, 10.5 * scale, tilt, spread=0.09, pale=0.25)
    return canvas


def _squamous(rng: Generator, scale: Real) -> _Canvas:
    """Squamous carcinoma: sheets of polygonal cells with keratin pearls, holes and strands of stroma. `scale` enlarges the nuclei."""
    canvas, islands, spacing = _stroma(rng, 44), _noise(rng, SHEET, 120) + 0.12 * _noise(rng, SHEET, 25), 23 * (1 + scale) / 2
    pearls = _scatter(rng, 164, 0.2)
    pearls = pearls[_at(islands, pearls) > -0.8]
    centres = _scatter(rng, spacing)
    centres = rng.permutation(centres[_at(islands, centres) > -0.95])
    for outline in _ovals(rng, centres, 1.25 * spacing, 1.15 * spacing, wobble=0.07, spread=0, vertices=8):
        canvas.fill(outline, 18, rng.normal(108, 9), edge=62)
    for outline in _ovals(rng, centres[: len(centres) // 36], 2.4 * spacing, 1.3 * spacing):  # dead cells leave holes
        canvas.fill(outline, 0, 8)
    canvas.nuclei(centres, 15.5 * scale, 13.5 * scale, pale=0.25)
    radii = rng.uniform(30, 62, len(pearls))
    for centre, radius, outline in zip(pearls, radii, _ovals(rng, pearls, 2 * radii, 1.75 * radii, wobble=0.03, spread=0)):
        for k, depth in enumerate(np.arange(0, radius - 3, 4.5)):
            canvas.fill(centre + (outline - centre) * (1 - depth / radius), 4, (215, 140)[k % 2] + rng.normal(0, 8), edge=120)
    return canvas


def _draw(kind: str, rng: Generator) -> UInt8[np.ndarray, "2 H W"]:
    """One sheet of a kind of tissue: haematoxylin and eosin with grain, slightly blurred as by the optics."""
    tissue, _, mutated = kind.partition("_")
    background = {"stroma": _stroma, "lymphocytes": _lymphocytes, "alveoli": _alveoli}
    tumour = {"gland": _glands, "squamous": _squamous}
    canvas = background[kind](rng) if kind in background else tumour[tissue](rng, 1.45 if mutated else 1.0)
    sheet = np.stack([np.asarray(image.filter(ImageFilter.GaussianBlur(0.8)), np.float32) for image in canvas.images])
    sheet *= 1 + 0.10 * _noise(rng, SHEET, 3) + 0.06 * _noise(rng, SHEET, 40)
    if kind not in BACKGROUND:
        sheet *= (np.array(TUMOUR_MEAN) / sheet.mean((1, 2)))[:, None, None]
    return np.clip(sheet, 0, 255).astype(np.uint8)


_Case = namedtuple("_Case", "slide_id patient_id split subtype recognition mutation")  # what a slide shows: its row of labels.csv


def _plan(slides: int, rng: Generator) -> list[_Case]:
    """Deal slides to splits, classes and patients: a patient has one or two slides, one split and one class."""
    held_out = max(3, round(0.4 * slides))
    names = iter(rng.permutation(slides) + 1)  # an id says nothing of split and class
    cases = []
    for split, count in (("train", slides - held_out), ("test", held_out)):
        for c, (subtype, tumour) in enumerate(TUMOUR.items()):
            left, mutated = len(range(c, count, len(TUMOUR))), bool(rng.integers(2))
            while left:
                take = 2 if left > 3 and rng.random() < 0.3 else 1
                patient, left, mutated = f"P{next(names):03d}", left - take, not mutated
                facts = (patient, split, subtype, int(tumour is not None), int(mutated and tumour is not None))
                cases += [_Case(f"{patient}-{n + 1}", *facts) for n in range(take)]
    return sorted(cases)


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
    return np.rot90(image, int(rng.integers(4)), (-2, -1))[..., :: int(rng.choice([1, -1]))]


def _patch(rng: Generator) -> np.ndarray:
    """Irregular mask of a field: all of its square, and bays beyond its edges, (FIELD + 2 SPILL) squared."""
    size = FIELD + 2 * SPILL
    inset = np.minimum(np.arange(size), np.arange(size)[::-1])
    return np.minimum(inset[:, None], inset) > 0.5 * SPILL + 16 * _noise(rng, size, 55) + 3 * _noise(rng, size, 12)


def _outline(rng: Generator, columns: int, rows: int) -> Map:
    """Height that is positive inside the tissue, at 16 px per value: a rounded box with bumps."""
    y, x = np.abs(np.mgrid[-1 : 1 : rows * 16j, -1 : 1 : columns * 16j]) ** 2.6
    bumps = 0.10 * _noise(rng, 16 * max(rows, columns), 50) + 0.04 * _noise(rng, 16 * max(rows, columns), 12)
    return (0.87 + bumps[: rows * 16, : columns * 16] - (x + y) ** (1 / 2.6)).astype(np.float32)


def _kinds(rng: Generator, case: _Case, inside: np.ndarray) -> np.ndarray:
    """Kind of tissue of every field, an index into KINDS: background in regions, tumour as one or two foci."""
    rows, columns = inside.shape
    mix = rng.dirichlet(np.full(len(BACKGROUND), 1.5)) + 1e-3
    kinds = np.argmax([np.log(p) + 1.1 * _noise(rng, max(rows, columns), 1.8)[:rows, :columns] for p in mix], axis=0)
    if name := TUMOUR[case.subtype]:
        places = np.argwhere(inside)
        foci = places[rng.choice(len(places), int(rng.integers(1, 3)), replace=False)]
        far = np.hypot(*(places[:, None] - foci[None]).transpose(2, 0, 1)).min(1) + rng.normal(0, 0.35, len(places))
        own = places[np.argsort(far)[: max(1, round(rng.uniform(0.15, 0.35) * len(places)))]]
        kinds[own[:, 0], own[:, 1]] = KINDS.index(name + "_mutated" * case.mutation)
    return kinds


def _compose(case: _Case, rng: Generator, sheets: dict[tuple, list], side: tuple[int, int]) -> tuple[np.ndarray, list]:
    """Draw one slide; returns its pixels and the rows of cells.csv (fields that are at least half tissue)."""
    columns, rows = rng.integers(side[0], side[1] + 1, 2).tolist()
    outline, size = _outline(rng, columns, rows), FIELD + 2 * SPILL
    covered = (outline > 0).reshape(rows, 16, columns, 16).mean((1, 3))
    kinds = _kinds(rng, case, covered >= 0.5)
    maps = np.zeros((2, rows * FIELD + 2 * SPILL, columns * FIELD + 2 * SPILL), np.uint8)
    patches, cells = [_patch(rng) for _ in range(8)], []
    for row, column in rng.permutation(np.argwhere(covered > 0)).tolist():
        kind = KINDS[kinds[row, column]]
        number = int(rng.integers(len(sheets[case.split, kind])))
        x, y = rng.integers(0, SHEET - size + 1, 2)
        field = _turned(sheets[case.split, kind][number][:, y : y + size, x : x + size], rng)
        field = np.clip(field * rng.uniform(0.85, 1.15, (2, 1, 1)), 0, 255).astype(np.uint8)
        here = np.s_[:, row * FIELD : row * FIELD + size, column * FIELD : column * FIELD + size]
        np.copyto(maps[here], field, where=_turned(patches[rng.integers(len(patches))], rng))
        if covered[row, column] >= 0.5:
            cells.append((case.slide_id, column * FIELD, row * FIELD, kind, f"{case.split}-{kind}-{number}"))
    edge = np.asarray(Image.fromarray(outline).resize((columns * FIELD, rows * FIELD), Image.Resampling.BICUBIC)) > 0
    blur = ImageFilter.BoxBlur(rng.uniform(0.2, 1.2))
    blurred = [np.asarray(Image.fromarray(m[SPILL:-SPILL, SPILL:-SPILL] * edge).filter(blur), np.uint16) for m in maps]
    colours = _stain(rng).view(np.uint32)[:, 0]  # one gather of whole colours is 10x faster than one per channel
    image = colours[blurred[0] << 8 | blurred[1]].view(np.uint8).reshape(*edge.shape, 4)[..., :3]
    return np.ascontiguousarray(image), sorted(cells, key=lambda cell: (cell[2], cell[1]))


def _report(case: _Case, rng: Generator) -> str:
    """The report of one slide: the diagnosis always, other facts mostly, each in one of several wordings, in random order."""
    words = json.loads(Path(__file__).with_name("demo_reports.json").read_text(encoding="utf-8"))
    facts = words["facts"] + [words["nuclei"][case.mutation], *words["tumour_facts"]] * case.recognition
    facts = [words["diagnosis"][case.subtype], *(fact for fact in facts if rng.random() < 0.75)]
    facts = [facts[i] for i in rng.permutation(len(facts))] + [words["gross"]] * (rng.random() < 0.25)
    details = {"side": rng.choice(["right", "left"]), "lobe": rng.choice(["upper", "lower"]), "nodes": rng.integers(4, 25)}
    return " ".join(str(rng.choice(fact)) for fact in facts).format(**details, **dict(zip("abc", rng.uniform(1, 14, 3).round(1))))


def write_cohort(out: Path, slides: int = 72, seed: int = 0, *, side: tuple[int, int] = (7, 10)) -> None:
    """Write a synthetic cohort; the same arguments give the same files.

    `out/slides/*.svs`; `reports.csv` (slide_id, patient_id, split, report); `labels.csv` (slide_id, patient_id, split, subtype,
    recognition, mutation); `cells.csv` (slide_id, x, y, kind, sheet): the level-0 top-left corner of each field of 256 px, what it
    shows, and the sheet it was cut from. About 60 % of the slides are `train`, the others `test`; no patient and no sheet is in both.
    A slide is `side` fields wide and high.

    Raises ConfigError: fewer than 6 slides.
    """
    if slides < 6:
        raise ConfigError(f"a synthetic cohort needs at least 6 slides (two splits of three classes), got {slides}")
    out, threads = Path(out), min(8, cores())
    cases = _plan(slides, np.random.default_rng([seed, 0]))
    counts = {"train": min(5, 1 + slides // 16), "test": min(4, 1 + slides // 20)}
    jobs = [(split, kind, n) for split, count in counts.items() for kind in KINDS for n in range(count)]

    def drawn(job: tuple[str, str, int]) -> np.ndarray:
        return _draw(job[1], np.random.default_rng([seed, 1, job[0] == "test", KINDS.index(job[1]), job[2]]))

    def made(number: int) -> list:
        image, cells = _compose(cases[number], np.random.default_rng([seed, 2, number]), sheets, side)
        write_scan(out / "slides" / f"{cases[number].slide_id}.svs", image)
        return cells

    sheets: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for (split, kind, _), sheet in zip(jobs, track(prefetch(drawn, jobs, threads, threads), "drawing tissue", "sheets", len(jobs))):
        sheets[split, kind].append(sheet)
    cells = [row for rows in track(prefetch(made, range(slides), threads, threads), "drawing slides", "slides", slides) for row in rows]
    rng = np.random.default_rng([seed, 3])
    write_table(out / "reports.csv", (*_Case._fields[:3], "report"), [(*case[:3], _report(case, rng)) for case in cases])
    write_table(out / "labels.csv", _Case._fields, cases)
    write_table(out / "cells.csv", ("slide_id", "x", "y", "kind", "sheet"), cells)


def run_demo(out: Path, *, slides: int = 120, seed: int = 0) -> dict[str, Result]:
    """Write a synthetic cohort into `out` and run the four steps on it. Returns the evaluation of each task.

    Training sees the reports of the training patients only; test patients' slides are drawn from fields never used in training.

    Raises StoreError: `out` holds a demo already.
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
    results, reports = {}, [row for row in read_table(out / "reports.csv") if row["split"] == "train"]
    how = {"split": "split", "texts": reports, "config": EvalConfig(seed=seed)}
    for task in ("subtype", "recognition", "mutation"):
        results[task] = evaluate((trained, untrained), out / "labels.csv", task, **how)
        results[task].save(out / "eval" / task)
    return results
