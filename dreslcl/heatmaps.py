"""Where on a slide its vector comes from: maps of codewords, weights and contributions to a score, for eyes and for QuPath."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Num, UInt8
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .cohort import Cohort
from .common import ConfigError, encoded, fingerprint, hold, preview, read_table, write_bytes, write_text
from .config import TrainConfig
from .embedding import check_tiles, encode_slides, noting
from .evaluation import fit_probe, load_model
from .formats import Embeddings
from .labels import join_labels, labelled
from .model import Aggregator, nearest_codeword
from .slide import Slide
from .tiles import TileGrid
from .tissue import draw_overlay

TOP = 12  # tiles on a contact sheet
OPACITY = 140  # of a map over its thumbnail, 0-255
EDGE = 1400  # px, longest edge of a map

Found = tuple[Int64[np.ndarray, "M"], Float[np.ndarray, "M"], Float[np.ndarray, "M"]]  # codeword, weight, contribution of each tile
Colours = UInt8[np.ndarray, "n 4"]


def contributions(aggregator: Aggregator, features: Float[Tensor, "M D"], direction: Float[Tensor, "E"]) -> Found:
    """Of each tile of a slide the codeword, the weight a(x), and the first-order contribution to the score s = direction · z of the slide.

    Tile i counts f_i times in all sums (`Aggregator.bag`); its contribution is the derivative ∂s/∂f_i at f = 1: weight, tokens, shares and
    mean path are all in it, nothing is approximated. What the score would lose without the tile (f_i = 0) it gives to first order only.
    Where scaling all of f leaves z as it is, as for our aggregators, contributions sum to zero: a tile counts against the slide's average.
    """
    factor = features.new_ones(len(features)).requires_grad_()
    with torch.enable_grad():
        score = aggregator(aggregator.bag(features, factor))[0] @ direction
        (values,) = torch.autograd.grad(score, factor)
    codes, weights = nearest_codeword(features, aggregator.codewords), aggregator.weigh(features).detach()
    return codes.cpu().numpy(), weights.cpu().numpy(), values.cpu().numpy()


class Target(NamedTuple):
    """The score that contributions are of."""

    title: str
    direction: Float[np.ndarray, "E"]


def draw_heatmaps(
    cohort: Cohort,
    embedded: Embeddings,
    out: Path,
    *,
    text: str | None = None,
    labels: Path | None = None,
    column: str = "subtype",
    settings: TrainConfig = TrainConfig(),  # noqa: B008 (frozen)
    force: bool = False,
) -> dict[str, str]:
    """Draw maps of every slide that is in the embeddings; returns slide id -> reason of those that failed.

    `codewords/<slide_id>.png` is over the thumbnail which morphology word each tile is, `weights/<slide_id>.png` how much it weighs, where
    tiles differ in weight; `geojson/<slide_id>.geojson` holds the same tiles, with their measurements, for QuPath. With a text or labels,
    `contributions/<slide_id>.png` shows what each tile adds to the slide's score, `top_tiles/<slide_id>.jpg` the tiles that add most.
    Contributions are scaled by the number of tiles: the change of the score per share of the slide. Does only what is missing or was drawn
    from something else; holds one slide's features in memory.

    Args:
        embedded: of `embed` with a model; it knows the model's folder.
        text: the score is the cosine of slide and text.
        labels: a table with slide_id or patient_id and `column`. The score is the logit of a linear probe, fitted on these labels
            and all slide vectors, for the slide's own class; a slide without a label is mapped for the class that the probe predicts.
        settings: its tile_batch, precision and workers count.

    Raises:
        ConfigError: no pixels there, both a text and labels, or no slide in common.
        ModelError: the embeddings' model is gone, or fits neither the tiles nor a text.
        TableError: labels do not fit the slides.
    """
    if cohort.work is None:
        raise ConfigError("heatmaps need the folder that `dreslcl tile` wrote: maps are drawn over the scans")
    trained = load_model(embedded)
    check_tiles(trained, cohort)
    if text and labels:
        raise ConfigError("give --text or --labels: a map shows one score")
    targets = class_targets(embedded, labels, column) if labels else {}
    if text:
        targets = dict.fromkeys(embedded.ids, Target(f"Contribution to the similarity with “{text}”", trained.embed_text(text)))
    chosen = [i for i, member in enumerate(cohort.members) if member.slide_id in set(embedded.ids)]
    if not chosen:
        raise ConfigError(f"none of the {len(cohort)} tiled slides is in the embeddings, which are {preview(embedded.ids)}")
    failed: dict[str, str] = {}
    with hold(out):
        scores = {slide: [target.title, *(f"{x:.4g}" for x in target.direction)] for slide, target in targets.items()}
        marks = {i: fingerprint(embedded.model, cohort.mark(i), scores.get(cohort.members[i].slide_id)) for i in chosen}
        todo = [i for i in chosen if force or _drawn(out, cohort.members[i].slide_id) != marks[i]]
        for i, parts in encode_slides(trained.encoder, cohort, todo, settings, "heatmaps"):
            target = targets.get(cohort.members[i].slide_id)
            with noting(failed, cohort.members[i].slide_id):
                rows = np.concatenate(list(parts)).astype(np.float16)  # as embed rounds them
                direction = torch.from_numpy(target.direction if target else np.zeros(trained.joint_dim)).float().to(trained.device)
                found = contributions(trained.aggregator, torch.from_numpy(rows).to(trained.device).float(), direction)
                grid = cohort.grid(i)
                with grid.open_scan(cohort.members[i].source) as scan:
                    _draw(out, scan, grid, found, trained.config.codewords, target, marks[i])
    return failed


def class_targets(embedded: Embeddings, labels: Path, column: str) -> Mapping[str, Target]:
    """Slide -> direction of its class in a probe fitted on all labels. Raises TableError: no such column or ids, or not two classes."""
    slides = labelled(join_labels({"embedding": embedded}, read_table(labels), [column], labels.name), column)
    probe = fit_probe(slides.features["embedding"], slides.y, slides.patients)
    slopes = probe[-1].coef_ / probe[0].scale_
    slopes = np.concatenate([-slopes, slopes]) if len(slides.classes) == 2 else slopes
    classes = dict(zip(embedded.ids, probe.predict(embedded.vectors).tolist())) | dict(zip(slides.ids.tolist(), slides.y.tolist()))
    return {slide: Target(f"Contribution to {column} {slides.classes[y]}", slopes[y]) for slide, y in classes.items()}


def _drawn(out: Path, slide: str) -> str:
    """What the slide's maps were drawn from; "" where there are none. The codeword map is written last."""
    with suppress(OSError), Image.open(out / "codewords" / f"{slide}.png") as image:
        return str(image.info.get("fingerprint", ""))
    return ""


