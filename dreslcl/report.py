"""Figures, and one self-contained HTML page: inline style, pictures as data URIs, every text escaped, nothing loaded from outside."""

import base64
import io
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import jinja2
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from . import figures
from .errors import TableError
from .evaluation import Outcome, Result
from .files import read_table, write_bytes, write_text
from .metrics import NAMES, show

PACKAGES = ("dreslcl", "numpy", "scikit-learn", "torch", "open-clip-torch", "tifffile", "imagecodecs")


@dataclass(frozen=True)
class Table:
    """Cells are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    lead: bool = False
    """The first row is the one that counts."""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG, its bytes or its file."""

    data: bytes | Path
    caption: str = ""

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        data = self.data if isinstance(self.data, bytes) else Path(self.data).read_bytes()
        kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Notice:
    """A warning."""

    text: str


@dataclass(frozen=True)
class Code:
    """A command line, or other text to copy."""

    text: str


Block = str | Table | Picture | Notice | Code | list[Picture]


def page(path: Path, title: str, sections: Mapping[str, Sequence[Block]]) -> None:
    """Write one HTML file of sections (heading -> blocks); a list of pictures becomes a gallery."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("dreslcl", ""), autoescape=True, undefined=jinja2.StrictUndefined)
    typed = [(heading, [(type(block).__name__, block) for block in blocks]) for heading, blocks in sections.items()]
    write_text(path, environment.get_template("report.html").render(title=title, sections=typed))


def versions() -> str:
    """Python and the packages that decide the numbers, with their versions."""
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def shrunk(path: Path, width: int = 620) -> bytes:
    """A picture file as JPEG bytes at most `width` px wide."""
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((width, 2 * width))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def curves(metrics_csv: Path, path: Path) -> None:
    """Draw every numeric column of a run's metrics.csv over its epochs: one small panel per group, as PNG.

    Names with the same part before a slash or an @ share a panel, and so do `loss`, `train_loss` and `val_loss`.

    Raises:
        TableError: no row, or no column `epoch`.
    """
    rows = read_table(metrics_csv, ["epoch"])
    groups: dict[str, list[str]] = defaultdict(list)
    for name in rows[0] if rows else []:
        if name not in ("epoch", "step") and any(_number(row[name]) is not None for row in rows):
            groups[re.split("[/@]", name)[0].removeprefix("train_").removeprefix("val_")].append(name)
    if not groups:
        raise TableError(f"{metrics_csv}: no numbers to draw")
    across = min(4, len(groups))
    figure = Figure(figsize=(3.4 * across, 2.5 * -(-len(groups) // across)), layout="tight")
    panels = figure.subplots(-(-len(groups) // across), across, squeeze=False).ravel()
    for ax, (group, names) in zip(panels, groups.items()):
        for name in names:
            points = [(float(row["epoch"]), value) for row in rows if (value := _number(row[name])) is not None]
            ax.plot(*zip(*points), marker="o" if len(points) < 30 else "", markersize=3, linewidth=1.3, label=name)
        ax.set_title(group, fontsize=10, loc="left")
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            ax.legend(fontsize=7, frameon=False)
    for ax in panels[len(groups) :]:
        ax.set_axis_off()
    panels[0].set_xlabel("epoch", fontsize=8)
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=130)
    write_bytes(path, memory.getbuffer())


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def evaluation_page(result: Result, path: Path, *, command: str, pictures: Mapping[str, Path] | None = None) -> None:
    """Write report.html of an evaluation.

    Args:
        command: the exact command line, shown as it is.
        pictures: slide id -> picture (a heatmap) for the examples of each class.
    """
    header, rows = result.table()
    sections: dict[str, list[Block]] = {"": [_headline(outcome) for outcome in result.outcomes]}
    if result.warnings:
        sections["Warnings"] = [Notice(text) for text in result.warnings]
    for outcome in result.outcomes:
        scores = [row[1:] for row in rows if row[0] == outcome.column]
        blocks: list[Block] = [Table(header[1:], scores, "Value and 95 % interval.", lead=True)]
        if outcome.classes:
            counted = outcome.counts["classes"].items()
            blocks.append(Table(["class", "slides", "patients", "tested"], [[name, *map(str, n.values())] for name, n in counted]))
            drawn = [
                Picture(figures.curve(outcome, "roc"), "Band: 95 %, patients resampled."),
                Picture(figures.curve(outcome, "pr"), "Dotted: share of the class."),
                Picture(figures.confusion_matrix(outcome), "Colour: share of the label's row."),
                Picture(figures.calibration(outcome), "Bins of equal size; classes weighted equally."),
                Picture(figures.scatter(outcome), "Tested slides."),
            ]
            blocks += [drawn, *_examples(outcome, pictures or {})]
        else:
            blocks.append([Picture(figures.recall(outcome), "Bars: 95 % intervals.")])
        sections[f"{result.task}: {outcome.column}" if outcome.column != result.task else result.task] = blocks
    sections["Protocol"] = list(result.protocol)
    sections["Command and versions"] = [Code(command), versions()]
    page(path, f"dreslcl evaluation: {result.task}", sections)


def _headline(outcome: Outcome) -> str:
    """The first probe's first metric, of all features, as a sentence."""
    first = {features: next(iter(probes.items())) for features, probes in outcome.scores.items()}
    probe, score = first["embedding"]
    metric = next(iter(score))
    others = [f"{features} {show(values[metric])}" for features, (_, values) in first.items() if features != "embedding"]
    return f"{outcome.column}, {probe}: {NAMES.get(metric, metric)} {show(score[metric])}; {'; '.join(others)}."


def _examples(outcome: Outcome, pictures: Mapping[str, Path]) -> list[Block]:
    """Of each class, the two surest right predictions and the surest wrong one that have a picture."""
    chosen = []
    p = outcome.probabilities["embedding"]
    for c, name in enumerate(outcome.classes):
        mine = [i for i in np.argsort(-p[:, c]) if outcome.y[i] == c and outcome.ids[i] in pictures]
        right = [i for i in mine if p[i].argmax() == c][:2]
        wrong = [i for i in mine[::-1] if p[i].argmax() != c][:1]
        for i in right + wrong:
            caption = f"{outcome.ids[i]}: {name}, predicted {outcome.classes[int(p[i].argmax())]} (probability of {name} {p[i, c]:.2f})"
            chosen.append(Picture(shrunk(pictures[outcome.ids[i]]), caption))
    return ["Of each class, the two surest right predictions and the surest wrong one:", chosen] if chosen else []
