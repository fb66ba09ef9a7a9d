"""Tasks, folds and probes: what slide embeddings are worth on labels.

Folds are grouped by patient, every choice (standardisation, C) is made inside the training part, and a metric is computed once over all
held-out predictions, with an interval from resampling patients (`metrics.py`). All features that stand side by side (two embeddings, the
mean-pool baseline) share slides, folds and resamples, so their differences are paired. Nothing here needs torch.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from threadpoolctl import threadpool_limits

from .common import TableError, read_table, write_json, write_table
from .config import EvalConfig
from .formats import Embeddings, read_reports, unit
from .labels import (
    UNLABELLED,
    Fold,
    Names,
    Rows,
    Slides,
    encode,
    leak_scan,
    leave_out_seen,
    make_folds,
    patient_folds,
    seen_reports,
    select,
    some,
    split_table,
)

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


Task = Literal["subtype", "recognition", "mutation", "retrieval", "zeroshot"]
Matrix = Float[np.ndarray, "n C"]
Scores = dict[str, dict[str, dict[str, Interval]]]  # features -> probe -> metric
Inner = list[tuple[np.ndarray, np.ndarray]]  # (train, validation) positions
TextVectors = Mapping[str, np.ndarray] | np.ndarray | None

C_GRID = tuple(10.0**power for power in range(-5, 3))
TEMPERATURE = 0.07  # of the softmax that turns cosines into probabilities; CLIP's at the start of training


@dataclass(frozen=True)
class Outcome:
    """One label column, or one retrieval. n counts held-out predictions, not slides: fixed splits may test a slide more than once."""

    column: str
    counts: dict[str, Any]
    scores: Scores
    differences: Scores
    """The embedding minus these features, paired."""
    ids: tuple[str, ...] = ()
    patients: tuple[str, ...] = ()
    fold: Int[np.ndarray, "n"] = field(default_factory=lambda: np.empty(0, int))
    classes: tuple[str, ...] = ()
    y: Int[np.ndarray, "n"] = field(default_factory=lambda: np.empty(0, int))
    vectors: Float[np.ndarray, "n E"] = field(default_factory=lambda: np.empty((0, 0)))
    probabilities: dict[str, Matrix] = field(default_factory=dict)
    """features -> held-out probabilities of the first probe."""
    rankings: list[list[Any]] = field(default_factory=list)
    """Retrieval: direction, query, its patient, rank of the first hit, what ranked first."""

    @property
    def confusion(self) -> Int[np.ndarray, "C C"]:
        """Rows are labels, columns predictions."""
        return confusion(self.y, self.probabilities["embedding"], np.ones((1, len(self.y))))[0].astype(int)


@dataclass(frozen=True)
class Result:
    """What `evaluate` found: `save` writes it, `report.evaluation_page` draws it."""

    task: str
    protocol: list[str]
    """Sentences."""
    outcomes: list[Outcome]
    warnings: list[str]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, one row per label column, features and probe."""
        names = list(dict.fromkeys(m for o in self.outcomes for probes in o.scores.values() for s in probes.values() for m in s))
        rows = []
        for o in self.outcomes:
            for features, probes in o.scores.items():
                rows += [[o.column, features, probe, *(show(score.get(name)) for name in names)] for probe, score in probes.items()]
            for features, probes in o.differences.items():
                probe = next(iter(probes))
                rows.append([o.column, f"embedding − {features}", probe, *(show(probes[probe].get(name)) for name in names)])
        return ["label", "features", "probe", *(NAMES.get(name, name) for name in names)], rows

    def save(self, out: Path) -> None:
        """Write `metrics.json` and `predictions.csv` into a folder."""
        results = {}
        for o in self.outcomes:
            results[o.column] = {"counts": o.counts, "scores": _plain(o.scores), "differences": _plain(o.differences)}
            results[o.column] |= {"classes": list(o.classes), "confusion": o.confusion.tolist()} if o.classes else {}
        names = list(dict.fromkeys(name for o in self.outcomes for name in o.classes))
        columns = ["column", "slide_id", "patient_id", "fold", "label", "prediction", *(f"p_{name}" for name in names)]
        rows: list[list[Any]] = []
        for o in self.outcomes:
            for slide, patient, fold, y, p in zip(o.ids, o.patients, o.fold, o.y, o.probabilities.get("embedding", ())):
                chance = dict(zip(o.classes, p))
                row = [o.column, slide, patient, int(fold), o.classes[y], o.classes[int(p.argmax())]]
                rows.append(row + [f"{chance[name]:.6f}" if name in chance else "" for name in names])
        if self.task == "retrieval":
            columns, rows = ["direction", "query", "patient_id", "rank", "first"], [row for o in self.outcomes for row in o.rankings]
        write_table(Path(out) / "predictions.csv", columns, rows)
        everything = {"task": self.task, "protocol": self.protocol, "results": results, "warnings": self.warnings}
        write_json(Path(out) / "metrics.json", {"version": 1, **everything})