def _draw(folder: Path, scan: Slide, grid: TileGrid, found: Found, codewords: int, target: Target | None, mark: str) -> None:
    codes, weights, values = found
    values = len(grid) * values  # per share of the slide
    thumbnail = scan.thumbnail(max(scan.size) * grid.mpp_level0 / EDGE)
    thumbnail = np.repeat(thumbnail.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)  # grey: the map has all the colour
    colormap = colormaps["tab20" if codewords <= 18 else "turbo"]
    order = [*range(0, 14, 2), 16, 18, *range(1, 15, 2), 17, 19]  # the strong ones first, without grey
    palette = colormap(order[:codewords] if codewords <= 18 else np.linspace(0, 1, codewords), alpha=OPACITY / 255, bytes=True)

    def save(kind: str, colours: Colours, title: str, key: ScalarMappable | list[Patch], name: str = "") -> None:
        image = draw_overlay(thumbnail, [], grid.xy, grid.extent_px, grid.level0_size, EDGE, colours)
        figure = _map(image, grid.mpp_level0 * grid.level0_size[0] / image.width, title, key, name)
        write_bytes(folder / kind / f"{grid.slide_id}.png", encoded(figure, metadata={"fingerprint": mark}))

    if target:
        scale = ScalarMappable(CenteredNorm(halfrange=max(float(np.percentile(np.abs(values), 99)), 1e-12)), colormaps["RdBu_r"])
        key = "lowers  ←  per share of the slide  →  raises"
        save("contributions", scale.to_rgba(values, alpha=OPACITY / 255, bytes=True), target.title, scale, key)
        top = np.argsort(-values)[:TOP]
        sheet = _sheet(scan.read_tiles(grid.xy[top], grid.size, grid.mpp), values[top])
        write_bytes(folder / "top_tiles" / f"{grid.slide_id}.jpg", encoded(sheet))
    if np.ptp(weights):
        relative = weights / weights.mean()
        scale = ScalarMappable(LogNorm(*np.percentile(relative, [1, 99])), colormaps["viridis"])
        colours = scale.to_rgba(relative, alpha=OPACITY / 255, bytes=True)
        save("weights", colours, "Weight of each tile", scale, "times the mean of the slide")
    measured = {"codeword": codes, "weight": weights} | ({"contribution": values} if target else {})
    write_text(folder / "geojson" / f"{grid.slide_id}.geojson", json.dumps(tiles_geojson(grid, measured, palette)))
    share = np.bincount(codes, minlength=codewords) / len(codes)
    often = np.argsort(-share, kind="stable")[:16]
    legend = [Patch(color=palette[k] / 255, label=f"{k}: {share[k]:.0%}") for k in often if share[k]]
    save("codewords", palette[codes], "Codeword of each tile, and its share of the slide", legend)


