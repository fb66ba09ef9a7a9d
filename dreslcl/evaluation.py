"""What slide embeddings are worth on labels: metrics with intervals, probes, and one function for each kind of task.

Folds are grouped by patient, every choice (standardisation, C) is made inside the training part, and a metric is computed once over all
held-out predictions, with an interval from resampling patients. All features that stand side by side (two embeddings, the mean-pool
baseline) share slides, folds and resamples, so their differences are paired. torch loads only where a model encodes texts.
"""

import json
import tomllib
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py
import jinja2
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import softmax
from scipy.stats import hypergeom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from threadpoolctl import threadpool_limits

from .common import ConfigError, ModelError, Row, TableError, fingerprint, preview, read_table, read_text, write_json, write_table
from .config import EvalConfig
from .formats import Embeddings, read_report_vectors, read_reports, unit
from .labels import Fold, Slides, having, join_labels, labelled, leak_scan, leave_out_seen, patient_folds, with_folds

Rows = Sequence[Mapping[str, str]]
Weights = Float[np.ndarray, "R n"]
Values = Float[np.ndarray, "R"]
Matrix = Float[np.ndarray, "n C"]
Task = Literal["subtype", "recognition", "mutation", "retrieval", "zeroshot"]
UNFITTED = ("retrieval", "zeroshot")  # tasks without probes, and so without folds
CUTS = (1, 5, 10)
C_GRID = tuple(10.0**power for power in range(-5, 3))
INNER_FOLDS, NEIGHBOURS, DRAWS = 3, 5, 5  # draws of few shots, and of random vectors
TEMPERATURE = 0.07  # of the softmax that turns cosines into probabilities; CLIP's at the start of training
NAMES = {"auroc": "AUROC", "auroc_of_folds": "AUROC, mean of folds", "macro_f1": "macro-F1", "auprc": "AUPRC"}
Interval = namedtuple("Interval", "value low high")  # a metric and its 95 % bootstrap interval


def resamples(patients: Sequence[str] | np.ndarray, draws: int, seed: int) -> Weights:
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


def classification_metrics(y: Int[np.ndarray, "n"], probability: Float[np.ndarray, "n C"], weights: Weights) -> dict[str, Values]:
    """AUROC (macro one-vs-rest), macro-F1, balanced accuracy, and AUPRC of class 1 where there are two classes.

    A mean over classes runs over those that occur in the (re)sample; F1 also counts classes that were only predicted. As scikit-learn.
    """
    classes = probability.shape[1]
    pairs = [binary_metrics(y == c, probability[:, c], weights) for c in (range(classes) if classes > 2 else [1])]
    counts = (weights @ np.eye(classes**2)[y * classes + probability.argmax(1)]).reshape(-1, classes, classes)  # label, most probable
    hits, labelled, predicted = np.diagonal(counts, axis1=1, axis2=2), counts.sum(2), counts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1, recall = 2 * hits / (labelled + predicted), hits / labelled
    result = {"auroc": np.stack([auroc for auroc, _ in pairs], axis=1), "macro_f1": f1, "balanced_accuracy": recall}
    result = {name: np.ma.masked_invalid(values).mean(1).filled(np.nan) for name, values in result.items()}
    return result | ({"auprc": pairs[0][1]} if classes == 2 else {})


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


def retrieval_chance(hit: Bool[np.ndarray, "Q G"]) -> dict[str, Interval]:
    """What a random order of the gallery would give, in expectation over queries."""
    gallery, hits = hit.shape[1], hit.sum(axis=1)
    result = {f"recall@{k}": hypergeom.sf(0, gallery, hits, min(k, gallery)).mean() for k in CUTS}
    result["median_rank"] = np.median((gallery + 1) / (hits + 1))
    return {name: Interval(float(value), np.nan, np.nan) for name, value in result.items()}


def show(score: Interval | None) -> str:
    """A score as text: 0.912 (0.880, 0.941); "" where there is none."""
    if score is None or np.isnan(score.value):
        return ""
    value, low, high = (f"{x:.{3 if abs(score.value) <= 1 else 1}f}" for x in score)
    return value if np.isnan(score.low) else f"{value} ({low}, {high})"


Scores = dict[str, dict[str, dict[str, Interval]]]  # features -> probe -> metric
Predictions = dict[str, dict[str, list[Matrix]]]  # features -> probe -> held-out probabilities, one matrix for each draw


