"""Labels and who may be tested on them.

Tables are joined to embeddings, patients named, folds made or read; a patient on two sides of a split is refused, what pretraining saw is
kept out of test, and pretraining's reports are scanned for the words that name the classes.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped
from sklearn.model_selection import StratifiedGroupKFold

from .common import Row, TableError, hashed, is_missing, missing_words, one_value, preview, read_table, same_name
from .formats import Embeddings
from .formats import patient_of as barcode_patient

NEGATIVE = set("no not non without false negative neg normal benign healthy control wt wildtype unmutated absent low mss msil pmmr".split())
POSITIVE = set("yes true positive pos mut mutated mutant altered amplified tumor tumour cancer malignant present high".split())
POSITIVE |= set("msi msih dmmr metastasis metastases metastatic deficient responder".split())
NO_CLASS_WORDS = set("no yes false true negative neg positive pos wt mut absent present high low".split())  # the leak scan skips these
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
PATIENT_COLUMNS = ("patient_id", "case_id", "patient")


class Fold(NamedTuple):
    """Positions among slides."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Slides:
    """n slides that have a row in the table, in the embeddings' order."""

    where: str  # the table's name, for messages
    rows: list[dict[str, str]]  # its values of the columns asked for, and of "patient"
    ids: Shaped[np.ndarray, "n"]
    patients: Shaped[np.ndarray, "n"]
    seen: Bool[np.ndarray, "n"]  # whether pretraining saw the slide's patient
    selected: Bool[np.ndarray, "n"]  # whether the patient chose the epoch that pretraining kept
    features: dict[str, np.ndarray]  # embedding, and where there are: compared, mean-pool; (n, ...) each
    warnings: list[str] = field(default_factory=list)  # what the user should know; it grows on the way and subsets share it
    column: str = ""  # what y, classes and folds are of; before `labelled` they are empty
    classes: tuple[str, ...] = ()
    y: Int[np.ndarray, "_"] = field(default_factory=lambda: np.empty(0, int))
    folds: Sequence[Fold] = ()

    def subset(self, index: Int[np.ndarray, "m"]) -> "Slides":
        """Some of the slides, without folds; one that comes twice in `index` is there twice."""
        arrays = {name: getattr(self, name)[index] for name in ("ids", "patients", "seen", "selected", *["y"] * bool(self.classes))}
        features = {name: x[index] for name, x in self.features.items()}
        return replace(self, rows=[self.rows[i] for i in index], features=features, folds=(), **arrays)

    @property
    def tested(self) -> Int[np.ndarray, "t"]:
        """Which slides are tested, one fold after the other; given splits may test one more than once."""
        return np.concatenate([fold.test for fold in self.folds])


def columns_of(rows: Sequence[Row]) -> str:
    """The columns of a table, for a message."""
    return ", ".join(rows[0]) if rows else "no rows"


def join_labels(named: Mapping[str, Embeddings], rows: Sequence[Row], columns: Sequence[str], where: str) -> Slides:
    """The slides that have a row and are in all of the embeddings ("embedding", perhaps "compared"); `warnings` counts those left out.

    Raises TableError: one of the columns is absent, as `match_rows`, or the embeddings share no slide.
    """
    for column in columns:
        if column not in (rows[0] if rows else ()):
            raise TableError(f"{where}: no column {column!r}; there are {columns_of(rows)}")
    first = named["embedding"]
    row_of, warnings = match_rows(first, rows, columns, where)
    place = {name: {same_name(slide): i for i, slide in enumerate(e.ids)} for name, e in named.items()}
    shared = set.intersection(*map(set, place.values()))
    ids = [slide for slide in row_of if same_name(slide) in shared]
    if not ids:
        others = [preview(e.ids) for e in named.values()]
        raise TableError(f"compare: no slide in common; the first embeddings have {others[0]}, the second {others[-1]}")
    if alone := [slide for slide in row_of if same_name(slide) not in shared]:
        warnings.append(f"compare: {len(alone)} labelled slides are not in the second embeddings, so left out ({preview(alone)})")
    index = {name: [there[same_name(slide)] for slide in ids] for name, there in place.items()}
    features = {name: e.vectors[index[name]] for name, e in named.items()}
    if first.mean is not None:
        features["mean-pool"] = first.mean[index["embedding"]]
    patients = [patient_of(slide, row_of[slide]["patient"], first.patients[i]) for slide, i in zip(ids, index["embedding"])]
    was = known_patients(named.values(), rows)
    seen, selected = (np.array([patient in was[kind] for patient in patients]) for kind in ("seen", "selected"))
    return Slides(where, [row_of[slide] for slide in ids], np.array(ids), np.array(patients), seen, selected, features, warnings)