def _map(image: Image.Image, um_per_px: float, title: str, key: ScalarMappable | list[Patch], name: str) -> Figure:
    """A map with a scale bar, whose length is a 1, 2 or 5 of its unit, and a key: a colour bar, or named colours."""
    w, h = image.size
    figure = Figure(figsize=(6.4, 6.4 * min(max(h / w, 0.4), 1.6)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(image)
    ax.set_title("\n".join(wrap(title, 56, max_lines=3, placeholder=" …")), fontsize=13, loc="left", parse_math=False)
    ax.set_axis_off()
    quarter = w * um_per_px / 4
    power = 10.0 ** np.floor(np.log10(quarter))
    length = float(power * max(step for step in (1, 2, 5) if step * power <= quarter))
    ax.plot([0.02 * w, 0.02 * w + length / um_per_px], [h * 1.02] * 2, color="black", linewidth=4, solid_capstyle="butt", clip_on=False)
    ax.text(0.02 * w, h * 1.035, f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm", fontsize=13, va="top")
    if isinstance(key, ScalarMappable):
        ticks = np.geomspace(*key.get_clim(), 5) if isinstance(key.norm, LogNorm) else None
        bar = figure.colorbar(key, ax=ax, shrink=0.7, pad=0.01, ticks=ticks, format="%.3g")
        bar.minorticks_off()
        bar.set_label(name, fontsize=13)
        bar.ax.tick_params(labelsize=12)
    else:
        ax.legend(handles=key, fontsize=13, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _sheet(tiles: UInt8[np.ndarray, "n h w 3"], values: Float32[np.ndarray, "n"]) -> Image.Image:
    """Tiles side by side, each under its contribution."""
    cell, columns, font = 192, 4, ImageFont.load_default(15)
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, -(-len(tiles) // columns) * (cell + 28) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (tile, value) in enumerate(zip(tiles, values)):
        x, y = n % columns * (cell + 8) + 8, n // columns * (cell + 28) + 8
        draw.text((x, y), f"{value:+.3g}", fill="black", font=font)
        sheet.paste(Image.fromarray(tile).resize((cell, cell), Image.Resampling.BICUBIC), (x, y + 20))
    return sheet


def tiles_geojson(grid: TileGrid, measured: Mapping[str, Num[np.ndarray, "M"]], palette: Colours) -> dict[str, object]:
    """QuPath tile objects in level-0 pixels, classified by codeword (the first thing measured), with all that was measured of each."""
    features = []
    for (x, y), *values in zip(grid.xy.tolist(), *(kind.tolist() for kind in measured.values())):
        far_x, far_y, k = x + grid.extent_px, y + grid.extent_px, values[0]
        shape = {"type": "Polygon", "coordinates": [[[x, y], [far_x, y], [far_x, far_y], [x, far_y], [x, y]]]}
        look = {"name": f"codeword {k}", "color": palette[k, :3].tolist()}
        found = {name: float(f"{value:.5g}") for name, value in zip(measured, values)}
        properties = {"objectType": "tile", "classification": look, "measurements": found}
        features.append({"type": "Feature", "geometry": shape, "properties": properties})
    return {"type": "FeatureCollection", "features": features}
