"""Where on a slide its vector comes from: maps of codewords and of each tile's contribution to a score, for eyes and for QuPath."""

import io
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, UInt8
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .bank import MemoryBank
from .cohort import Cohort
from .common import (
    ConfigError,
    SlideError,
    StoreError,
    TableError,
    fingerprint,
    hold,
    progress,
    rank_and_world,
    read_table,
    reason,
    write_bytes,
    write_text,
)
from .config import EvalConfig
from .embedding import bank_rows, read_slide
from .evaluation import fit_probe, inner_folds
from .formats import Embeddings, Layout, read_features, tile_files
from .labels import UNLABELLED, encode, select
from .model import DRESLCL
from .residual import ResidualAggregator, assignment_shares, encode_residuals
from .slide import Slide
from .tiles import TileGrid
from .tissue import draw_overlay

log = logging.getLogger(__name__)

CHUNK = 8192  # tiles in memory at a time beside their features
TOP = 12  # tiles on a contact sheet
OPACITY = 140  # of a map over its thumbnail, 0-255


def contributions(
    aggregator: ResidualAggregator, features: Float[Tensor, "M D"], direction: Float[Tensor, "E"]
) -> tuple[Int64[np.ndarray, "M"], Float32[np.ndarray, "M"]]:
    """The codeword of each tile of a slide, and each tile's first-order contribution to the score s = direction · z of the slide.

    Let tile i weigh w_i in all sums: R_k = Σ w_i (x_i − c_k) and n_k = Σ w_i. Its contribution is the derivative ∂s/∂w_i at
    w = 1, that is ⟨x_i − c_k, ∂s/∂R_k⟩ + ∂s/∂n_k: tokens, count term and mean path are all in it, nothing is approximated. What the score
    would lose without the tile (w_i = 0) it gives to first order only. When a tile's feature moves by δ and keeps its codeword, the score
    moves by ⟨δ, ∂s/∂R_k⟩, and so does the sum of the contributions at that gradient. Where scaling all weights leaves z as it is
    (`intra_norm`, the default), contributions sum to zero: a tile counts against the average tile of its slide.
    """
    slopes = score_slopes(aggregator, features, direction)
    codes, values = zip(*(tile_values(aggregator, part, *slopes) for part in features.split(CHUNK)))
    return torch.cat(codes).cpu().numpy(), torch.cat(values).cpu().numpy()


def score_slopes(
    aggregator: ResidualAggregator, features: Float[Tensor, "M D"], direction: Float[Tensor, "E"]
) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
    """∂s/∂R_k and ∂s/∂n_k of the score s = direction · z of a slide."""
    parts = [encode_residuals(part, aggregator.codewords, aggregator.config.soft_assignment) for part in features.split(CHUNK)]
    sums, counts = (torch.stack(side).sum(0).requires_grad_() for side in zip(*parts))
    with torch.enable_grad():
        by_sum, by_count = torch.autograd.grad(aggregator(sums[None], counts[None])[0] @ direction, (sums, counts))
    return by_sum, by_count