def _plain(value: Any) -> Any:
    """JSON-able copy: intervals become dictionaries, NaN becomes null."""
    if isinstance(value, Interval):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if np.isnan(value) else round(float(value), 6)


def linear_probe(x: np.ndarray, y: np.ndarray, inner: Inner, x_test: np.ndarray, classes: int) -> Matrix:
    """Class probabilities of `fit_probe`."""
    return _spread(fit_probe(x, y, inner, classes), x_test, classes)


def fit_probe(x: np.ndarray, y: np.ndarray, inner: Inner, classes: int) -> Pipeline:
    """Logistic regression (lbfgs, classes weighted equally) on standardised features.

    C is the one of `C_GRID` with the least class-balanced log loss over the `inner` (train, validation) splits of x; 1 without any.
    """
    x = x.astype(np.float64)  # in float32 the line search of lbfgs can fail
    loss = np.zeros(len(C_GRID))
    for train, held in inner:
        if len(set(y[train])) < 2 or not len(held):
            continue
        scaler = StandardScaler().fit(x[train])
        a, b, weight = scaler.transform(x[train]), scaler.transform(x[held]), compute_sample_weight("balanced", y[held])
        model = _logistic()
        for i, strength in enumerate(C_GRID):  # rising: each fit starts from the one before
            model.set_params(C=strength).fit(a, y[train])
            p = np.clip(_spread(model, b, classes)[np.arange(len(held)), y[held]], 1e-12, None)
            loss[i] -= (weight * np.log(p)).sum()
    best = C_GRID[int(loss.argmin())] if loss.any() else 1.0
    return make_pipeline(StandardScaler(), _logistic().set_params(C=best)).fit(x, y)


def inner_folds(y: np.ndarray, patients: np.ndarray, config: EvalConfig) -> Inner:
    """Folds by patient that choose the linear probe's C; none where a class has a single patient."""
    count = min(config.inner_folds, *(len(set(patients[y == c])) for c in set(y)))
    return [(f.train, f.test) for f in patient_folds(y, patients, count, config.seed)] if count > 1 else []


def _logistic() -> LogisticRegression:
    return LogisticRegression(solver="lbfgs", class_weight="balanced", max_iter=2000, warm_start=True)


def _spread(model: Any, x: np.ndarray, classes: int) -> Matrix:
    """A fitted classifier's probabilities over all classes, zero for those it never saw."""
    result = np.zeros((len(x), classes))
    result[:, model.classes_] = model.predict_proba(x)
    return result


def neighbour_probe(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, classes: int, k: int) -> Matrix:
    """Share of each class among the k nearest training slides by cosine."""
    return _spread(KNeighborsClassifier(min(k, len(x)), metric="cosine").fit(x, y), x_test, classes)


def few_shot_probe(x: np.ndarray, y: np.ndarray, groups: np.ndarray, x_test: np.ndarray, classes: int, shots: int, seed: int) -> Matrix:
    """Nearest class mean of one slide each of `shots` random patients per class (SimpleShot; Wang et al. 2019, arXiv 1911.04623).

    Features are centred on the mean of the whole training part, which needs no labels.
    """
    rng, centre = np.random.default_rng(seed), x.mean(0)
    prototypes = []
    for c in range(classes):
        members = rng.permutation(np.flatnonzero(y == c))
        first = np.unique(groups[members], return_index=True)[1]  # one random slide of each patient
        prototypes.append(unit(x[members[rng.permutation(first)[:shots]]] - centre).mean(0))
    return _softmax(unit(x_test - centre) @ unit(np.stack(prototypes)).T)


def _softmax(cosine: np.ndarray) -> Matrix:
    e = np.exp((cosine - cosine.max(1, keepdims=True)).astype(np.float64) / TEMPERATURE)
    return e / e.sum(1, keepdims=True)