def match_rows(
    embeddings: "Embeddings | Slides", rows: Sequence[Row], columns: Sequence[str], where: str
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Slide -> its values of `columns` and its "patient", found by slide_id or else by patient; and warnings about what has no partner.

    Raises TableError: neither id column is there, nothing matches (both sides shown), or one id has two values of a column.
    """
    own = patient_column(rows)
    patients = [patient_of(slide, "", known) for slide, known in zip(embeddings.ids, embeddings.patients)]
    keys = [(key, names) for key, names in (("slide_id", embeddings.ids), (own, patients)) if key and rows and key in rows[0]]
    if not keys:
        raise TableError(f"{where}: no column 'slide_id' or 'patient_id'; there are {columns_of(rows)}")
    for key, names in keys:
        named = [(same_name(row[key]), row) for row in rows if not is_missing(row[key])]
        table = dict(named)
        found = {slide: same_name(name) for slide, name in zip(embeddings.ids, names) if same_name(name) in table}
        if found:
            break
    else:
        theirs, tried = preview(row[key] for row in rows for key, _ in keys), " or ".join(key for key, _ in keys)
        raise TableError(f"{where}: no {tried} matches the embeddings; the table has {theirs}, they have {preview(keys[0][1])}")
    partners = set(found.values())
    alone, bare = [name for name in table if name not in partners], [slide for slide in embeddings.ids if slide not in found]
    lost = ((alone, f"{len(table)} ids have no embedding"), (bare, f"{len(names)} embeddings have no row"))
    warnings = [f"{where}: {len(left)} of {what} and are left out ({preview(left)})" for left, what in lost if left]
    values = {column: one_value(Path(where), rows, key, column) for column in columns}
    ours = [(name, row) for name, row in named if name in partners]
    empty = {column: missing_words(row[column] for name, row in ours if name not in of) for column, of in values.items()}
    empty |= {key: missing_words(row[key] for row in rows)}
    warnings += [f"{where}: what has no {column} is left out: {words}" for column, words in empty.items() if words]
    values["patient"] = one_value(Path(where), rows, key, own) if own else {}
    return {slide: {column: of.get(name, "") for column, of in values.items()} for slide, name in found.items()}, warnings


def patient_column(rows: Sequence[Row]) -> str:
    """The column of a table that names patients, "" for none."""
    return next((c for c in PATIENT_COLUMNS if rows and c in rows[0]), "")


def known_patients(embeddings: Iterable[Embeddings], rows: Sequence[Row]) -> dict[str, set[str]]:
    """Which patients (and slides) pretraining has seen, or selected its epoch by: "seen" and "selected" -> names.

    A seen slide makes its patient known wherever the table, the embeddings or a barcode name that patient.
    """
    found: dict[str, set[str]] = {"seen": set(), "selected": set()}
    own = patient_column(rows)
    for e in embeddings:
        pairs = {(row.get("slide_id", ""), row.get(own, "")) for row in rows} | set(zip(e.ids, e.patients))
        names = [{slide, barcode_patient(slide), patient_of(slide, patient, "")} for slide, patient in pairs]
        names = [{name for name in of if not is_missing(name)} for of in names]  # of one patient each
        for kind, known in found.items():
            told = set(getattr(e, kind))
            told = told if e.salt else {form for name in told for form in (same_name(name), barcode_patient(name))}
            new = {name for of in names if told for name in of if hashed(name, e.salt) in told}
            while not new <= known:
                known |= new
                new = {name for of in names if of & known for name in of}
            known |= set() if e.salt else told
    return found


def patient_of(slide: str, in_table: str, in_embeddings: str) -> str:
    """The patient: as the table says, else the embeddings, else a TCGA barcode's first 12 characters, else the slide is its own.

    A patient called like the slide says nothing: it only means that nobody knew.
    """
    named = [name for name in (in_table, in_embeddings) if name != slide and not is_missing(name)]
    return same_name(named[0]) if named else barcode_patient(slide)


def having(slides: Slides, column: str) -> Slides:
    """The slides that have a value in a column. Raises TableError: none has."""
    known = np.array([i for i, row in enumerate(slides.rows) if row[column]], int)
    if not len(known):
        raise TableError(f"{slides.where}: none of the {len(slides.rows)} slides with an embedding has a {column}")
    return replace(slides.subset(known), column=column)


def labelled(slides: Slides, column: str, positive: str | None = None, binary: bool = False) -> Slides:
    """The slides that have a label in a column, with their class numbers and the classes' names (`class_numbers`)."""
    slides = having(slides, column)
    y, classes = class_numbers([row[column] for row in slides.rows], column, positive, binary)
    return replace(slides, y=y, classes=classes)


def class_numbers(values: Sequence[str], column: str, positive: str | None, binary: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers and names; with two classes the positive one is number 1: `positive` (against the rest), else `positive_of` the two.

    Raises TableError: fewer than two classes, more than two or no positive one where `binary` asks for it, no class `positive`, or two
    that differ only in case or form ("LUAD" and "luad", "1" and "1.0").
    """
    classes = sorted(set(values))
    alike: dict[str, str] = {}
    for name in classes:
        if (other := alike.setdefault(_class_key(name), name)) != name:
            raise TableError(f"{column}: {other!r} and {name!r} differ only in how they are written; write one class in one way")
    if len(classes) < 2:
        raise TableError(f"{column}: {len(classes)} classes ({preview(classes)}) among the slides with an embedding; two are needed")
    if positive is not None:
        if positive not in classes:
            raise TableError(f"{column}: no class {positive!r} to be the positive one; there are {preview(classes, 20)}")
        rest = [name for name in classes if name != positive]
        return np.array([int(value == positive) for value in values]), (rest[0] if len(rest) == 1 else f"not {positive}", positive)
    chosen = positive_of(*classes) if len(classes) == 2 else ""
    if binary and not chosen:
        two = "where two are asked for; --positive CLASS sets one against the rest"
        how = two if len(classes) > 2 else "and no word that tells which is the positive one; use --positive CLASS"
        raise TableError(f"{column}: {len(classes)} classes ({preview(classes, 6)}) {how}")
    classes.sort(key=lambda name: name == chosen)
    return np.array([classes.index(value) for value in values]), tuple(classes)


def _class_key(name: str) -> str:
    try:
        return str(float(name.replace(",", ".")))
    except ValueError:
        return " ".join(unicodedata.normalize("NFC", name).casefold().split())


def positive_of(a: str, b: str) -> str:
    """Which of two classes is the positive one: mutated, positive, MSI-H, tumour ...; "" where the words do not tell.

    It is the one that the other denies ("MSIH" of "nonMSIH", "responder" of "non-responder"); else the one that does not read as a negative
    (a number up to 0, a word of NEGATIVE, a minus at the end) where the other does; else the only one that reads as a positive (another
    number, a word of POSITIVE, a plus at the end).
    """

    def squash(name: str) -> str:
        return re.sub(r"[\W_]+", "", name.lower())

    def reads(name: str, words: set[str], sign: str) -> bool:
        try:
            return (float(name.replace(",", ".")) > 0) == (words is POSITIVE)
        except ValueError:
            found = {squash(name), *re.split(r"[\W_]+", name.lower())}
            return bool(found & words) or name.rstrip()[-1:] in sign or (words is NEGATIVE and "wildtype" in squash(name))

    for one, other in ((a, b), (b, a)):
        if re.fullmatch(r"(non|not|no|un|in)" + re.escape(squash(one)), squash(other)):
            return one
    for words, sign in ((NEGATIVE, "-−–"), (POSITIVE, "+")):
        first, second = reads(a, words, sign), reads(b, words, sign)
        if first != second:
            return a if first == (words is POSITIVE) else b
    return ""


def given_folds(split: str | Path, slides: Slides) -> list[Fold]:
    """Folds from the words train, val, test of a column of the labels, or of a table with columns fold_0, fold_1 ... (Patho-Bench's).

    Slides with another word or none ("", or no row in the table) are left out of the fold.
    Raises TableError: no such column or file, no id of it is known, another word, no test part, or a patient in two parts of one fold.
    """
    where, own = slides.where, slides.rows[0]
    if split in own:
        parts = {str(split): [row[split] for row in slides.rows]}
    elif not Path(split).is_file():
        raise TableError(f"{where}: no column {str(split)!r}, nor a file of that name")
    else:
        where, table = str(split), read_table(Path(split))
        columns = sorted((c for c in (table[0] if table else []) if re.fullmatch(r"fold_\d+", c)), key=lambda c: int(c[5:]))
        if not columns:
            raise TableError(f"{where}: no columns fold_0, fold_1 ...; there are {columns_of(table)}")
        row_of, _ = match_rows(slides, table, columns, where)
        parts = {column: [row_of.get(slide, {}).get(column, "") for slide in slides.ids.tolist()] for column in columns}
    folds = []
    for column, words in parts.items():
        words = ["" if is_missing(word) else word.lower() for word in words]
        if unknown := sorted({*words} - {*PARTS, ""}):
            raise TableError(f"{where}: column {column!r} holds {preview(unknown)}; the parts of a split are train, val and test")
        part = np.array([PARTS.get(word, "") for word in words])
        of: dict[str, dict[str, str]] = defaultdict(dict)
        for slide, patient, name in zip(slides.ids, slides.patients, part):
            of[patient] |= {name: slide} if name else {}
        if both := [patient for patient, there in of.items() if len(there) > 1]:
            sides = " and ".join(f"{name} ({slide})" for name, slide in of[both[0]].items())
            many = f"{len(both)} patients are on two sides"
            raise TableError(f"{where}: column {column!r} puts patient {str(both[0])!r} into {sides}; {many}")
        folds.append(Fold(*(np.flatnonzero(part == name) for name in ("train", "val", "test"))))
        if not len(folds[-1].test):
            raise TableError(f"{where}: column {column!r} puts no labelled slide with an embedding into test")
    return folds


def patient_folds(y: np.ndarray, patients: np.ndarray, count: int, seed: int) -> list[Fold]:
    """Stratified folds grouped by patient (scikit-learn's StratifiedGroupKFold)."""
    split = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y, patients)
    return [Fold(train, np.empty(0, int), test) for train, test in split]


def with_folds(slides: Slides, split: str | Path | None, count: int, seed: int) -> Slides:
    """The slides with the given split (`given_folds`), else with `count` folds by patient; with 0 all slides are one test part.

    Raises TableError: a class has fewer patients than there are folds.
    """
    if split is not None:
        return replace(slides, folds=given_folds(split, slides))
    if not count:
        return replace(slides, folds=[Fold(np.empty(0, int), np.empty(0, int), np.arange(len(slides.ids)))])
    least, name = min((len(set(slides.patients[slides.y == c])), name) for c, name in enumerate(slides.classes))
    if least < count:
        how = f"use --folds {least}" if least > 1 else "leave the class out"
        few = f"class {name!r} has {least} patients, fewer than the {count} folds"
        raise TableError(f"{slides.column}: {few}; {how} or merge classes")
    return replace(slides, folds=patient_folds(slides.y, slides.patients, count, seed))


def leave_out_seen(slides: Slides, include_seen: bool) -> tuple[Slides, list[str]]:
    """Test parts without the slides of patients that pretraining saw (a warning counts them), and their ids. TableError: none is left."""
    tested = np.unique(slides.tested)
    if chose := int(slides.selected[tested].sum()):
        told = "tested slides are of patients whose retrieval chose the epoch that pretraining kept; the numbers are a little optimistic"
        slides.warnings.append(f"{slides.column}: {chose} of {len(tested)} {told}")
    seen = slides.ids[tested[slides.seen[tested]]].tolist()
    if not seen:
        return slides, []
    of = f"{slides.column}: {len(seen)} of {len(tested)}"
    if include_seen:
        slides.warnings.append(f"{of} tested slides are of patients seen in pretraining; the numbers are optimistic")
        return slides, []
    if len(seen) == len(tested):
        how = "use --include-seen (the numbers are then optimistic) or pretrain with --exclude"
        raise TableError(f"{slides.column}: pretraining saw the patients of all {len(tested)} slides to test, so none is held out; {how}")
    slides.warnings.append(f"{of} slides are of patients seen in pretraining and left out of test: {preview(seen)}")
    return replace(slides, folds=[fold._replace(test=fold.test[~slides.seen[fold.test]]) for fold in slides.folds]), seen


def leak_scan(reports: Sequence[Row], embeddings: Embeddings, names: Iterable[str]) -> tuple[str, list[str]]:
    """Search the reports that pretraining read (all, where none can be told) for the classes' names: a summary, and warnings."""
    known, own = known_patients([embeddings], reports)["seen"], patient_column(reports)
    reports = [row for row in reports if same_name(row.get("slide_id", "")) in known or row.get(own) in known] or reports
    warnings = []
    for name in dict.fromkeys(names):
        words = [re.escape(word) for word in re.split(r"[\W_]+", name) if word]
        if not words or len(name) < 2 or name.lower() in NO_CLASS_WORDS or is_missing(name):
            continue
        pattern = re.compile(r"(?<!\w)" + r"[\W_]+".join(words) + r"s?(?!\w)", re.IGNORECASE)
        hits = [(row, hit) for row in reports if (hit := pattern.search(row.get("report", "")))]
        for row, hit in hits[:1]:
            who, text = row.get("slide_id") or row.get(own, ""), row["report"]
            around = " ".join(text[max(0, hit.start() - 40) : hit.end() + 40].split())
            there = f"{len(hits)} of {len(reports)} pretraining reports"
            warnings.append(f"leak scan: {name!r} stands in {there}, for example {who}: “…{around}…”")
    return f"Leak scan: {len(warnings)} of the classes' names stand in the {len(reports)} reports that pretraining used.", warnings