@dataclass(frozen=True)
class Outcome:
    """One label column, or one retrieval."""

    slides: Slides  # the tested ones, one for each held-out prediction: given splits may test a slide more than once
    counts: dict[str, Any]
    scores: Scores
    differences: Scores  # the embedding minus these features, paired
    probabilities: dict[str, Matrix] = field(default_factory=dict)  # features -> held-out probabilities of the first probe
    rows: list[dict[str, Any]] = field(default_factory=list)  # of predictions.csv

    @property
    def label(self) -> str:
        """The column, and which class counts as positive where there are two."""
        return self.slides.column + (f" (positive: {self.slides.classes[1]})" if len(self.slides.classes) == 2 else "")

    @property
    def confusion(self) -> Int[np.ndarray, "C C"]:
        """Rows are labels, columns predictions."""
        return confusion_matrix(self.slides.y, self.probabilities["embedding"].argmax(1), labels=range(len(self.slides.classes)))


@dataclass(frozen=True)
class Result:
    """What `evaluate` found: `save` writes it, `report.evaluation_page` draws it."""

    task: str
    protocol: list[str]  # sentences
    outcomes: list[Outcome]
    warnings: list[str]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of text, one row per label column, features and probe."""
        names = list(dict.fromkeys(m for o in self.outcomes for probes in o.scores.values() for s in probes.values() for m in s))
        rows = []
        for o in self.outcomes:
            apart = {f"embedding − {features}": dict([next(iter(probes.items()))]) for features, probes in o.differences.items()}
            for features, probes in (o.scores | apart).items():
                rows += [[o.label, features, probe, *(show(score.get(name)) for name in names)] for probe, score in probes.items()]
        return ["label", "features", "probe", *(NAMES.get(name, name.replace("_", " ")) for name in names)], rows

    def __str__(self) -> str:
        header, rows = self.table()
        return "\n".join("\t".join(row) for row in [header, *rows])

    def save(self, out: Path) -> None:
        """Write `metrics.json` and `predictions.csv` into a folder."""
        results = {o.slides.column: {"counts": o.counts, "scores": o.scores, "differences": o.differences} for o in self.outcomes}
        for o in self.outcomes:
            if o.probabilities:
                results[o.slides.column] |= {"classes": o.slides.classes, "confusion": o.confusion.tolist()}
        rows = [row for o in self.outcomes for row in o.rows]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_table(Path(out) / "predictions.csv", columns, [[row.get(name, "") for name in columns] for row in rows])
        everything = {"version": 1, "task": self.task, "protocol": self.protocol, "results": results, "warnings": self.warnings}
        write_json(Path(out) / "metrics.json", _plain(everything))


def _plain(value: Any) -> Any:
    """JSON-able copy: intervals become dictionaries, NaN becomes null."""
    if isinstance(value, Interval | dict):
        return {key: _plain(item) for key, item in (value if isinstance(value, dict) else value._asdict()).items()}
    return (None if np.isnan(value) else round(value, 6)) if isinstance(value, float) else value


def fit_probe(x: np.ndarray, y: np.ndarray, patients: np.ndarray, fold: Fold | None = None, seed: int = 0) -> Pipeline:
    """Logistic regression (lbfgs, classes weighted equally) on standardised features.

    C is the one of `C_GRID` with the least class-balanced log loss on the fold's validation part, else over INNER_FOLDS folds by patient;
    1 where neither is there (a class with a single patient).
    """
    x = x.astype(np.float64)  # in float32 the line search of lbfgs can fail
    probe = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000))
    count, inner = min(INNER_FOLDS, *(len(set(patients[y == c])) for c in set(y))), []
    if fold and len(fold.val):
        inner = [(np.arange(len(fold.train)), np.arange(len(fold.train), len(x)))]
    elif count > 1:
        inner = [(f.train, f.test) for f in patient_folds(y, patients, count, seed)]
    inner = [(train, held) for train, held in inner if len(set(y[train])) > 1]
    if not inner:
        return probe.fit(x, y)
    grid = {"logisticregression__C": C_GRID}
    return GridSearchCV(probe, grid, scoring=_fitness, cv=inner, error_score="raise").fit(x, y).best_estimator_


def _fitness(model: Pipeline, x: np.ndarray, y: np.ndarray) -> float:
    """Minus the log loss, classes weighted equally."""
    p = probabilities(model, x, int(max(y.max(), model.classes_.max())) + 1)[np.arange(len(y)), y]
    return float(np.average(np.log(np.clip(p, 1e-12, None)), weights=compute_sample_weight("balanced", y)))


def probabilities(model: Any, x: np.ndarray, classes: int) -> Matrix:
    """A fitted classifier's probabilities over all classes, zero for those it never saw."""
    result = np.zeros((len(x), classes))
    result[:, model.classes_] = model.predict_proba(x)
    return result


