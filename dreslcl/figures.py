"""The pictures of an evaluation, as PNG bytes. Drawn on Figure itself, so that no backend and no global state is touched."""

import io
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from .evaluation import Outcome
from .metrics import CUTS, operating_points, resamples

BAND_DRAWS = 200
MAX_CURVES = 10
GRID = np.linspace(0, 1, 101)
STYLE = {"embedding": "-", "mean-pool": "--", "compared": ":"}


def _axes(title: str, x: str = "", y: str = "", size: tuple[float, float] = (4.6, 4.2)) -> Axes:
    ax = Figure(figsize=size, layout="constrained").subplots()
    ax.set_title(title, fontsize=11, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _png(ax: Axes) -> bytes:
    buffer = io.BytesIO()
    ax.figure.savefig(buffer, format="png", dpi=140)
    return buffer.getvalue()


def _colours(count: int) -> list:
    return list(colormaps["tab10" if count <= 10 else "tab20"].colors)


def _short(name: str) -> str:
    """A class name as matplotlib text: cut, with its special meanings of $ and of a leading _ undone."""
    name = name if len(name) <= 22 else name[:21] + "…"
    return (" " * name.startswith("_") + name).replace("$", r"\$")


def _lines(outcome: Outcome) -> list[tuple[str, int, str]]:
    """The curves to draw: features, class, label. Two classes: every feature set, positive class; more: the embedding, each class."""
    if len(outcome.classes) == 2:
        return [(name, 1, name) for name in outcome.probabilities if name in STYLE]
    return [("embedding", c, _short(name)) for c, name in enumerate(outcome.classes[:MAX_CURVES])]


def curve(outcome: Outcome, kind: Literal["roc", "pr"]) -> bytes:
    """ROC or PR curves of the held-out predictions with a 95 % band from resampled patients."""
    ax = (
        _axes("ROC", "false positive rate", "true positive rate") if kind == "roc" else _axes("Precision and recall", "recall", "precision")
    )
    weights = resamples(outcome.patients, BAND_DRAWS, 0)
    for i, (features, c, label) in enumerate(_lines(outcome)):
        positive = outcome.y == c
        if not positive.any() or positive.all():
            continue
        true, false = operating_points(positive, outcome.probabilities[features][:, c], weights)
        keep = (true[:, -1] > 0) & (false[:, -1] > 0)
        rows = [_sampled(t, f, kind) for t, f in zip(true[keep], false[keep])]
        low, high = np.percentile(rows[1:], [2.5, 97.5], axis=0) if len(rows) > 1 else (rows[0], rows[0])
        colour = _colours(MAX_CURVES)[i]
        ax.plot(GRID, rows[0], STYLE[features], color=colour, linewidth=1.6, label=label)
        if features == "embedding":
            ax.fill_between(GRID, low, high, color=colour, alpha=0.15, linewidth=0)
        if kind == "pr":
            ax.axhline(positive.mean(), color=colour if len(outcome.classes) > 2 else "0.6", linewidth=0.8, linestyle=(0, (1, 3)))
    if kind == "roc":
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=(0, (1, 3)))
    ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
    ax.legend(frameon=False, fontsize=8, loc="lower right" if kind == "roc" else "lower left")
    return _png(ax)


def _sampled(true: np.ndarray, false: np.ndarray, kind: str) -> np.ndarray:
    """One curve at the abscissae of `GRID`."""
    recall = true / true[-1]
    if kind == "roc":
        return np.interp(GRID, np.r_[0, false / false[-1]], np.r_[0, recall])
    at = np.minimum(np.searchsorted(recall, np.maximum(GRID, 1e-9) - 1e-12), len(recall) - 1)  # no precision before the first hit
    return (true / np.maximum(true + false, 1e-12))[at]


