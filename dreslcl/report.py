"""Pages and figures: report.html of an evaluation and of a pretraining run, and the run's log (metrics.csv, curves.png, TensorBoard)."""

import base64
import platform
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from . import __version__
from .bank import MemoryBank
from .cohort import Cohort, TileReader, draw_tiles
from .common import ConfigError, encoded, preview, write_bytes, write_table, write_text
from .evaluation import CUTS, Interval, Outcome, Result, Task, first_hits, operating_points, resamples

PACKAGES = ("numpy", "scikit-learn", "torch", "open-clip-torch", "tifffile", "imagecodecs")
BAND_DRAWS = 200
COLOURS = colormaps["tab10"].colors
GRID = np.linspace(0, 1, 101)
STYLE = {"embedding": "-", "mean-pool": "--", "compared": ":"}


def _axes(title: str, x: str = "", y: str = "", size: tuple[float, float] = (4.6, 4.2)) -> Axes:
    ax = Figure(figsize=size, layout="constrained").subplots()
    ax.set_title(title, fontsize=11, loc="left")
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _short(name: str, length: int = 22) -> str:
    """A name as matplotlib text: cut, with its special meanings of $ and of a leading _ undone."""
    name = name if len(name) <= length else name[: length - 1] + "…"
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def curve(outcome: Outcome, kind: Literal["roc", "pr"]) -> Figure:
    """ROC or PR curves of the held-out predictions with a 95 % band from resampled patients.

    Two classes: of every feature set, for the positive one; more: of the embedding, for each class.
    """
    roc, classes, y = kind == "roc", outcome.slides.classes, outcome.slides.y
    ax = _axes(*(("ROC", "false positive rate", "true positive rate") if roc else ("Precision and recall", "recall", "precision")))
    weights, dotted = resamples(outcome.slides.patients, BAND_DRAWS, 0), {"linewidth": 0.8, "linestyle": (0, (1, 3))}
    lines = [(name, 1, name) for name in outcome.probabilities if name in STYLE]
    if len(classes) > 2:
        lines = [("embedding", c, _short(name)) for c, name in enumerate(classes[: len(COLOURS)])]
    for colour, (features, c, label) in zip(COLOURS, lines):
        positive = y == c
        if not positive.any() or positive.all():
            continue
        true, false = operating_points(positive, outcome.probabilities[features][:, c], weights)
        keep = (true[:, -1] > 0) & (false[:, -1] > 0)
        rows = [_sampled(t, f, kind) for t, f in zip(true[keep], false[keep])]
        ax.plot(GRID, rows[0], STYLE[features], color=colour, linewidth=1.6, label=label)
        if features == "embedding":
            low, high = np.percentile(rows[1:] or rows, [2.5, 97.5], axis=0)
            ax.fill_between(GRID, low, high, color=colour, alpha=0.15, linewidth=0)
        if not roc:
            ax.axhline(positive.mean(), color=colour if len(classes) > 2 else "0.6", **dotted)
    if roc:
        ax.plot([0, 1], [0, 1], color="0.6", **dotted)
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="lower right" if roc else "lower left")
    return ax.figure


def _sampled(true: np.ndarray, false: np.ndarray, kind: str) -> np.ndarray:
    """One curve at the abscissae of `GRID`."""
    recall = true / true[-1]
    if kind == "roc":
        return np.interp(GRID, np.r_[0, false / false[-1]], np.r_[0, recall])
    at = np.minimum(np.searchsorted(recall, np.maximum(GRID, 1e-9) - 1e-12), len(recall) - 1)  # no precision before the first hit
    return (true / np.maximum(true + false, 1e-12))[at]


def confusion_matrix(outcome: Outcome) -> Figure:
    """Counts, coloured by the share of each label's row."""
    counts = outcome.confusion
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.2, 0.42 * len(counts) + 2)
    ax = _axes("Confusion (held-out predictions)", "predicted", "label", (side + 0.4, side))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ax.spines[:].set_visible(False)
    ticks, turned = [_short(name) for name in outcome.slides.classes], {"rotation": 45, "ha": "right"} if len(counts) > 2 else {}
    ax.set_xticks(range(len(ticks)), ticks, fontsize=8, **turned)
    ax.set_yticks(range(len(ticks)), ticks, fontsize=8)
    for i, j in np.ndindex(*counts.shape):
        ax.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=9, color="white" if share[i, j] > 0.55 else "black")
    return ax.figure