@threadpool_limits.wrap(limits=1, user_api="blas")  # lbfgs steps are tiny: a second thread made them five times slower
def evaluate(
    embeddings: Embeddings,
    labels: Rows | Path,
    *,
    task: Task,
    columns: Sequence[str] = (),
    config: EvalConfig = EvalConfig(),  # noqa: B008 (frozen)
    positive: str | None = None,
    split_column: str | None = None,
    splits: Path | None = None,
    compare: Embeddings | None = None,
    include_seen: bool = False,
    reports: Rows | Path | None = None,
    text: TextVectors = None,
    compare_text: TextVectors = None,
) -> Result:
    """Measure slide embeddings on labels.

    Args:
        labels: rows with slide_id or patient_id and the label columns; for retrieval the reports' rows, with a column `report`.
        columns: label columns, default: the task's name (zeroshot: subtype, retrieval: report); mutation takes one or several genes.
        positive: the positive class of a column, set against all others.
        split_column: column of `labels` with train, val, test. splits: a table (Patho-Bench's k=all.tsv) with columns fold_0, fold_1 ...
        compare: a second embedding; slides that only one of the two has are left out.
        include_seen: test also on slides of patients that pretraining saw.
        reports: the reports that pretraining used, for the leak scan.
        text: for zeroshot class -> vectors of its prompts (P, E) or their mean (E,); for retrieval the vector of each row of `labels`
            (rows, E). compare_text: the same from the model of `compare`.

    Raises:
        TableError: labels, splits or ids do not allow the evaluation asked for; the message says why.
    """
    where = labels.name if isinstance(labels, Path) else "labels"
    rows = read_table(labels) if isinstance(labels, Path) else labels
    columns = list(columns) or [{"zeroshot": "subtype", "retrieval": "report"}.get(task, task)]
    there = list(rows[0]) if rows else []
    for column in [*columns, *([split_column] if split_column else [])]:
        if column not in there:
            raise TableError(f"{where}: no column {column!r}; there are {', '.join(there) or 'no rows'}")
    texts = {"embedding": text} | ({} if compare is None else {"compared": compare_text})
    if task in ("zeroshot", "retrieval") and any(vectors is None for vectors in texts.values()):
        raise TableError(f"{task}: each embedding needs text vectors, from the text tower of the model that made it")
    slides, warnings = select(embeddings, compare, rows, [*columns, *([split_column] if split_column else [])], where)
    if splits is not None:
        slides.parts.update(split_table(splits, slides))
    elif split_column:
        slides.parts[split_column] = [row[split_column] for row in slides.rows]
    scanned = ["No leak scan: the reports that pretraining used were not given (--reports)."] if task != "retrieval" else []
    if reports is not None and task != "retrieval":  # there the report is the label
        read = seen_reports(read_reports(reports) if isinstance(reports, Path) else reports, embeddings)
        names = [c for c in columns if task == "mutation"] + sorted({row[c] for c in columns for row in rows})
        leaks = leak_scan(read, names)
        scanned = [f"Leak scan: {len(leaks)} of the classes' names stand in the {len(read)} reports that pretraining used."]
        warnings += leaks
    plan = _Plan(task, config, positive, include_seen, texts, warnings)
    outcomes = [(_retrieval if task == "retrieval" else _classification)(slides, column, plan) for column in columns]
    return Result(task, _protocol(plan, list(slides.parts), outcomes) + scanned, outcomes, list(dict.fromkeys(warnings)))


@dataclass(frozen=True)
class _Plan:
    """What `evaluate` was asked, and the warnings gathered on the way."""

    task: Task
    config: EvalConfig
    positive: str | None
    include_seen: bool
    texts: dict[str, TextVectors]
    warnings: list[str]