def few_shot(x: np.ndarray, y: np.ndarray, groups: np.ndarray, x_test: np.ndarray, shots: int, seed: int) -> Matrix:
    """Nearest class mean of one slide each of `shots` random patients per class (SimpleShot; Wang et al. 2019, arXiv 1911.04623).

    Features are centred on the mean of the whole training part, which needs no labels.
    """
    rng, centre = np.random.default_rng(seed), x.mean(0)
    prototypes = []
    for c in range(y.max() + 1):
        members = rng.permutation(np.flatnonzero(y == c))
        first = np.unique(groups[members], return_index=True)[1]  # one random slide of each patient
        prototypes.append(unit(x[members[rng.permutation(first)[:shots]]] - centre).mean(0))
    return cosine_softmax(x_test - centre, np.stack(prototypes))


def cosine_softmax(x: np.ndarray, prototypes: np.ndarray) -> Matrix:
    """Softmax over prototypes of their cosine to each row of x, at TEMPERATURE."""
    return softmax((unit(x) @ unit(prototypes).T).astype(np.float64) / TEMPERATURE, axis=1)


@threadpool_limits.wrap(limits=1, user_api="blas")  # lbfgs steps are tiny: a second thread made them five times slower
def evaluate(
    embeddings: Embeddings | tuple[Embeddings, ...],
    labels: Path | Rows,
    task: Task,
    *,
    columns: Sequence[str] | Mapping[str, str] = (),
    split: str | Path | None = None,
    texts: Path | Rows | None = None,
    include_seen: bool = False,
    config: EvalConfig = EvalConfig(),  # noqa: B008 (frozen)
) -> Result:
    """Measure slide embeddings on labels.

    Args:
        embeddings: those to measure; or two, to compare the first with the second on the slides that both have.
        labels: a table with slide_id or patient_id and the label columns, or its rows. For retrieval the reports that are looked for,
            or a file (.h5, .npz) of report vectors made elsewhere.
        columns: of labels, default: the task's name (zeroshot: subtype). As a mapping: each column's positive class, against all others.
        split: a column of `labels` with train, val, test; or a table (Patho-Bench's k=all.tsv) with columns fold_0, fold_1 ...
        texts: for zeroshot the prompts, a JSON or TOML file {class: [prompt, ...]}; else pretraining's reports, for the leak scan.
        include_seen: test also on slides of patients that pretraining saw.

    Raises:
        TableError: labels, split or ids do not allow the evaluation asked for. ConfigError: no prompts, or of another layout.
        ModelError: retrieval or zeroshot, and the model that made the embeddings is not where it was.
    """
    named = dict(zip(("embedding", "compared"), embeddings if isinstance(embeddings, tuple) else (embeddings,)))
    columns = columns or [{"zeroshot": "subtype", "retrieval": "report"}.get(task, task)]
    positive = columns if isinstance(columns, Mapping) else {}
    rows, vectors = read_labels(labels, task)
    checked = [*columns, split] if rows and split in rows[0] else [*columns]
    everyone = join_labels(named, rows, checked, labels.name if isinstance(labels, Path) else "labels")
    prompts = {name: prompt_vectors(texts, e) for name, e in named.items()} if task == "zeroshot" else {}
    fitted, outcomes = task not in UNFITTED, []
    for column in columns:
        if task == "retrieval":
            slides = having(everyone, column)
        else:
            slides = labelled(everyone, column, positive.get(column), binary=task in ("recognition", "mutation"))
        slides, seen = leave_out_seen(with_folds(slides, split, config.folds * fitted, config.seed), include_seen)
        if task == "retrieval":
            outcome = retrieval(slides, named, vectors, config)
        else:
            outcome = classification(slides, zero_shot(slides, prompts) if prompts else probe(slides, config), config)
        outcome.counts.update(unlabelled=len(everyone.ids) - len(slides.ids), seen_left_out=seen)
        outcomes.append(outcome)
    notes = protocol(task, split, include_seen, config, outcomes)
    if fitted and texts is None:
        notes.append("No leak scan: the reports that pretraining used were not given (--reports).")
    elif fitted:
        names = [c for c in columns if task == "mutation"] + sorted({row[c] for c in columns for row in rows})
        summary, leaks = leak_scan(read_labels(texts, "retrieval")[0], named["embedding"], names)
        notes.append(summary)
        everyone.warnings.extend(leaks)
    return Result(task, notes, outcomes, list(dict.fromkeys(everyone.warnings)))


