"""Metrics and their bootstrap intervals, written once, for weights.

A resample of patients is a row of integer weights (R, n) on the predictions, so a thousand resamples cost a few matrix products. Row 0 is
all ones: the value itself. Two models measured with the same weights have a paired difference: subtract, then take the interval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Names = Sequence[str] | Shaped[np.ndarray, "n"]
Weights = Float[np.ndarray, "R n"]
Values = Float[np.ndarray, "R"]
CUTS = (1, 5, 10)
NAMES = {"auroc": "AUROC", "macro_f1": "macro-F1", "balanced_accuracy": "balanced accuracy", "auprc": "AUPRC", "median_rank": "median rank"}


class Interval(NamedTuple):
    """A metric and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def resamples(patients: Names, draws: int, seed: int) -> Weights:
    """Bootstrap weights over patients, R = 1 + draws: row 0 is all ones, the others say how often each prediction's patient was drawn."""
    unique, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(len(unique), size=(draws, len(unique)))
    counts = np.stack([np.ones(len(unique), int), *(np.bincount(row, minlength=len(unique)) for row in drawn)])
    return counts[:, patient].astype(np.float64)


def operating_points(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives (R, U) at each of the U distinct thresholds, from the highest down."""
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.diff(score[order], append=np.nan))  # NaN differs from all: the last one is always an end
    weights, positive = weights[:, order], positive[order]
    true = np.cumsum(weights * positive, axis=1)[:, ends]
    return true, np.cumsum(weights, axis=1)[:, ends] - true


def binary_metrics(positive: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision (AUPRC) per row of weights, each (R,); NaN where a resample holds one class only."""
    true, false = operating_points(positive, score, weights)
    gained = np.diff(true, axis=1, prepend=0)
    lost = np.diff(false, axis=1, prepend=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (lost * (true - gained / 2)).sum(1) / (true[:, -1] * false[:, -1])
        precision = np.where(true + false > 0, true / (true + false), 0)
        return auroc, (gained * precision).sum(1) / true[:, -1]


def confusion(y: Int[np.ndarray, "n"], probability: Float[np.ndarray, "n C"], weights: Weights) -> Float[np.ndarray, "R C C"]:
    """Counts per row of weights: rows are labels, columns the most probable class."""
    classes = probability.shape[1]
    return (weights @ np.eye(classes**2)[y * classes + probability.argmax(1)]).reshape(-1, classes, classes)


def classification_metrics(y: Int[np.ndarray, "n"], probability: Float[np.ndarray, "n C"], weights: Weights) -> dict[str, Values]:
    """AUROC (macro one-vs-rest), macro-F1, balanced accuracy, and AUPRC of class 1 where there are two classes.

    A mean over classes runs over those that occur in the (re)sample; F1 also counts classes that were only predicted. As scikit-learn.
    """
    classes = probability.shape[1]
    pairs = [binary_metrics(y == c, probability[:, c], weights) for c in (range(classes) if classes > 2 else [1])]
    counts = confusion(y, probability, weights)
    hits, labelled, predicted = np.diagonal(counts, axis1=1, axis2=2), counts.sum(2), counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        result = {
            "auroc": _mean_there(np.stack([auroc for auroc, _ in pairs], axis=1)),
            "macro_f1": _mean_there(2 * hits / (labelled + predicted)),
            "balanced_accuracy": _mean_there(hits / labelled),
        }
    return result | ({"auprc": pairs[0][1]} if classes == 2 else {})


def _mean_there(values: Float[np.ndarray, "R C"]) -> Values:
    there = ~np.isnan(values)
    return np.where(there, values, 0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)


def interval(values: Values) -> Interval:
    """The value (row 0) and the 2.5 and 97.5 percentiles of the resamples, those without a value left out."""
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return Interval(float(values[0]), float(low), float(high))


def first_hits(similarity: Float[np.ndarray, "Q G"], hit: Bool[np.ndarray, "Q G"]) -> Int[np.ndarray, "Q"]:
    """Rank (from 1) of each query's best hit in the gallery. Ties count against us, so equal vectors find nothing."""
    best = np.where(hit, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + (~hit & (similarity >= best)).sum(axis=1)


def retrieval_metrics(ranks: Int[np.ndarray, "n"], weights: Weights) -> dict[str, Values]:
    """Share of queries whose first hit is among the first 1, 5, 10; and the median rank."""
    total = weights.sum(1)
    result = {f"recall@{k}": weights @ (ranks <= k) / total for k in CUTS}
    order = np.argsort(ranks, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    middle = [ranks[order][(compare(below, total[:, None] / 2)).argmax(axis=1)] for compare in (np.greater_equal, np.greater)]
    return result | {"median_rank": (middle[0] + middle[1]) / 2}


def retrieval_chance(hit: Bool[np.ndarray, "Q G"]) -> dict[str, float]:
    """What a random order of the gallery would give, in expectation over queries."""
    gallery, hits = hit.shape[1], hit.sum(axis=1)
    miss = {k: [np.prod([max(gallery - h - i, 0) / (gallery - i) for i in range(min(k, gallery))]) for h in hits] for k in CUTS}
    return {f"recall@{k}": 1 - float(np.mean(miss[k])) for k in CUTS} | {"median_rank": float(np.median((gallery + 1) / (hits + 1)))}


def show(score: Interval | None) -> str:
    """A score as text: 0.912 (0.880, 0.941); "" where there is none."""
    if score is None or np.isnan(score.value):
        return ""
    value, low, high = (f"{x:.{3 if abs(score.value) <= 1 else 1}f}" for x in score)
    return value if np.isnan(score.low) else f"{value} ({low}, {high})"