def _classification(slides: Slides, column: str, plan: _Plan) -> Outcome:
    config, warnings = plan.config, plan.warnings
    values = [row[column] for row in slides.rows]
    known = np.array([i for i, value in enumerate(values) if value.lower() not in UNLABELLED], int)
    unlabelled, slides = len(values) - len(known), slides.keep(known)
    y, names = encode([values[i] for i in known], column, plan.positive, binary=plan.task in ("recognition", "mutation"))
    folds = make_folds(slides, column, y, names, config, probing=plan.task != "zeroshot")
    folds, seen = leave_out_seen(folds, slides, plan.include_seen, column, warnings)
    rows = np.concatenate([fold.test for fold in folds])
    absent = [name for c, name in enumerate(names) if c not in y[rows]]
    if len(names) - len(absent) < 2:
        raise TableError(f"{column}: the {len(rows)} slides to test are all of class {names[y[rows[0]]]!r}; two classes are needed")
    if absent:
        warnings.append(f"{column}: no slide to test is of class {some(absent)}")

    if plan.task == "zeroshot":
        predictions = {f: {"zero-shot": [zero_shot(slides.features[f][rows], text, names, column)]} for f, text in plan.texts.items()}
        trained = y
    else:
        shots = _shots(y, slides.patients, folds, names, column, plan)
        predictions = {f: _probe(x, y, slides.patients, folds, len(names), shots, config) for f, x in slides.features.items()}
        trained = y[np.concatenate([np.r_[fold.train, fold.val] for fold in folds])]
    majority = np.eye(len(names))[np.bincount(trained).argmax()]
    first = next(iter(predictions["embedding"]))
    predictions["majority class"] = {first: [np.tile(majority, (len(rows), 1))]}

    weights = resamples(slides.patients[rows], config.bootstrap, config.seed)
    drawn = {
        name: {probe: _mean([classification_metrics(y[rows], p, weights) for p in draws]) for probe, draws in probes.items()}
        for name, probes in predictions.items()
    }
    counts = {"slides": len(y), "patients": len(set(slides.patients)), "unlabelled": unlabelled, "seen_left_out": seen, "classes": {}}
    for c, name in enumerate(names):
        tested = len(set(rows[y[rows] == c]))
        counts["classes"][name] = {"slides": int((y == c).sum()), "patients": len(set(slides.patients[y == c])), "tested": tested}
    return Outcome(
        column, counts, *_intervals(drawn), tuple(slides.ids[rows].tolist()), tuple(slides.patients[rows].tolist()),
        np.repeat(np.arange(len(folds)), [len(fold.test) for fold in folds]), names, y[rows], slides.features["embedding"][rows],
        {name: probes[first][0] for name, probes in predictions.items() if first in probes},
    )  # fmt: skip


def _shots(y: np.ndarray, patients: np.ndarray, folds: list[Fold], names: Sequence[str], column: str, plan: _Plan) -> list[int]:
    """The few-shot sizes that every training part has patients for; refuses a training part that nothing can be learnt from."""
    least, short = min((len(set(patients[fit][y[fit] == c])), name) for fit in map(_fit, folds) for c, name in enumerate(names))
    if any(len(set(y[_fit(fold)])) < 2 for fold in folds):
        raise TableError(f"{column}: a training part holds fewer than two classes; change the split")
    plan.warnings.extend(
        f"{column}: {n} shots are left out: a training part has {least} patients of class {short!r}" for n in plan.config.shots if n > least
    )
    return [n for n in plan.config.shots if n <= least]


def _fit(fold: Fold) -> np.ndarray:
    return np.r_[fold.train, fold.val]


def _probe(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, folds: list[Fold], classes: int, shots: list[int], config: EvalConfig
) -> dict[str, list[Matrix]]:
    """Every probe's held-out probabilities, folds one after the other; the few-shot probes have one matrix per draw."""
    of_folds: list[dict[str, list[Matrix]]] = []
    for fold in folds:
        a, b, groups, test = x[_fit(fold)], y[_fit(fold)], patients[_fit(fold)], x[fold.test]
        given = [(np.arange(len(fold.train)), np.arange(len(fold.train), len(b)))] if len(fold.val) else []
        inner = given or inner_folds(b, groups, config)
        result = {"linear": [linear_probe(a, b, inner, test, classes)]}
        result[f"{config.neighbours}-NN"] = [neighbour_probe(a, b, test, classes, config.neighbours)]
        for n in shots:
            result[f"{n}-shot"] = [few_shot_probe(a, b, groups, test, classes, n, config.seed + draw) for draw in range(config.draws)]
        of_folds.append(result)
    return {probe: [np.concatenate(draws) for draws in zip(*(result[probe] for result in of_folds))] for probe in of_folds[0]}


def zero_shot(vectors: np.ndarray, prompts: Mapping[str, np.ndarray], names: Sequence[str], column: str) -> Matrix:
    """Softmax over classes of the cosine between each slide and the class's mean prompt vector. Nothing is fitted.

    Raises:
        TableError: a class without a prompt.
    """
    missing = [name for name in names if name not in prompts]
    if missing:
        raise TableError(f"{column}: no prompt for class {some(missing)}; the prompts have {some(list(prompts), 20)}")
    means = [unit(np.atleast_2d(prompts[name])).mean(0) for name in names]
    return _softmax(unit(vectors) @ unit(np.stack(means)).T)


