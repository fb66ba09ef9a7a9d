"""Slides x reports x patients, the batches of an epoch, and a loader that reads tiles ahead of the encoder."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from .common import ConfigError, TableError, cores, file_stamp, preview, read_list, same_name
from .formats import patient_of, read_corners, read_patients, read_report_vectors, read_reports, report_rows
from .tiles import TileGrid, TilePixels, grid_path, read_slides


@dataclass(frozen=True)
class SlideRecord:
    """One slide of a cohort."""

    slide_id: str
    patient_id: str
    tiles: int  # M
    source: Path  # the scan, or its file of features
    report: int = -1  # index into Cohort.reports, shared by slides with equal reports; -1: none


@dataclass(frozen=True)
class Cohort:
    """Slides with their patients and reports."""

    members: tuple[SlideRecord, ...]  # ordered by slide id
    reports: tuple[str | np.ndarray, ...] = ()  # the distinct ones: texts, or (n, E) vectors made elsewhere, of a report's n windows
    notes: tuple[str, ...] = ()  # what the join of slides and reports found, one line each
    work: Path | None = None  # the folder that `dreslcl tile` wrote; none where tile features stand in for pixels
    unreadable: Mapping[str, str] = field(default_factory=dict)  # slide id -> reason, of files of features that cannot be read

    def __len__(self) -> int:
        return len(self.members)

    @classmethod
    def load(cls, work: Path, *, patients: Path | None = None) -> "Cohort":
        """The tiled slides of WORK, without reports.

        A slide's patient comes from `patients` (a table with slide_id and patient_id), else from its TCGA barcode, else is
        the slide itself.
        Raises TableError: no slide in WORK has tiles.
        """
        rows = read_slides(work)
        found = [(row["slide_id"], int(row["tiles"]), Path(row["path"])) for row in rows if row["status"] == "ok"]
        if not found:
            raise TableError(f"{work}: none of its {len(rows)} slides has tiles; see status and error in slides.csv")
        without = len(rows) - len(found)
        return cls._of(found, patients, "tiles" + f"; {without} empty or failed" * (without > 0), work=Path(work))

    @classmethod
    def of_features(
        cls, files: dict[str, tuple[Path, int]], *, patients: Path | None = None, unreadable: Mapping[str, str] | None = None
    ) -> "Cohort":
        """Slides known by files of tile features: slide id -> (file, tiles), as `find_features` gives them.

        Raises TableError: no file holds a tile.
        """
        found = [(slide, tiles, path) for slide, (path, tiles) in files.items() if tiles]
        if not found:
            raise TableError(f"none of the {len(files)} files of features holds a tile")
        without = len(files) - len(found)
        return cls._of(found, patients, "tile features" + f"; {without} empty" * (without > 0), unreadable=unreadable or {})

    @classmethod
    def _of(cls, found: list[tuple[str, int, Path]], patients: Path | None, unit: str, **rest: Any) -> "Cohort":
        """A cohort of (slide id, tiles, source), without reports."""
        known = read_patients(patients) if patients else {}
        members = [SlideRecord(slide, known.get(same_name(slide)) or patient_of(slide), *what) for slide, *what in sorted(found)]
        return cls(tuple(members), notes=(f"{len(members)} slides with {sum(m.tiles for m in members):,} {unit}",), **rest)

    def with_reports(self, reports: Path | None, vectors: Path | None = None) -> "Cohort":
        """Keep the slides that have a report, joined by slide id or else by patient.

        Args:
            reports: CSV or TSV with slide_id and/or patient_id and report; TCGA_Reports.csv; or HistGen's JSON.
            vectors: HDF5 or npz keyed by slide or patient id with report vectors (E,) or (n, E), in place of texts.

        Raises TableError: no report matches any slide (examples of both sides are shown), or vectors differ in width.
        """
        rows: Sequence[tuple[str, str, str | np.ndarray]]
        if vectors is not None:
            rows = [(key, key, array) for key, array in read_report_vectors(vectors).items()]
        elif reports is not None:
            rows = [(row["slide_id"], row["patient_id"], row["report"]) for row in read_reports(reports)]
        else:
            raise ConfigError("pretraining needs reports: --reports TABLE or --report-embeddings FILE")
        by_slide, by_patient, used = {}, {}, set()
        for number, (slide, patient, report) in enumerate(rows):
            for of, name in ((by_slide, slide), (by_patient, patient if slide in ("", patient) else "")):
                first = of.setdefault(same_name(name), number)
                if vectors and not np.array_equal(report, rows[first][2]):  # `read_reports` has seen to this in a table
                    raise TableError(f"{vectors}: {name!r} has more than one report; keep one for each slide or patient")
        members, bare, distinct = [], [], {}
        for m in self.members:
            number = by_slide.get(same_name(m.slide_id), by_patient.get(same_name(m.patient_id)))
            if number is None:
                bare.append(m.slide_id)
                continue
            used.add(number)
            _, patient, report = rows[number]
            place, _ = distinct.setdefault(report if isinstance(report, str) else report.tobytes(), (len(distinct), report))
            members.append(replace(m, patient_id=m.patient_id if vectors else patient or m.patient_id, report=place))
        lost = [slide or patient for number, (slide, patient, _) in enumerate(rows) if number not in used]
        if not members:
            raise TableError(f"{vectors or reports}: no report matches a slide; slides are {preview(bare)}; reports are {preview(lost)}")
        shared = sum(count > 1 for count in Counter(m.report for m in members).values())
        notes = (
            *self.notes,
            f"{len(members)} of {len(self)} slides have a report" + (f"; without: {preview(bare)}" if bare else ""),
            f"{len(used)} of {len(rows)} reports have a slide" + (f"; without: {preview(lost)}" if lost else ""),
            f"{len(distinct)} distinct reports, {shared} of them of several slides; {len({m.patient_id for m in members})} patients",
        )
        return replace(self, members=tuple(members), reports=tuple(report for _, report in distinct.values()), notes=notes)

    def grid(self, member: int) -> TileGrid:
        """Where a member's tiles lie."""
        assert self.work is not None, "a cohort of features has no grids"
        return TileGrid.load(grid_path(self.work, self.members[member].slide_id))

    def mark(self, member: int) -> str:
        """What a member's tiles are: the grid's fingerprint, or the size and time of its file of features."""
        return str(file_stamp(self.members[member].source)) if self.work is None else self.grid(member).fingerprint

    def coordinates(self, member: int) -> np.ndarray | None:
        """Top-left corners (M, 2) of a member's tiles, where known."""
        return read_corners(self.members[member].source) if self.work is None else self.grid(member).xy

    def split(self, rule: str | None, table: Path | None) -> tuple["Cohort", "Cohort"]:
        """Part the cohort into (kept, taken out) by a rule; a patient with one slide taken out is out with all of them.

        Args:
            rule: a file with one slide or patient id per line, or `column=value` of the table; None takes nothing out.
            table: the table of reports, or another with slide_id or patient_id and the rule's column.

        Raises TableError: the column is absent, or the rule names nothing in the cohort.
        """
        if rule is None:
            return self, self.subset([])
        if Path(rule).is_file():
            named = set(read_list(Path(rule)))
        elif "=" in rule and table is not None:
            column, value = rule.split("=", 1)
            rows = [row for row in report_rows(table, column) if row[column] == value]
            named = {same_name(row.get(key, "")) for row in rows for key in ("slide_id", "patient_id")} - {""}
        else:
            raise ConfigError(f"{rule!r} is neither a file of ids nor column=value")
        names = [{same_name(m.slide_id), same_name(m.patient_id)} for m in self.members]
        known, wanted = set().union(*names), named | {patient_of(name) for name in named}  # a slide's barcode names its patient
        out = {m.patient_id for m, own in zip(self.members, names) if own & wanted}
        lost = sorted(name for name in named if not {name, patient_of(name)} & known)
        if not out:
            raise TableError(f"{rule!r} names none of the {len(self)} slides, which are like {self.members[0].slide_id}")
        kept = self.subset([m for m in self.members if m.patient_id not in out])
        gone = self.subset([m for m in self.members if m.patient_id in out])
        notes = (*self.notes, f"{rule}: {len(gone)} slides of {len(out)} patients kept out, {len(kept)} slides stay")
        if lost and Path(rule).is_file():
            notes += (f"{rule}: {len(lost)} of {len(named)} names match no slide and no patient: {preview(lost)}",)
        return replace(kept, notes=notes), gone

    def subset(self, members: Sequence[SlideRecord]) -> "Cohort":
        """Some of the slides, with their reports and no others."""
        numbers = sorted({m.report for m in members} - {-1})
        place = {-1: -1} | {old: new for new, old in enumerate(numbers)}
        chosen = tuple(replace(m, report=place[m.report]) for m in members)
        return replace(self, members=chosen, reports=tuple(self.reports[i] for i in numbers))


