"""What a pretraining run tells people: metrics.csv, curves.png and TensorBoard events as it goes, report.html at its end."""

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from .bank import MemoryBank
from .cohort import Cohort, TileReader
from .files import write_table
from .metrics import first_hits
from .report import Block, Code, Picture, Table, curves, page, versions

ATLAS_ROWS = 20_000
ATLAS_TILES = 6
GAP = ((0, 0), (0, 4), (0, 0))  # px right of a tile
EXAMPLES = 6

Row = Mapping[str, float | int]


class Journal:
    """The log of one run, on the rank that writes. Nothing is written before the first epoch's end."""

    def __init__(self, out: Path):
        self.out, self.drawn = out, time.monotonic()
        self.events: Any = None

    def write(self, rows: Sequence[Row], *, picture: bool) -> None:
        """All rows to metrics.csv, the last one to TensorBoard; curves.png costs a second: every half minute, and with `picture`."""
        from torch.utils.tensorboard import SummaryWriter

        if self.events is None:  # what a killed run logged after the checkpoint that this one went on from is void
            self.events = SummaryWriter(str(self.out), purge_step=int(rows[-2]["step"]) + 1 if len(rows) > 1 else 0)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_table(self.out / "metrics.csv", columns, [[row.get(c, "") for c in columns] for row in rows])
        for name, value in rows[-1].items():
            if name != "step":
                self.events.add_scalar(name, value, int(rows[-1]["step"]))
        self.events.flush()
        if picture or time.monotonic() - self.drawn > 30:
            curves(self.out / "metrics.csv", self.out / "curves.png")
            self.drawn = time.monotonic()


def codebook_atlas(bank: MemoryBank, words: Float[np.ndarray, "K D"], cohort: Cohort, reader: TileReader, *, seed: int) -> list[Picture]:
    """For each codeword, the most used first, a strip of the tiles nearest to it, each of another slide where there are enough.

    Looks at up to ATLAS_ROWS rows of the slides in the shards opened here, as many of each.
    """
    rng = np.random.default_rng(seed)
    member_of = {m.slide_id: i for i, m in enumerate(cohort.members)}
    per_slide = max(1, ATLAS_ROWS // len(bank.slides))
    found: list[list[tuple[int, float, int, int]]] = [[] for _ in words]  # (place within its slide, distance, member, tile)
    counts = np.zeros(len(words), np.int64)
    for slide in bank.slides:
        tiles = np.sort(rng.choice(bank.tiles(slide), min(per_slide, bank.tiles(slide)), replace=False))
        rows, codes = bank.gather(slide, tiles).astype(np.float32), bank.codes(slide, tiles)
        distance = ((rows - words[codes]) ** 2).sum(1)
        counts += np.bincount(codes, minlength=len(words))
        for k in np.unique(codes):
            own = np.flatnonzero(codes == k)
            best = own[np.argsort(distance[own])[:ATLAS_TILES]]
            found[k] += [(place, float(distance[i]), member_of[slide], int(tiles[i])) for place, i in enumerate(best)]
    pictures = []
    for k in np.argsort(-counts, kind="stable"):
        nearest = sorted(found[k])[:ATLAS_TILES]  # each slide's nearest before any slide's second
        if nearest:
            shown = [np.pad(reader.read(m, np.array([tile]))[0], GAP, constant_values=255) for *_, m, tile in nearest]
            empty = [np.full_like(shown[0], 255)] * (ATLAS_TILES - len(shown))  # strips of one length: pages scale them alike
            strip = np.concatenate([*shown, *empty], axis=1)
            pictures.append(Picture(_jpeg(strip), f"codeword {k}: {counts[k] / counts.sum():.1%} of the tiles"))
    return pictures


def _jpeg(image: np.ndarray, height: int = 96) -> bytes:
    picture, buffer = Image.fromarray(image), io.BytesIO()
    picture.resize((round(picture.width * height / picture.height), height)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


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


def run_page(
    out: Path, *, settings: str, notes: Sequence[str], rows: Sequence[Row], atlas: Sequence[Picture], examples: Sequence[Block]
) -> None:
    """Write RUN/report.html.

    Args:
        settings: the run's configuration as TOML.
        notes: what went in, one line each.
        rows: those of metrics.csv.
        atlas: of `codebook_atlas`; empty where there are no pixels.
        examples: what to show of retrieval.
    """
    last = rows[-1]
    shown = {"loss": "loss", "batch_recall@1": "recall@1 within a batch", "held_out_recall@10": "held-out recall@10"}
    headline = ", ".join(f"{name} {last[key]:.3g}" for key, name in shown.items() if key in last)
    picked = [rows[i] for i in sorted(set(np.linspace(0, len(rows) - 1, min(8, len(rows))).astype(int).tolist()))]
    columns = {"row_age": "mean age", "row_age_p95": "95th percentile of age", "row_cosine": "cosine, old row to fresh feature"}
    columns = {key: name for key, name in columns.items() if key in last}
    ages = [[f"{row['epoch']:.0f}", *(f"{row[key]:.4g}" if key in row else "" for key in columns)] for row in picked]
    sections: dict[str, Sequence[Block]] = {
        "": [f"After epoch {last['epoch']:.0f} ({last['step']:.0f} steps): {headline}."],
        "What went in": list(notes),
        "Curves": [Picture(out / "curves.png")],
        "Memory bank": [Table(["epoch", *columns.values()], ages, "Age: steps since a row was written. A cosine of 1: no drift.")],
    }
    if atlas:
        sections["Codebook"] = ["The tiles nearest to each codeword, from different slides where there are enough.", list(atlas)]
    sections["Retrieval"] = examples
    sections["Settings and versions"] = [Code(settings), versions()]
    page(out / "report.html", "dreslcl pretraining", sections)
