"""Labels and who may be tested on them.

Tables are matched to embeddings, patients named, folds made or read; a patient on two sides of a split is refused, what pretraining saw is
kept out of test, and pretraining's reports are scanned for the words that name the classes.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from .common import TableError, read_table
from .config import EvalConfig
from .formats import Embeddings
from .formats import patient_of as barcode_patient

Names = Sequence[str] | Shaped[np.ndarray, "n"]
Rows = list[dict[str, str]]
UNLABELLED = {"", "na", "nan", "n/a", "null"}
NEGATIVE = {"0", "no", "false", "negative", "neg", "normal", "benign", "healthy", "wt", "wildtype", "wild-type", "wild type", "absent"}
NO_CLASS_WORDS = {"0", "1", "no", "yes", "false", "true", "negative", "neg", "positive", "pos", "wt", "mut", "absent", "present"}
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
PATIENT_COLUMNS = ("patient_id", "case_id", "patient")


@dataclass(frozen=True)
class Slides:
    """n slides that have a row in the table, in the embeddings' order."""

    where: str
    """The table's name, for messages."""
    rows: Rows
    row_index: Int[np.ndarray, "n"]
    """Which row of the table each slide has."""
    ids: Shaped[np.ndarray, "n"]
    patients: Shaped[np.ndarray, "n"]
    seen: Bool[np.ndarray, "n"]
    """Whether pretraining saw the slide's patient."""
    features: dict[str, np.ndarray]
    """embedding, and where there are: compared, mean-pool; (n, ...) each."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """The given split: one column per fold, each slide's part."""

    def keep(self, index: Int[np.ndarray, "m"]) -> "Slides":
        """Some of the slides."""
        rows, parts = [self.rows[i] for i in index], {name: [words[i] for i in index] for name, words in self.parts.items()}
        arrays = (self.row_index[index], self.ids[index], self.patients[index], self.seen[index])
        return Slides(self.where, rows, *arrays, {name: x[index] for name, x in self.features.items()}, parts)


def select(embeddings: Embeddings, compare: Embeddings | None, rows: Rows, columns: Sequence[str], where: str) -> tuple[Slides, list[str]]:
    """The slides of the embeddings (of both, where two are compared) that have a row, and warnings about those left out.

    Raises:
        TableError: as `match`, or the two embeddings share no slide.
    """
    found, warnings = match(embeddings, rows, columns, where)
    ids, index, seen, features = embeddings.ids, sorted(found), embeddings.seen, {}
    if compare is not None:
        second = {slide: i for i, slide in enumerate(compare.ids)}
        alone, index, seen = [ids[i] for i in index if ids[i] not in second], [i for i in index if ids[i] in second], seen | compare.seen
        if not index:
            raise TableError(f"compare: no slide in common; the first embeddings have {some(ids)}, the second {some(compare.ids)}")
        warnings += [f"compare: {len(alone)} labelled slides are not in the second embeddings, so left out ({some(alone)})"] * bool(alone)
        features["compared"] = compare.vectors[[second[ids[i]] for i in index]]
    if embeddings.mean is not None:
        features["mean-pool"] = embeddings.mean[index]
    patients = {ids[i]: patient_of(ids[i], table_patient(rows[found[i]]), embeddings.patients[i]) for i in index}
    known = {row.get("slide_id", ""): table_patient(row) for row in rows} | patients
    seen_patients = {patient_of(slide, known.get(slide, ""), "") for slide in seen}
    was_seen = [ids[i] in seen or patients[ids[i]] in seen_patients for i in index]
    arrays = ([found[i] for i in index], [ids[i] for i in index], [patients[ids[i]] for i in index], was_seen)
    features = {"embedding": embeddings.vectors[index]} | features
    return Slides(where, [rows[found[i]] for i in index], *map(np.array, arrays), features), warnings


def table_patient(row: Mapping[str, str]) -> str:
    """The patient that a table's row names, "" for none."""
    return next((row[c] for c in PATIENT_COLUMNS if row.get(c)), "")


def split_table(path: Path, slides: Slides) -> dict[str, list[str]]:
    """Fold column of a split table -> the part of each slide ("" where the table lacks the slide).

    Raises:
        TableError: no column fold_0, fold_1 ..., or no id of the table is known.
    """
    rows = read_table(path)
    columns = sorted((c for c in (rows[0] if rows else []) if re.fullmatch(r"fold_\d+", c)), key=lambda c: int(c[5:]))
    if not columns:
        raise TableError(f"{path}: no columns fold_0, fold_1 ...; there are {', '.join(rows[0]) if rows else 'no rows'}")
    by = {row[c]: row for c in (*PATIENT_COLUMNS, "slide_id") for row in rows if row.get(c)}
    found = [by.get(slide) or by.get(patient) or {} for slide, patient in zip(slides.ids, slides.patients)]
    if not any(found):
        raise TableError(f"{path}: no id matches; the table has {some(list(by))}, the embeddings have {some(slides.ids)}")
    return {column: [row.get(column, "") for row in found] for column in columns}


