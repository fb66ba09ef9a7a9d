"""The first page of RESULTS.md from the study's rows: each variant against the default on the same cohort, split and seed.

    results_table.py RESULTS_FOLDER RESULTS.md

RESULTS_FOLDER holds CSV files that study.py wrote. The part of RESULTS.md between the two marks is replaced.
"""

import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from dreslcl.common import read_table, write_text

MARKS = "<!-- table -->", "<!-- end of table -->"
METRICS = {
    "report → slide recall@10": "retrieval.embedding.report_→_slide.recall@10",
    "subtype AUROC": "subtype.embedding.linear.auroc",
    "5-NN": "subtype.embedding.5-NN.auroc",
    "25 shots": "subtype.embedding.25-shot.auroc",
    "mean pooling, AUROC": "subtype.mean-pool.linear.auroc",
}


def cell(values: list[float], base: list[float]) -> str:
    """Mean, deviation over runs, and the mean difference to the default's runs of the same cohort, split and seed."""
    if not values:
        return ""
    text = f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
    return text + (f" ({mean(values) - mean(base):+.3f})" if base else "")


def verdict(value: list[float], base: list[float]) -> str:
    """What a row says; a difference below twice the runs' noise says nothing."""
    if not base or len(value) < 2:
        return "" if base is not None and not base else "one run"
    differences = [a - b for a, b in zip(value, base)]
    noise = stdev(differences) / len(differences) ** 0.5
    return "level" if abs(mean(differences)) <= 2 * noise else "better" if mean(differences) > 0 else "worse"


def main(folder: Path, page: Path) -> None:
    groups: dict[tuple[str, str], dict[str, dict[tuple[str, ...], dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for file in sorted(folder.glob("*.csv")):
        for row in read_table(file):
            groups[file.stem, row["set"]][row["variant"]][row["fold"], row["salt"], row["seed"]] = row
    lines = [
        "| cohort, settings | tried | runs | " + " | ".join(METRICS) + " | subtype against the default |",
        "|" + "---|" * (len(METRICS) + 4),
    ]
    for (cohort, settings), variants in groups.items():
        default = variants.get("default", {})
        for name, runs in variants.items():
            pairs = [key for key in runs if key in default and name != "default"]
            cells = []
            for column in METRICS.values():
                own = [float(row[column]) for row in runs.values() if row.get(column)]
                cells.append(cell(own, [float(default[key][column]) for key in pairs if default[key].get(column)]))
            column = METRICS["subtype AUROC"]
            said = verdict([float(runs[k][column]) for k in pairs], [float(default[k][column]) for k in pairs]) if name != "default" else ""
            lines.append(f"| {cohort}{f' ({settings})' if settings else ''} | {name} | {len(runs)} | {' | '.join(cells)} | {said} |")
    text = page.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    write_text(page, f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + f"\n\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