def probe(slides: Slides, config: EvalConfig) -> Predictions:
    """Linear, nearest-neighbour and few-shot probes of each fold; the few-shot probes have a matrix for each draw.

    Raises TableError: a training part holds fewer than two classes.
    """
    y, patients, fits = slides.y, slides.patients, [np.r_[fold.train, fold.val] for fold in slides.folds]
    if any(len(set(y[fit])) < 2 for fit in fits):
        raise TableError(f"{slides.column}: a training part holds fewer than two classes; change the split")
    least, short = min((len(set(patients[fit][y[fit] == c])), name) for fit in fits for c, name in enumerate(slides.classes))
    for n in (n for n in config.shots if n > least):
        slides.warnings.append(f"{slides.column}: {n} shots are left out: a training part has {least} patients of class {short!r}")

    def predict_linear(x: np.ndarray, fit: np.ndarray, fold: Fold) -> Matrix:
        return probabilities(fit_probe(x[fit], y[fit], patients[fit], fold, config.seed), x[fold.test], len(slides.classes))

    def predict(x: np.ndarray, fit: np.ndarray, fold: Fold) -> dict[str, list[Matrix]]:
        a, b, test = x[fit], y[fit], x[fold.test]
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(a)), metric="cosine").fit(a, b)
        found = {"linear": [predict_linear(x, fit, fold)], f"{NEIGHBOURS}-NN": [probabilities(neighbours, test, len(slides.classes))]}
        for n in (n for n in config.shots if n <= least):
            found[f"{n}-shot"] = [few_shot(a, b, patients[fit], test, n, config.seed + draw) for draw in range(DRAWS)]
        return found

    result = {}
    for name, x in slides.features.items():
        folds = [predict(x, *part) for part in zip(fits, slides.folds)]
        result[name] = {kind: [np.concatenate(draws) for draws in zip(*(fold[kind] for fold in folds))] for kind in folds[0]}
    if "mean-pool" in result:  # both: the log-odds of the two linear probes, added
        product = result["embedding"]["linear"][0] * result["mean-pool"]["linear"][0] + 1e-12
        result["both"] = {"linear": [product / product.sum(1, keepdims=True)]}
    rng, shape = np.random.default_rng(config.seed), slides.features["embedding"].shape
    null = [[predict_linear(rng.normal(size=shape), *part) for part in zip(fits, slides.folds)] for _ in range(DRAWS)]
    result["null"] = {"linear": [np.concatenate(folds) for folds in null]}
    majority = np.bincount(y[np.concatenate(fits)]).argmax()
    return result | {"majority class": {"linear": [np.eye(len(slides.classes))[[majority] * len(slides.tested)]]}}


def zero_shot(slides: Slides, prompts: Mapping[str, Mapping[str, np.ndarray]]) -> Predictions:
    """Softmax of the cosines to each class's mean prompt; `prompts` holds features -> class -> vectors (P, E). Nothing is fitted.

    Raises TableError: a class without a prompt.
    """
    result = {}
    for name, of in prompts.items():
        if missing := [c for c in slides.classes if c not in of]:
            raise TableError(f"{slides.column}: no prompt for class {preview(missing)}; the prompts have {preview(of, 20)}")
        means = np.stack([unit(of[c]).mean(0) for c in slides.classes])
        result[name] = {"zero-shot": [cosine_softmax(slides.features[name][slides.tested], means)]}
    return result