def _retrieval(slides: Slides, column: str, plan: _Plan) -> Outcome:
    """Rank reports for each slide and slides for each report.

    The reports are the distinct texts. A slide's hits are all texts of its patient, a text's hits all slides of the patients that have it:
    another slide of the same patient, or another patient's report with the same words, is not a mistake.
    """
    slides = slides.keep(np.array([i for i, row in enumerate(slides.rows) if row[column]], int))
    folds = make_folds(slides, column, np.zeros(len(slides.ids), int), (), plan.config, probing=False)
    folds, seen = leave_out_seen(folds, slides, plan.include_seen, column, plan.warnings)
    slides = slides.keep(np.unique(np.concatenate([fold.test for fold in folds])))
    reports, first, text = np.unique([row[column] for row in slides.rows], return_index=True, return_inverse=True)
    people, patient = np.unique(slides.patients, return_inverse=True)
    has = np.zeros((len(people), len(reports)), bool)
    has[patient, text] = True
    hit = has[patient]
    queries = {"slide → report": (slides.ids, slides.patients), "report → slide": (slides.ids[first], slides.patients[first])}
    drawn: dict[str, dict[str, Any]] = defaultdict(dict)
    rankings: list[list[Any]] = []
    for name, vectors in plan.texts.items():
        similarity = unit(slides.features[name]) @ unit(np.asarray(vectors)[slides.row_index[first]]).T
        for (direction, (ids, owners)), sim, hits in zip(queries.items(), (similarity, similarity.T), (hit, hit.T)):
            ranks = first_hits(sim, hits)
            drawn[name][direction] = retrieval_metrics(ranks, resamples(owners, plan.config.bootstrap, plan.config.seed))
            if name == "embedding":
                best = queries["report → slide" if direction == "slide → report" else "slide → report"][0][sim.argmax(1)]
                rankings += [[direction, *row] for row in zip(ids.tolist(), owners.tolist(), ranks.tolist(), best.tolist())]
    scores, differences = _intervals(drawn)
    scores["chance"] = {}
    for direction, hits in zip(queries, (hit, hit.T)):
        scores["chance"][direction] = {name: Interval(value, np.nan, np.nan) for name, value in retrieval_chance(hits).items()}
    counts = {"slides": len(slides.ids), "patients": len(people), "reports": len(reports), "seen_left_out": seen}
    return Outcome(column, counts, scores, differences, rankings=rankings)


def _mean(draws: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def _intervals(drawn: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> tuple[Scores, Scores]:
    """Scores of all features, and the paired differences of the embedding to the others where they have the same probe."""
    scores = {f: {p: {m: interval(v) for m, v in s.items()} for p, s in probes.items()} for f, probes in drawn.items()}
    ours = drawn["embedding"]
    differences = {
        f: {p: {m: interval(ours[p][m] - v) for m, v in s.items()} for p, s in probes.items() if p in ours}
        for f, probes in drawn.items()
        if f != "embedding"
    }
    return scores, differences


def _protocol(plan: _Plan, parts: list[str], outcomes: list[Outcome]) -> list[str]:
    config = plan.config
    what = {
        "zeroshot": f"Softmax at temperature {TEMPERATURE} of the cosines to each class's mean prompt vector; nothing is fitted.",
        "retrieval": "Reports are the distinct texts. A hit is any report of the slide's patient, any slide of a patient with the report; "
        "ties count against the model. Chance is a random order. Resamples draw queries; what is searched stays whole.",
    }
    fitted = plan.task not in what
    split = f"The split is given by {', '.join(parts)}; no patient is in two parts." if parts else "All labelled slides are tested."
    if fitted and not parts:
        split = f"{config.folds} stratified folds grouped by patient (StratifiedGroupKFold, seed {config.seed})."
    probes = (
        "Linear probe: scikit-learn's LogisticRegression (lbfgs, classes weighted equally) on features standardised on the training part; "
        f"C from {C_GRID[0]:g} to {C_GRID[-1]:g} by the least log loss on the validation part or in {config.inner_folds} folds by patient "
        f"inside the training part. {config.neighbours}-NN: share of each class among the nearest by cosine. n-shot: nearest class mean of "
        f"n training patients per class, averaged over {config.draws} draws. mean-pool: the same on the mean of each slide's tile features."
    )
    intervals = (
        f"Metrics run over all held-out predictions at once; intervals are the 2.5 and 97.5 percentiles of {config.bootstrap} resamples of "
        "patients; differences are paired (same folds, same resamples)."
    )
    seen = f"Slides of patients seen in pretraining are {'tested too' if plan.include_seen else 'left out of test'}."
    positive = [(o, o.classes[1], o.counts["classes"][o.classes[1]]["slides"]) for o in outcomes if len(o.classes) == 2]
    counts = [f"{o.column}: positive is {name!r}, {n} of {o.counts['slides']} slides." for o, name, n in positive]
    return [split, seen, what.get(plan.task, probes), intervals, *counts]