def confusion_matrix(outcome: Outcome) -> bytes:
    """Counts, coloured by the share of each label's row."""
    counts = outcome.confusion
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.2, 0.42 * len(counts) + 2)
    ax = _axes("Confusion (held-out predictions)", "predicted", "label", (side + 0.4, side))
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ax.spines[:].set_visible(False)
    ticks = [_short(name) for name in outcome.classes]
    ax.set_xticks(range(len(ticks)), ticks, rotation=45 if len(ticks) > 2 else 0, ha="right" if len(ticks) > 2 else "center", fontsize=8)
    ax.set_yticks(range(len(ticks)), ticks, fontsize=8)
    for i, j in np.ndindex(*counts.shape):
        ax.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=9, color="white" if share[i, j] > 0.55 else "black")
    return _png(ax)


def calibration(outcome: Outcome) -> bytes:
    """Observed share against mean probability in bins of equal size; classes count equally, as in the probe's fit."""
    ax = _axes("Calibration", "mean probability", "observed share")
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=(0, (1, 3)))
    balance = 1 / np.bincount(outcome.y, minlength=len(outcome.classes))[outcome.y]
    draws = resamples(outcome.patients, BAND_DRAWS, 0) * balance
    for i, (features, c, label) in enumerate(_lines(outcome)):
        p = outcome.probabilities[features][:, c]
        bins = np.array_split(np.argsort(p), min(8, max(2, len(p) // 10)))
        with np.errstate(invalid="ignore", divide="ignore"):
            observed = np.stack([(draws[:, b] * (outcome.y[b] == c)).sum(1) / draws[:, b].sum(1) for b in bins], axis=1)
        mean = [np.average(p[b], weights=balance[b]) for b in bins]
        ax.plot(mean, observed[0], STYLE[features], marker="o", markersize=4, linewidth=1.2, color=_colours(MAX_CURVES)[i], label=label)
        if features == "embedding" and len(outcome.classes) == 2:
            ax.vlines(mean, *np.nanpercentile(observed[1:], [2.5, 97.5], axis=0), color=_colours(MAX_CURVES)[i], alpha=0.4)
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.legend(frameon=False, fontsize=8)
    return _png(ax)


def scatter(outcome: Outcome) -> bytes:
    """The embedding in two dimensions, coloured by label: t-SNE, or PCA for few or very many slides."""
    first = np.unique(outcome.ids, return_index=True)[1]
    vectors, y = outcome.vectors[first], outcome.y[first]
    name = "t-SNE" if 30 <= len(first) <= 3000 else "PCA"
    model = TSNE(perplexity=min(30, len(first) / 4), init="pca", random_state=0) if name == "t-SNE" else PCA(2)
    with threadpool_limits(1):  # with two threads on two busy cores t-SNE waits more than it works
        points = model.fit_transform(vectors) if min(vectors.shape) >= 2 else np.zeros((len(first), 2))
    ax = _axes(f"Slide embeddings, {name}")
    for c, label in enumerate(outcome.classes):
        ax.scatter(*points[y == c].T, s=14, color=_colours(len(outcome.classes))[c % 20], alpha=0.75, linewidths=0, label=_short(label))
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)
    return _png(ax)


def recall(outcome: Outcome) -> bytes:
    """Recall at 1, 5, 10 in both directions, with intervals and the chance line."""
    ax = _axes("", "", "recall", (6.0, 4.0))
    for i, (direction, score) in enumerate(outcome.scores["embedding"].items()):
        bars = [score[f"recall@{k}"] for k in CUTS]
        x = np.arange(len(CUTS)) + 0.4 * i
        value = np.array([bar.value for bar in bars])
        errors = np.abs(np.array([[bar.low, bar.high] for bar in bars]).T - value)
        ax.bar(x, value, 0.36, yerr=errors, color=_colours(2)[i], alpha=0.8, label=direction, error_kw={"elinewidth": 1})
        chance = [outcome.scores["chance"][direction][f"recall@{k}"].value for k in CUTS]
        ax.hlines(chance, x - 0.18, x + 0.18, color="black", linewidth=1.5, label="chance" if i == 0 else None)
    ax.set_xticks(np.arange(len(CUTS)) + 0.2, [f"@{k}" for k in CUTS])
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return _png(ax)