# batches


def deal_patients(members: Sequence[SlideRecord], ranks: int) -> list[int]:
    """A rank for each slide: all slides of a patient on one; ranks with slides, and then tiles, of about equal number."""
    slides, tiles = Counter(m.patient_id for m in members), Counter[str]()
    for m in members:
        tiles[m.patient_id] += m.tiles
    loads = [(0, 0)] * ranks
    home = {}
    for patient in sorted(slides, key=lambda p: (-slides[p], -tiles[p], p)):
        home[patient] = loads.index(min(loads))
        count, total = loads[home[patient]]
        loads[home[patient]] = count + slides[patient], total + tiles[patient]
    return [home[m.patient_id] for m in members]


def plan_epoch(members: Sequence[SlideRecord], which: Sequence[int], batches: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal the slides `which` into batches of sizes equal within one; a batch never holds two slides of one patient.

    A patient with more slides than there are batches sits out with the surplus, drawn anew each epoch.
    """
    patients = sorted({members[i].patient_id for i in which})
    place = dict(zip(patients, rng.permutation(len(patients))))
    order = sorted(rng.permutation(np.asarray(which)), key=lambda i: place[members[i].patient_id])  # a patient's slides side by side
    dealt = [i for _, own in groupby(order, key=lambda i: members[i].patient_id) for i in islice(own, batches)]
    shuffled = [np.array(dealt[j::batches], dtype=np.int64) for j in range(batches)]
    return [shuffled[j] for j in rng.permutation(batches)]


def draw_tiles(tiles: int, count: int, rng: np.random.Generator) -> Int64[np.ndarray, "T"]:
    """Indices of `count` of the slide's tiles, uniformly without replacement, ascending; all of them where it has fewer."""
    return np.sort(rng.choice(tiles, min(count, tiles), replace=False)).astype(np.int64)


def window_tiles(order: Int64[np.ndarray, "M"], count: int, visit: int) -> Int64[np.ndarray, "T"]:
    """The tiles of visit number `visit`: the next `count` along `order`, going round; ascending."""
    take = min(count, len(order))
    return np.sort(order[(visit * count + np.arange(take)) % len(order)])


# pixels


class TileReader:
    """Reads tiles of a cohort's slides; many threads may read at once.

    Keeps a bounded number of scans open, and decoded tiles in memory while all of the cohort's fit in `cache_bytes`.
    """

    def __init__(self, cohort: Cohort, *, workers: int = 0, cache_bytes: int = 0):
        self.cohort, self.workers = cohort, workers or cores()
        self._open, self._opened = lru_cache(maxsize=128)(self._open_tiles), set()
        self.grid = lru_cache(maxsize=1024)(cohort.grid)
        fits = bool(cache_bytes) and sum(m.tiles for m in cohort.members) * self.grid(0).size ** 2 * 3 <= cache_bytes
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] | None = {} if fits else None

    def _open_tiles(self, member: int) -> TilePixels:
        pixels = TilePixels(self.cohort.work, self.cohort.members[member].source, self.grid(member))
        self._opened.add(member)
        return pixels

    def release(self, member: int) -> None:
        """Let go of the decoded pieces that reading on in a slide would use."""
        if member in self._opened:
            self._open(member).slide.release()

    def read(
        self, member: int, index: Int64[np.ndarray, "n"], out: UInt8[np.ndarray, "n H W 3"] | None = None
    ) -> UInt8[np.ndarray, "n H W 3"]:
        """Pixels of the member's tiles `index`; in `out`, if it is given and they are not in memory anyway."""
        if self._cache is None:
            return self._open(member).read(index, out)
        grid = self.grid(member)
        if member not in self._cache:  # setdefault: two threads may both get here, one pair of arrays wins
            self._cache.setdefault(member, (np.empty((len(grid), grid.size, grid.size, 3), np.uint8), np.zeros(len(grid), bool)))
        store, have = self._cache[member]
        missing = index[~have[index]]
        if len(missing):
            store[missing] = self._open(member).read(missing)
            have[missing] = True
        return store[index]