def classification(slides: Slides, predictions: Predictions, config: EvalConfig) -> Outcome:
    """Metrics, with intervals, of predictions on the tested slides. Raises TableError: fewer than two classes among the slides to test."""
    tested, column, classes = slides.subset(slides.tested), slides.column, slides.classes
    absent = [name for c, name in enumerate(classes) if c not in tested.y]
    if len(classes) - len(absent) < 2:
        raise TableError(f"{column}: the {len(tested.y)} slides to test are all of class {classes[tested.y[0]]!r}; two classes are needed")
    if absent:
        slides.warnings.append(f"{column}: no slide to test is of class {preview(absent)}")
    weights = resamples(tested.patients, config.bootstrap, config.seed)
    fold = np.repeat(np.arange(len(slides.folds)), [len(fold.test) for fold in slides.folds])
    parts = [fold == number for number in range(len(slides.folds))]

    def measure(draws: list[Matrix], weights: Weights) -> dict[str, np.ndarray]:  # metric -> (draws, R)
        each = [classification_metrics(tested.y, p, weights) for p in draws]
        for values, p in zip(each, draws if len(parts) > 1 else ()):
            of_folds = [classification_metrics(tested.y[i], p[i], weights[:, i])["auroc"] for i in parts if i.any()]
            values["auroc_of_folds"] = np.ma.masked_invalid(of_folds).mean(0).filled(np.nan)
        return {metric: np.stack([values[metric] for values in each]) for metric in each[0]}

    drawn = {
        name: {kind: {metric: v.mean(0) for metric, v in measure(draws, weights).items()} for kind, draws in kinds.items()}
        for name, kinds in predictions.items()
        if name != "null"
    }
    own = {"slides": (slides.ids, slides.y), "patients": (slides.patients, slides.y), "tested": (tested.ids, tested.y)}
    counts = {"slides": len(slides.y), "patients": len(set(slides.patients))}
    counts["classes"] = {name: {what: len(set(ids[y == c])) for what, (ids, y) in own.items()} for c, name in enumerate(classes)}
    first = {name: next(iter(kinds.values()))[0] for name, kinds in predictions.items()}
    keys, rows = ("slide_id", "patient_id", "fold", "label", "prediction", *(f"p_{name}" for name in classes)), []
    for slide, patient, number, label, p in zip(tested.ids, tested.patients, fold, tested.y, first["embedding"]):
        cells = (slide, patient, number, classes[label], classes[p.argmax()], *(f"{value:.6f}" for value in p))
        rows.append({"column": column} | dict(zip(keys, cells)))
    scores, differences = intervals(drawn)
    if "null" in predictions:  # an interval from draw to draw, not from patient to patient
        spread = measure(predictions["null"]["linear"], weights[:1])
        null = {"linear": {m: Interval(float(v.mean()), float(v.min()), float(v.max())) for m, v in spread.items()}}
        scores = {name: scores.get(name, null) for name in predictions}
    return Outcome(tested, counts, scores, differences, first, rows)


def retrieval(slides: Slides, named: Mapping[str, Embeddings], vectors: Mapping[str, np.ndarray], config: EvalConfig) -> Outcome:
    """Rank reports for each slide and slides for each report.

    The reports are the distinct texts. A slide's hits are all texts of its patient, a text's hits all slides of the patients that have it:
    another slide of the same patient, or another patient's report with the same words, is not a mistake.
    """
    slides = slides.subset(np.unique(slides.tested))
    reports, first, text = np.unique([row[slides.column] for row in slides.rows], return_index=True, return_inverse=True)
    people, patient = np.unique(slides.patients, return_inverse=True)
    has = np.zeros((len(people), len(reports)), bool)
    has[patient, text] = True
    hits, every, drawn, rows = has[patient], np.arange(len(patient)), {}, []
    for name, embeddings in named.items():
        similar, drawn[name] = unit(slides.features[name]) @ unit(report_vectors(embeddings, reports.tolist(), vectors)).T, {}
        sides = {"slide → report": (every, first, similar, hits), "report → slide": (first, every, similar.T, hits.T)}
        for direction, (query, gallery, sim, hit) in sides.items():
            ranks, owners = first_hits(sim, hit), slides.patients[query]
            drawn[name][direction] = retrieval_metrics(ranks, resamples(owners, config.bootstrap, config.seed))
            if name == "embedding":
                found = zip(slides.ids[query], owners, ranks, slides.ids[gallery[sim.argmax(1)]])
                keys = ("direction", "query", "patient_id", "rank", "first")
                rows += [dict(zip(keys, (direction, *map(str, values)))) for values in found]
    scores, differences = intervals(drawn)
    scores["chance"] = {direction: retrieval_chance(hit) for direction, (*_, hit) in sides.items()}
    counts = {"slides": len(every), "patients": len(people), "reports": len(reports)}
    return Outcome(slides, counts, scores, differences, rows=rows)