def some(values: Iterable[str], limit: int = 3) -> str:
    """The first few, and how many more there are."""
    values = [str(value) for value in values]
    return ", ".join(map(repr, values[:limit])) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def match(embeddings: Embeddings, rows: Rows, columns: Sequence[str], where: str) -> tuple[dict[int, int], list[str]]:
    """Embedding row -> table row, by slide_id or else by patient; and warnings about what has no partner.

    Raises:
        TableError: neither id column is there, two rows of one id differ in `columns`, or nothing matches (both sides shown).
    """
    there = list(rows[0]) if rows else []
    patients = [patient_of(slide, "", known) for slide, known in zip(embeddings.ids, embeddings.patients)]
    keys = [("slide_id", embeddings.ids)] * ("slide_id" in there) + [(c, patients) for c in PATIENT_COLUMNS if c in there][:1]
    if not keys:
        raise TableError(f"{where}: no column 'slide_id' or 'patient_id'; there are {', '.join(there) or 'no rows'}")
    for key, names in keys:
        table = {row[key]: i for i, row in reversed(list(enumerate(rows))) if row[key]}
        found = {i: table[name] for i, name in enumerate(names) if name in table}
        if found:
            break
    else:
        key, names = keys[0]
        raise TableError(f"{where}: no {key} matches the embeddings; the table has {some([r[key] for r in rows])}, they have {some(names)}")
    for row in rows:
        differing = [c for c in columns if row[key] and row[c] != rows[table[row[key]]][c]]
        if differing:
            raise TableError(f"{where}: two rows of {key} {row[key]!r} differ in {differing[0]!r}; keep one")
    known = set(names)
    alone = [name for name in table if name not in known]
    bare = [slide for i, slide in enumerate(embeddings.ids) if i not in found]
    warnings = [f"{where}: {len(alone)} of {len(table)} ids have no embedding and are left out ({some(alone)})"] * bool(alone)
    return found, warnings + [f"{where}: {len(bare)} of {len(names)} embeddings have no row and are left out ({some(bare)})"] * bool(bare)


def patient_of(slide: str, in_table: str, in_embeddings: str) -> str:
    """The patient: as the table says, else the embeddings, else a TCGA barcode's first 12 characters, else the slide is its own.

    A patient called like the slide says nothing: it only means that nobody knew.
    """
    named = [name for name in (in_table, in_embeddings) if name not in ("", slide)]
    return named[0] if named else barcode_patient(slide)


def encode(values: Sequence[str], column: str, positive: str | None, binary: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and names; with two classes the positive one is number 1.

    The positive class is `positive` (against the rest), else the one that does not read as a negative ("0", "normal", "wild type" ...).

    Raises:
        TableError: fewer than two classes, more than two where `binary` asks for two, or no class `positive`.
    """
    classes = sorted(set(values))
    if len(classes) < 2:
        raise TableError(f"{column}: {len(classes)} classes ({some(classes)}) among the slides with an embedding; two are needed")
    if positive is not None:
        if positive not in classes:
            raise TableError(f"{column}: no class {positive!r} to be the positive one; there are {some(classes, 20)}")
        rest = [name for name in classes if name != positive]
        return np.array([int(value == positive) for value in values]), (rest[0] if len(rest) == 1 else f"not {positive}", positive)
    if binary and len(classes) > 2:
        raise TableError(
            f"{column}: {len(classes)} classes ({some(classes, 6)}) where two are asked for; --positive CLASS sets one against the rest"
        )
    if len(classes) == 2 and classes[1].lower() in NEGATIVE and classes[0].lower() not in NEGATIVE:
        classes.reverse()
    return np.array([classes.index(value) for value in values]), tuple(classes)


class Fold(NamedTuple):
    """Positions among the labelled slides."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def patient_folds(y: np.ndarray, patients: np.ndarray, count: int, seed: int) -> list[Fold]:
    """Stratified folds grouped by patient (scikit-learn's StratifiedGroupKFold)."""
    split = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y, patients)
    return [Fold(train, np.empty(0, int), test) for train, test in split]