def scatter(outcome: Outcome) -> Figure:
    """The embedding in two dimensions, coloured by label: t-SNE, or PCA for few or very many slides."""
    first = np.unique(outcome.slides.ids, return_index=True)[1]
    vectors, y = outcome.slides.features["embedding"][first], outcome.slides.y[first]
    name = "t-SNE" if 30 <= len(first) <= 3000 else "PCA"
    model = TSNE(perplexity=min(30, len(first) / 4), init="pca", random_state=0) if name == "t-SNE" else PCA(2)
    with threadpool_limits(1):  # with two threads on two busy cores t-SNE waits more than it works
        points = model.fit_transform(vectors) if min(vectors.shape) >= 2 else np.zeros((len(first), 2))
    ax = _axes(f"Slide embeddings, {name}")
    colours = colormaps["tab10" if len(outcome.slides.classes) <= 10 else "tab20"].colors
    for c, label in enumerate(outcome.slides.classes):
        ax.scatter(*points[y == c].T, s=14, color=colours[c % 20], alpha=0.75, linewidths=0, label=_short(label))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return ax.figure


def overview(outcome: Outcome) -> Figure:
    """AUROC of every probe, or recall at 1, 5, 10 in both directions: all features side by side, with intervals and the chance line."""
    metrics = ["auroc"] if outcome.probabilities else [f"recall@{k}" for k in CUTS]
    rows = [(probe, metric) for probe in outcome.scores["embedding"] for metric in metrics]
    names = [probe if outcome.probabilities else f"{probe}, {metric[6:]}" for probe, metric in rows]
    shown = [name for name in (*STYLE, "both") if name in outcome.scores]
    ax = _axes(_short(outcome.slides.column, 60), "AUROC" if outcome.probabilities else "recall", "", (6.4, 1.5 + 0.45 * len(rows)))
    for n, (probe, metric) in enumerate(rows):
        for i, name in enumerate(name for name in shown if probe in outcome.scores[name]):
            score, at = outcome.scores[name][probe][metric], n + 0.22 * (i - (len(shown) - 1) / 2)
            ax.plot([score.low, score.high], [at, at], color=COLOURS[i], linewidth=2.4, alpha=0.5, solid_capstyle="butt")
            ax.plot(score.value, at, "o", color=COLOURS[i], label="" if n else name)
        chance = 0.5 if outcome.probabilities else outcome.scores["chance"][probe][metric].value
        ax.vlines(chance, n - 0.45, n + 0.45, color="0.45", linewidth=1, linestyle=(0, (1, 2)), label="" if n else "chance")
    ax.set_yticks(range(len(rows)), names)
    ax.set(ylim=(len(rows) - 0.4, -0.6), xlim=(None if outcome.probabilities else -0.02, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return ax.figure


@dataclass(frozen=True)
class Table:
    """Cells are text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    lead: bool = False  # whether the first row is the one that counts


@dataclass(frozen=True)
class Picture:
    """What to show, and what is seen on it."""

    shown: Figure | Image.Image | Path
    caption: str = ""

    @property
    def source(self) -> str:
        """The picture as a data URI: a figure as PNG, an image as JPEG, a file (PNG) as it is."""
        data = self.shown.read_bytes() if isinstance(self.shown, Path) else encoded(self.shown)
        kind = "jpeg" if isinstance(self.shown, Image.Image) else "png"
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


Block = str | Table | Picture | list[Picture]


def page(path: Path, title: str, sections: Mapping[str, Sequence[Block]], again: str) -> None:
    """Write one HTML file: sections (heading -> blocks; a list of pictures is a gallery), what to run it `again` with, and versions."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("dreslcl", ""), autoescape=True, undefined=jinja2.StrictUndefined)
    typed = [(heading, [(type(block).__name__, block) for block in blocks]) for heading, blocks in sections.items() if blocks]
    numbered = (f"{name} {metadata.version(name)}" for name in PACKAGES)
    versions = ", ".join([f"Python {platform.python_version()}", f"dreslcl {__version__}", *numbered])
    write_text(path, environment.get_template("report.html").render(title=title, sections=typed, again=again, versions=versions))


# an evaluation


def in_words(outcome: Outcome, task: Task) -> str:
    """The main result as a sentence: what is separated how well, beside what, and whether the difference is told apart from none."""
    slides, scores, words = outcome.slides, outcome.scores, {"compared": "the second embedding", "mean-pool": "mean pooling"}
    if task == "retrieval":
        probe, number = "report → slide", len(slides.ids)
        metric = f"recall@{max(k for k in CUTS if k == 1 or 4 * k <= number)}"
        chance = f"; a random order gives {scores['chance'][probe][metric].value:.2f}"
        said = f"Given a report, its slide is among the first {metric[7:]} of {number} with frequency"
    else:
        probe, metric, chance, number = next(iter(scores["embedding"])), "auroc", "", len(set(slides.ids))
        how = "The slide embedding" if task != "zeroshot" else "The cosine to prompts, without any label,"
        two = f"separates {slides.classes[-1]} from {slides.classes[0]} ({outcome.slides.column})"
        many = f"tells {preview(slides.classes, 4)} apart ({outcome.slides.column}; mean of each class against the rest)"
        said = f"{how} {two if len(slides.classes) == 2 else many} with AUROC"

    def value(score: Interval, sign: str = "") -> str:
        return f"{score.value:{sign}.2f} ({score.low:{sign}.2f} to {score.high:{sign}.2f})"

    said += f" {value(scores['embedding'][probe][metric])}{chance}"
    for features in (name for name in words if name in scores):
        other, difference = scores[features][probe][metric].value, outcome.differences[features][probe][metric]
        verdict = "better" if difference.low > 0 else "worse" if difference.high < 0 else "not told apart"
        said += f"; {words[features]} {other:.2f}, difference {value(difference, '+')}: {verdict} on {number} slides"
    return said + "."


def evaluation_page(result: Result, path: Path, *, command: str, pictures: Mapping[str, Path] | None = None) -> None:
    """Write report.html of an evaluation, with the exact `command` line and, as examples of each class, `pictures` of slides by id."""
    header, rows = result.table()
    pictured = [Picture(overview(outcome), f"{outcome.label}: values and 95 % intervals.") for outcome in result.outcomes]
    sections: dict[str, list[Block]] = {"": [*(in_words(outcome, result.task) for outcome in result.outcomes), pictured]}
    sections["Warnings"] = list(result.warnings)
    for outcome in result.outcomes:
        scores = [row[1:] for row in rows if row[0] == outcome.label]
        blocks: list[Block] = [Table(header[1:], scores, f"{outcome.label}: value and 95 % interval.", lead=True)]
        if outcome.probabilities:
            counted = outcome.counts["classes"].items()
            blocks.append(Table(["class", "slides", "patients", "tested"], [[name, *map(str, n.values())] for name, n in counted]))
            gallery = [(curve(outcome, "roc"), "Band: 95 %, patients resampled."), (curve(outcome, "pr"), "Dotted: share of the class.")]
            gallery += [(confusion_matrix(outcome), "Colour: share of the label's row."), (scatter(outcome), "Tested slides.")]
            blocks += [[Picture(*pair) for pair in gallery], *_examples(outcome, pictures or {})]
        sections[f"{result.task}: {outcome.slides.column}" if outcome.slides.column != result.task else result.task] = blocks
    page(path, f"dreslcl evaluation: {result.task}", sections | {"Protocol": list(result.protocol)}, command)


def _examples(outcome: Outcome, pictures: Mapping[str, Path]) -> list[Block]:
    """Of each class, the two surest right predictions and the surest wrong one that have a picture."""
    chosen, p, s = [], outcome.probabilities["embedding"], outcome.slides
    for c, name in enumerate(s.classes):
        mine = [i for i in np.argsort(-p[:, c]) if s.y[i] == c and s.ids[i] in pictures]
        for i in [i for i in mine if p[i].argmax() == c][:2] + [i for i in mine[::-1] if p[i].argmax() != c][:1]:
            with Image.open(pictures[s.ids[i]]) as image:
                small = image.convert("RGB")
            small.thumbnail((620, 1240))
            caption = f"{s.ids[i]}: {name}, predicted {s.classes[p[i].argmax()]} (probability of {name} {p[i, c]:.2f})"
            chosen.append(Picture(small, caption))
    return ["Of each class, the two surest right predictions and the surest wrong one:", chosen] if chosen else []


# a run


ATLAS_ROWS = 20_000
ATLAS_TILES = 6
GAP = ((0, 0), (0, 4), (0, 0))  # px right of a tile
EXAMPLES = 6

Row = Mapping[str, float | int]


def curves(rows: Sequence[Row], path: Path) -> None:
    """Draw every quantity of a run over its epochs, as PNG: a small panel for those with the same part before a slash or an @."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("epoch", "step")):
        groups[re.split("[/@]", name)[0]].append(name)
    across = min(4, len(groups))
    down = -(-len(groups) // across)
    figure = Figure(figsize=(3.4 * across, 2.5 * down), layout="tight")
    for place, (group, names) in enumerate(groups.items(), 1):
        ax = figure.add_subplot(down, across, place)
        for name in names:
            points = [(row["epoch"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
            ax.plot(*np.reshape(points, (-1, 2)).T, marker="o" if len(points) < 30 else "", markersize=3, linewidth=1.3, label=name)
        ax.set_title(group, fontsize=10, loc="left")
        ax.set_xlabel("epoch" * (place == 1), fontsize=8)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        if len(names) > 1:
            ax.legend(fontsize=7, frameon=False)
    write_bytes(path, encoded(figure))


class Journal:
    """The log of one run, on the rank that writes, from the first epoch's end. Raises ConfigError: TensorBoard is not installed."""

    def __init__(self, out: Path, tensorboard: bool = False):
        if tensorboard and not find_spec("tensorboard"):
            raise ConfigError("--tensorboard needs the package tensorboard: pip install 'dreslcl[tensorboard]'")
        self.out, self.tensorboard, self.drawn, self.events = out, tensorboard, time.monotonic(), None

    def write(self, rows: Sequence[Row], *, picture: bool) -> None:
        """All rows to metrics.csv, the last one to TensorBoard; curves.png costs a second: every half minute, and with `picture`."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_table(self.out / "metrics.csv", columns, [[row.get(c, "") for c in columns] for row in rows])
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            if self.events is None:  # what a killed run logged after the checkpoint that this one went on from is void
                self.events = SummaryWriter(str(self.out), purge_step=int(rows[-2]["step"]) + 1 if len(rows) > 1 else 0)
            for name in rows[-1].keys() - {"step"}:
                self.events.add_scalar(name, rows[-1][name], int(rows[-1]["step"]))
            self.events.flush()
        if picture or time.monotonic() - self.drawn > 30:
            curves(rows, self.out / "curves.png")
            self.drawn = time.monotonic()


def time_spent(row: Row) -> str:
    """Where an epoch's time went: the steps, nearly all of it the encoder, or waiting for pixels; the threads that read, beside both."""
    said = {"encoder": "encoder {:.0%}", "waiting": "waiting for tiles {:.0%}", "reading": "reading kept its threads busy {:.0%}"}
    return "".join(f", {text.format(row[f'time/{what}'])}" for what, text in said.items() if f"time/{what}" in row)


def codebook_atlas(
    bank: MemoryBank, words: Float[np.ndarray, "K D"], cohort: Cohort, members: Sequence[int], reader: TileReader, *, seed: int
) -> list[Picture]:
    """For each codeword, the most used first, a strip of the tiles nearest to it, each of another slide where there are enough.

    Looks at up to ATLAS_ROWS rows, as many of each of the slides `members`.
    """
    rng, found = np.random.default_rng(seed), []
    for m in members:
        tiles = draw_tiles(cohort.members[m].tiles, max(1, ATLAS_ROWS // len(members)), rng)
        rows, codes = bank.read(cohort.members[m].slide_id, tiles)
        found.append((codes, ((rows.astype(np.float32) - words[codes]) ** 2).sum(1), np.full(len(tiles), m), tiles))
    code, distance, member, tile = map(np.concatenate, zip(*found))
    counts, pictures = np.bincount(code, minlength=len(words)), []
    for k in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        own = np.flatnonzero(code == k)
        own = own[np.argsort(distance[own])]
        first = np.sort(np.unique(member[own], return_index=True)[1])  # each slide's nearest before any slide's second
        nearest = np.r_[own[first], np.delete(own, first)][:ATLAS_TILES]
        shown = [np.pad(reader.read(int(member[i]), tile[[i]])[0], GAP, constant_values=255) for i in nearest]
        shown += [np.full_like(shown[0], 255)] * (ATLAS_TILES - len(shown))  # strips of one length: pages scale them alike
        strip = np.concatenate(shown, axis=1)
        picture = Image.fromarray(strip).resize((round(96 * strip.shape[1] / strip.shape[0]), 96))
        pictures.append(Picture(picture, f"codeword {k}: {counts[k] / counts.sum():.1%} of the tiles"))
    return pictures


def retrieval_examples(cohort: Cohort, z: Float[np.ndarray, "S E"], u: Float[np.ndarray, "S E"]) -> Table:
    """Report → slide among a cohort's slides: examples spread evenly from the best rank to the worst."""
    members, similar = cohort.members, u @ z.T
    number = np.array([m.report for m in members])
    ranks = first_hits(similar, number[:, None] == number)
    rows = []
    for i in np.argsort(ranks, kind="stable")[np.linspace(0, len(members) - 1, min(EXAMPLES, len(members))).astype(int)]:
        report, first = cohort.reports[members[i].report], members[int(similar[i].argmax())]
        text = (report[:100] + "…" * (len(report) > 100)) if isinstance(report, str) else "(a vector)"
        rows.append([members[i].slide_id, f"{ranks[i]:.0f} of {len(members)}", first.slide_id, text])
    return Table(["report of", "rank of its slide", "ranked first", "report begins"], rows, f"Median rank {np.median(ranks):g}.")


def health(rows: Sequence[Row]) -> list[str]:
    """Whether a run went well, from the rows of metrics.csv, in sentences; with what to do where it did not."""

    def mean(name: str, *part: int | None) -> float:
        return float(np.mean([float(row.get(name, "nan")) for row in rows[slice(*part)]] or [np.nan]))

    tenth, last, best = max(1, len(rows) // 10), (-1, None), max(float(row.get("held_out_mrr", 0)) for row in rows) or np.nan
    falling = mean("loss", -tenth, None) / mean("loss", -2 * tenth, -tenth)
    checks = (  # a number, its limit, what it means below (an unknown one is not below), and what to do
        (falling, 0.97, "the loss still falls, in a tenth of the run to", "more --epochs"),
        (mean("row_cosine", *last), 0.7, "bank rows are out of date, row_cosine", "a lower --encoder-lr, or more --tiles"),
        (mean("codeword_use", *last), 0.25, "few codewords hold most of the tiles, codeword_use", "fewer --codewords"),
        (mean("effective_rank", *last), 4, "slide vectors lie along few directions, effective_rank", "a lower --lr"),
        (mean("held_out_mrr", *last) / best, 0.8, "retrieval fell since its best epoch, which was kept, to", "fewer --epochs"),
    )
    bad = [f"Look at this: {said} {value:.2f}. Try {todo}." for value, limit, said, todo in checks if value < limit]
    return bad or ["What was measured of loss, drift, codewords, spread of slide vectors and held-out retrieval looks well."]


def run_page(out: Path, *, notes: Sequence[str], rows: Sequence[Row], atlas: Sequence[Picture], examples: Sequence[Block]) -> None:
    """Write RUN/report.html: `notes` on what went in, `rows` of metrics.csv, the settings; no `atlas` where there are no pixels."""
    last = rows[-1]
    shown = {"loss": "loss", "batch_recall@1": "recall@1 within a batch", "held_out_recall@10": "held-out recall@10"}
    shown |= {"row_cosine": "cosine of an old bank row to its fresh feature (1: no drift)", "row_age": "steps since a row was written"}
    headline = ", ".join(f"{name} {last[key]:.3g}" for key, name in shown.items() if key in last)
    sections: dict[str, Sequence[Block]] = {
        "": [f"After epoch {last['epoch']:.0f} ({last['step']:.0f} steps): {headline}{time_spent(last)}.", *health(rows)],
        "What went in": list(notes),
        "Curves": [Picture(out / "curves.png")],
        "Codebook": ["The tiles nearest to each codeword, from different slides where there are enough.", list(atlas)] if atlas else [],
        "Retrieval": examples,
    }
    page(out / "report.html", "dreslcl pretraining", sections, (out / "config.toml").read_text(encoding="utf-8"))