def tile_values(
    aggregator: ResidualAggregator, features: Float[Tensor, "n D"], by_sum: Float[Tensor, "K D"], by_count: Float[Tensor, "K"]
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """Codewords and contributions of some tiles at given slopes; a softly assigned tile counts at each codeword by its share."""
    words = aggregator.codewords
    shares = assignment_shares(features, words, aggregator.config.soft_assignment)
    return shares.argmax(1), (shares * (features @ by_sum.T + by_count - (words * by_sum).sum(1))).sum(1)


@dataclass(frozen=True)
class Target:
    """The score that contributions are of."""

    title: str
    direction: Float[np.ndarray, "E"]


def draw_heatmaps(
    cohort: Cohort,
    out: Path,
    model: Path,
    embedded: Embeddings,
    *,
    text: str | None = None,
    labels: Path | None = None,
    column: str = "subtype",
    layout: Layout = "trident",
    from_bank: bool = False,
    force: bool = False,
) -> dict[str, str]:
    """Draw maps of every slide that `embed` did, into `out/heatmaps`; returns slide id -> reason of those that failed.

    `codewords/<slide_id>.png` is over the thumbnail which morphology word each tile is; `geojson/<slide_id>.geojson` holds the same tiles,
    with their measurements, for QuPath. With a text or labels, `contributions/<slide_id>.png` shows what each tile adds to the slide's
    score, `top_tiles/<slide_id>.jpg` the tiles that add most. Contributions are scaled by the number of tiles: the change of
    the score per share of the slide. Does only what is missing or was drawn from something else; holds one slide's features in memory.

    Args:
        out, model, embedded, layout, from_bank: as `embed` was given and returned them; tile features are read from `out`, or the bank.
        text: the score is the cosine of slide and text.
        labels: a table with slide_id or patient_id and `column`. The score is the logit of a linear probe, fitted on these labels
            and all slide vectors, for the slide's own class; a slide without a label is mapped for the class that the probe predicts.

    Raises:
        ConfigError: no pixels there, or both a text and labels.
        ModelError: the model's text tower cannot read a text.
        TableError: labels do not fit the slides.
    """
    if cohort.work is None:
        raise ConfigError("--heatmaps needs the folder that `dreslcl tile` wrote: maps are drawn over the scans")
    if text and labels:
        raise ConfigError("give --heatmap-text or --heatmap-labels: a map shows one score")
    out, trained = Path(out), DRESLCL.load(model)
    device = trained.text_centre.device
    members = [i for i, member in enumerate(cohort.members) if member.slide_id not in embedded.failed]
    targets: list[Target | None] = [None] * len(members)
    if text:
        targets = [Target(f"Contribution to the similarity with “{text}”", trained.embed_text(text))] * len(members)
    elif labels:
        targets = list(class_targets(cohort, members, out, labels, column))
    rank, world = rank_and_world()
    failed, name = {}, trained.fingerprint()
    with hold(model.parent, shared=True) if from_bank else nullcontext(), progress("heatmaps", len(members[rank::world]), "slides") as bar:
        bank = MemoryBank.open(model.parent / "bank") if from_bank else None
        for i, target in list(zip(members, targets))[rank::world]:
            slide = cohort.members[i].slide_id
            try:
                score = target and [target.title, *(f"{x:.4g}" for x in target.direction)]
                mark = fingerprint(name, cohort.mark(i), from_bank, score)
                if force or _drawn(out, slide) != mark:
                    grid = cohort.grid(i)
                    rows = [*bank_rows(bank, slide, len(grid))] if bank else [read_features(tile_files(out, layout, slide)[-1])]
                    features = torch.from_numpy(np.concatenate(rows).astype(np.float16)).to(device).float()  # as embed rounds them
                    direction = torch.from_numpy(target.direction if target else np.zeros(trained.joint_dim)).float().to(device)
                    codes, values = contributions(trained.aggregator, features, direction)
                    with grid.open_scan(cohort.members[i].source) as scan:
                        _draw(out / "heatmaps", scan, grid, codes, len(grid) * values, trained.config.codewords, target, mark)
            except (SlideError, StoreError, OSError, MemoryError) as error:
                failed[slide] = reason(error)
                log.warning("%s: no heatmap: %s", slide, failed[slide])
            bar.advance(bar.task_ids[0])
    return failed


def class_targets(cohort: Cohort, members: Sequence[int], out: Path, labels: Path, column: str) -> list[Target]:
    """For each member the direction of its class in a linear probe that is fitted on all that have a label.

    Raises:
        TableError: no such column, ids that do not match, or fewer than two classes.
    """
    rows = read_table(labels)
    if column not in (rows[0] if rows else {}):
        raise TableError(f"{labels.name}: no column {column!r}; there are {', '.join(rows[0]) if rows else 'no rows'}")
    chosen = [cohort.members[i] for i in members]
    ids = tuple(m.slide_id for m in chosen)
    vectors = np.stack([read_slide(out, slide)[0] for slide in ids])
    slides, _ = select(Embeddings(ids, tuple(m.patient_id for m in chosen), vectors), None, rows, [column], labels.name)
    known = np.array([i for i, row in enumerate(slides.rows) if row[column].lower() not in UNLABELLED], int)
    slides = slides.keep(known)
    y, names = encode([row[column] for row in slides.rows], column, None, binary=False)
    x = slides.features["embedding"]
    probe = fit_probe(x, y, inner_folds(y, slides.patients, EvalConfig()), len(names))
    slopes = probe[-1].coef_ / probe[0].scale_
    slopes = np.concatenate([-slopes, slopes]) if len(names) == 2 else slopes
    classes = dict(zip(ids, probe.predict(vectors).tolist())) | dict(zip(slides.ids.tolist(), y.tolist()))
    return [Target(f"Contribution to {column} {names[classes[slide]]}", slopes[classes[slide]]) for slide in ids]


def _drawn(out: Path, slide: str) -> str:
    """What the slide's maps were drawn from; "" where there are none. The codeword map is written last."""
    try:
        with Image.open(out / "heatmaps" / "codewords" / f"{slide}.png") as image:
            return str(image.info.get("fingerprint", ""))
    except OSError:
        return ""


def _draw(
    folder: Path,
    scan: Slide,
    grid: TileGrid,
    codes: Int64[np.ndarray, "M"],
    values: Float32[np.ndarray, "M"],
    codewords: int,
    target: Target | None,
    mark: str,
) -> None:
    thumbnail = scan.thumbnail(max(scan.size) * grid.mpp_level0 / 1400)
    thumbnail = np.repeat(thumbnail.mean(2, keepdims=True), 3, axis=2).astype(np.uint8)  # grey: the map has all the colour
    colormap = colormaps["tab20" if codewords <= 18 else "turbo"]
    order = [*range(0, 14, 2), 16, 18, *range(1, 15, 2), 17, 19]  # the strong ones first, without grey
    palette = colormap(order[:codewords] if codewords <= 18 else np.linspace(0, 1, codewords), alpha=OPACITY / 255, bytes=True)
    if target:
        norm = CenteredNorm(halfrange=max(float(np.percentile(np.abs(values), 99)), 1e-12))
        scale = ScalarMappable(norm, colormaps["RdBu_r"])
        colours = scale.to_rgba(values, alpha=OPACITY / 255, bytes=True)
        _save_map(folder / "contributions" / f"{grid.slide_id}.png", thumbnail, grid, colours, target.title, mark, scale)
        top = np.argsort(-values)[:TOP]
        _save_sheet(folder / "top_tiles" / f"{grid.slide_id}.jpg", scan.read_tiles(grid.xy[top], grid.size, grid.mpp), values[top])
    write_text(folder / "geojson" / f"{grid.slide_id}.geojson", json.dumps(tiles_geojson(grid, codes, palette, values if target else None)))
    share = np.bincount(codes, minlength=codewords) / len(codes)
    often = np.argsort(-share, kind="stable")[:16]
    legend = [Patch(color=palette[k] / 255, label=f"{k}: {share[k]:.0%}") for k in often if share[k]]
    title = "Codeword of each tile, and its share of the slide"
    _save_map(folder / "codewords" / f"{grid.slide_id}.png", thumbnail, grid, palette[codes], title, mark, legend)


def _save_map(
    path: Path,
    thumbnail: UInt8[np.ndarray, "h w 3"],
    grid: TileGrid,
    colours: UInt8[np.ndarray, "M 4"],
    title: str,
    mark: str,
    key: ScalarMappable | list[Patch],
) -> None:
    """A map over the thumbnail with a scale bar and a key: a colour bar, or named colours."""
    image = draw_overlay(thumbnail, [], grid.xy, grid.extent_px, grid.level0_size, 1400, colours)
    w, h = image.size
    figure = Figure(figsize=(6.4, 6.4 * min(max(h / w, 0.4), 1.6)), layout="constrained")
    ax = figure.subplots()
    ax.imshow(image)
    ax.set_title("\n".join(wrap(title, 56, max_lines=3, placeholder=" …")), fontsize=13, loc="left", parse_math=False)
    ax.set_axis_off()
    per_px = grid.mpp_level0 * grid.level0_size[0] / w
    length = _round_length(w * per_px / 4)
    ax.plot([0.02 * w, 0.02 * w + length / per_px], [h * 1.02] * 2, color="black", linewidth=4, solid_capstyle="butt", clip_on=False)
    name = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    ax.text(0.02 * w, h * 1.035, name, fontsize=13, va="top")
    if isinstance(key, ScalarMappable):
        bar = figure.colorbar(key, ax=ax, shrink=0.7, pad=0.01)
        bar.set_label("lowers  ←  per share of the slide  →  raises", fontsize=13)
        bar.ax.tick_params(labelsize=12)
    else:
        ax.legend(handles=key, fontsize=13, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=150, metadata={"fingerprint": mark})
    write_bytes(path, memory.getbuffer())


def _round_length(um: float) -> float:
    """The largest 1, 2 or 5 times a power of ten that is not above."""
    power = 10.0 ** np.floor(np.log10(um))
    return float(power * max(step for step in (1, 2, 5) if step * power <= um))


def _save_sheet(path: Path, tiles: UInt8[np.ndarray, "n h w 3"], values: Float32[np.ndarray, "n"]) -> None:
    """Tiles side by side, each under its contribution."""
    cell, columns, font = 192, 4, ImageFont.load_default(15)
    sheet = Image.new("RGB", (columns * (cell + 8) + 8, -(-len(tiles) // columns) * (cell + 28) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (tile, value) in enumerate(zip(tiles, values)):
        x, y = n % columns * (cell + 8) + 8, n // columns * (cell + 28) + 8
        draw.text((x, y), f"{value:+.3g}", fill="black", font=font)
        sheet.paste(Image.fromarray(tile).resize((cell, cell), Image.Resampling.BICUBIC), (x, y + 20))
    memory = io.BytesIO()
    sheet.save(memory, "JPEG", quality=90)
    write_bytes(path, memory.getbuffer())


def tiles_geojson(
    grid: TileGrid, codes: Int64[np.ndarray, "M"], palette: UInt8[np.ndarray, "P 4"], values: Float32[np.ndarray, "M"] | None
) -> dict[str, object]:
    """QuPath tile objects in level-0 pixels, classified by codeword, with their measurements."""
    features = []
    for m, ((x, y), k) in enumerate(zip(grid.xy.tolist(), codes.tolist())):
        far_x, far_y = x + grid.extent_px, y + grid.extent_px
        measured = {"codeword": k} | ({"contribution": float(f"{values[m]:.5g}")} if values is not None else {})
        look = {"name": f"codeword {k}", "color": palette[k, :3].tolist()}
        corners = [[[x, y], [far_x, y], [far_x, far_y], [x, far_y], [x, y]]]
        properties = {"objectType": "tile", "classification": look, "measurements": measured}
        features.append({"type": "Feature", "geometry": {"type": "Polygon", "coordinates": corners}, "properties": properties})
    return {"type": "FeatureCollection", "features": features}