def fixed_folds(parts: Mapping[str, Sequence[str]], ids: Names, patients: Names, where: str) -> list[Fold]:
    """Folds from the words train, val, test of one column per fold; slides with another fold's or no part ("") are left out of it.

    Raises:
        TableError: another word, a fold without a train or test part, or a patient in two parts of one fold.
    """
    folds = []
    for column, words in parts.items():
        unknown = sorted({word for word in words if word and word.lower() not in PARTS})
        if unknown:
            raise TableError(f"{where}: column {column!r} holds {some(unknown)}; the parts of a split are train, val and test")
        part = np.array([PARTS.get(word.lower(), "") for word in words])
        of: dict[str, dict[str, str]] = defaultdict(dict)
        for slide, patient, name in zip(ids, patients, part):
            if name:
                of[patient][name] = slide
        both = [(patient, there) for patient, there in of.items() if len(there) > 1]
        if both:
            sides = " and ".join(f"{name} ({slide})" for name, slide in both[0][1].items())
            raise TableError(
                f"{where}: column {column!r} puts patient {str(both[0][0])!r} into {sides}; {len(both)} patients are on two sides"
            )
        fold = Fold(*(np.flatnonzero(part == name) for name in ("train", "val", "test")))
        if not len(fold.test):
            raise TableError(f"{where}: column {column!r} puts no labelled slide with an embedding into test")
        folds.append(fold)
    return folds


def leak_scan(reports: Rows, names: Sequence[str]) -> list[str]:
    """Warnings: how many reports hold a class's name as whole words, with an example."""
    found = []
    for name in dict.fromkeys(names):
        words = [re.escape(word) for word in re.split(r"[\W_]+", name) if word]
        if not words or len(name) < 2 or name.lower() in UNLABELLED | NO_CLASS_WORDS:
            continue
        pattern = re.compile(r"(?<!\w)" + r"[\W_]+".join(words) + r"s?(?!\w)", re.IGNORECASE)
        hits = [(row, hit) for row in reports if (hit := pattern.search(row.get("report", "")))]
        for row, hit in hits[:1]:
            who = row.get("slide_id") or table_patient(row)
            around = " ".join(row["report"][max(0, hit.start() - 40) : hit.end() + 40].split())
            found.append(
                f"leak scan: {name!r} stands in {len(hits)} of {len(reports)} pretraining reports, for example {who}: “…{around}…”"
            )
    return found


def make_folds(slides: Slides, column: str, y: np.ndarray, names: Sequence[str], config: EvalConfig, probing: bool) -> list[Fold]:
    """The given split, else folds by patient; all slides are the test part where nothing is fitted.

    Raises:
        TableError: as `fixed_folds`, or a class with fewer patients than there are folds.
    """
    if slides.parts:
        return fixed_folds(slides.parts, slides.ids, slides.patients, slides.where)
    if not probing:
        return [Fold(np.empty(0, int), np.empty(0, int), np.arange(len(y)))]
    for c, name in enumerate(names):
        patients = len(set(slides.patients[y == c]))
        if patients < config.folds:
            how = f"use --folds {patients}" if patients > 1 else "leave the class out"
            raise TableError(
                f"{column}: class {name!r} has {patients} patients, fewer than the {config.folds} folds; {how} or merge classes"
            )
    return patient_folds(y, slides.patients, config.folds, config.seed)


def leave_out_seen(folds: list[Fold], slides: Slides, include_seen: bool, column: str, warnings: list[str]) -> tuple[list[Fold], list[str]]:
    """Test parts without the slides of patients that pretraining saw, and the ids of those slides; a warning is appended.

    Raises:
        TableError: nothing is left to test.
    """
    tested = np.unique(np.concatenate([fold.test for fold in folds]))
    seen = slides.ids[tested[slides.seen[tested]]].tolist()
    if seen and include_seen:
        warnings.append(
            f"{column}: {len(seen)} of {len(tested)} tested slides are of patients seen in pretraining; the numbers are optimistic"
        )
        return folds, []
    if len(seen) == len(tested):
        how = "use --include-seen (the numbers are then optimistic) or pretrain with --exclude"
        raise TableError(f"{column}: pretraining saw the patients of all {len(tested)} slides to test, so none can be held out; {how}")
    if seen:
        warnings.append(
            f"{column}: {len(seen)} of {len(tested)} slides are of patients seen in pretraining and left out of test: {some(seen)}"
        )
    return [fold._replace(test=fold.test[~slides.seen[fold.test]]) for fold in folds], seen


def seen_reports(reports: Rows, embeddings: Embeddings) -> Rows:
    """The reports of slides that pretraining saw; all of them where none can be told."""
    known = dict(zip(embeddings.ids, embeddings.patients))
    patients = {patient_of(slide, "", known.get(slide, "")) for slide in embeddings.seen}
    return [row for row in reports if row.get("slide_id") in embeddings.seen or table_patient(row) in patients] or reports