def intervals(drawn: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> tuple[Scores, Scores]:
    """Scores of all features, and the paired differences of the embedding to the others where they have the same probe."""
    ours = drawn["embedding"]
    scores = {f: {p: {m: interval(v) for m, v in s.items()} for p, s in kinds.items()} for f, kinds in drawn.items()}
    others = {f: kinds for f, kinds in drawn.items() if f != "embedding"}
    return scores, {f: {p: {m: interval(ours[p][m] - v) for m, v in s.items()} for p, s in kinds.items()} for f, kinds in others.items()}


def protocol(task: Task, split: str | Path | None, include_seen: bool, config: EvalConfig, outcomes: Sequence[Outcome]) -> list[str]:
    """How the numbers came about, in sentences: those of `protocol.txt`, and what counts as positive."""
    template = Path(__file__).with_name("protocol.txt").read_text(encoding="utf-8")
    said: dict[str, Any] = {"task": task, "split": split, "include_seen": include_seen, "config": config, "fitted": task not in UNFITTED}
    said["of_folds"] = any("auroc_of_folds" in score for o in outcomes for score in o.scores["embedding"].values())
    said |= {"temperature": TEMPERATURE, "c_grid": C_GRID, "inner_folds": INNER_FOLDS, "neighbours": NEIGHBOURS, "draws": DRAWS}
    sentences = jinja2.Template(template, trim_blocks=True).render(said).splitlines()
    for o in (o for o in outcomes if len(o.slides.classes) == 2):
        name = o.slides.classes[1]
        sentences.append(f"{o.slides.column}: positive is {name!r}, {o.counts['classes'][name]['slides']} of {o.counts['slides']} slides.")
    return sentences


# texts


def load_model(embeddings: Embeddings) -> "DRESLCL":
    """The model that made the embeddings; a ModelError where none did, where it is gone, or where another is in its place by now."""
    from .encoder import pick_device
    from .model import DRESLCL

    if not embeddings.model_folder:
        raise ModelError("these embeddings were made without a model, so they have no text side; embed with --model RUN/model")
    model = DRESLCL.load(Path(embeddings.model_folder)).to(pick_device())
    if (there := model.fingerprint()) != embeddings.model:
        made = f"the embeddings were made by {embeddings.model}; embed again"
        raise ModelError(f"{embeddings.model_folder}: holds model {there}, {made}")
    return model


def read_labels(labels: Path | Rows, task: Task) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of a table; for retrieval those of the reports, and report -> its vectors (n, X) where they were made elsewhere."""
    if not isinstance(labels, Path):
        return [Row(row, f"row {n}") for n, row in enumerate(labels, 1)], {}
    if task != "retrieval":
        return read_table(labels), {}
    if labels.suffix != ".npz" and not h5py.is_hdf5(labels):
        return read_reports(labels), {}
    vectors = {key: (f"vectors {fingerprint(array.tolist())}", array) for key, array in read_report_vectors(labels).items()}
    return [Row({"slide_id": key, "patient_id": key, "report": name}) for key, (name, _) in vectors.items()], dict(vectors.values())


def report_vectors(embeddings: Embeddings, reports: Sequence[str], vectors: Mapping[str, np.ndarray]) -> Float[np.ndarray, "n E"]:
    """Each report in the joint space of the embeddings' model; a ModelError where `vectors` have another width than it was trained on."""
    model = load_model(embeddings)
    if vectors and (width := vectors[reports[0]].shape[1]) != model.text.dim:
        raise ModelError(f"report vectors have width {width}, the model was trained on width {model.text.dim}")
    return model.embed_text([vectors[name] for name in reports] if vectors else reports)


def prompt_vectors(prompts: Path | None, embeddings: Embeddings) -> dict[str, Float[np.ndarray, "P E"]]:
    """Class -> vectors of its prompts, from a JSON or TOML file {class: [prompt, ...]}; a ConfigError where it is no such file."""
    if prompts is None:
        raise ConfigError("--task zeroshot needs --prompts FILE")
    try:
        table = (json.loads if prompts.suffix.lower() == ".json" else tomllib.loads)(read_text(prompts))
        lists = {name: [value] if isinstance(value, str) else value for name, value in table.items()}
        if not lists or not all(isinstance(of, list) and of and all(isinstance(text, str) for text in of) for of in lists.values()):
            raise ValueError("each class needs its prompts")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{prompts}: neither JSON nor TOML that holds class = [prompt, ...] ({error})") from error
    model = load_model(embeddings)
    return {name: model.embed_text(texts) for name, texts in lists.items()}
