"""A study: variants x seeds on one cohort, each held against the same baselines with the same probe.

    study.py tcga FOLDER --out OUT [--report-embeddings FILE] [--variants default no-bank aggregator=attention ...] [--seeds 0 1 2]

FOLDER holds reports.csv, labels.csv and, for `tcga` and `bags`, features/ (tile features), else slides/; labels.csv of all but `tcga`
has a column split. Held out are the patients with split=test; for tcga 35 % of the patients by a hash of their id. OUT/study.csv gets
one row for each finished run, which is not done again; a run cut short goes on from its last epoch. Settings are those of
dreslcl/config.py: of the cohort's line in DATA, then `--set`, then the variant's. To choose settings without looking at the held-out
patients: `--fold 0/3` takes these out altogether and holds out a third of the training patients instead. `--salt TEXT` holds out
another 35 % of the tcga patients. OUT/held_out.txt lists the patients held out (OUT/held_outTEXT.txt with a salt); `--variants` without
a name writes it and stops.
"""

import argparse
import hashlib
import json
import logging
import shutil
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn

from dreslcl import Cohort, Embeddings, embed, evaluate, pretrain, tile_slides
from dreslcl.bank import fit_codebook
from dreslcl.common import fingerprint, read_table, write_table
from dreslcl.config import EvalConfig, RunConfig, TileConfig, updated
from dreslcl.demo import SETTINGS, TILES
from dreslcl.formats import find_features, read_features
from dreslcl.model import nearest_codeword, residual_sums

log = logging.getLogger("dreslcl.study")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    # baselines, trained alike (same loss, text, batches, budget)
    "mean-mlp": {"aggregator": "mean-mlp"},
    "attention": {"aggregator": "attention"},
    "no-bank": {"bank_share": 0.0},
    "whole-bank": {"bank_share": 1.0},
    "frozen": {"tune": "none"},
    "no-mean-path": {"mean_path": False},
    "no-view": {"view_weight": 0.0},
}
FEATURES = ("tcga", "bags")
TASKS = {"tcga": {"subtype": ["subtype"], "mutation": ["TP53"]}, "demo": {t: [t] for t in ("subtype", "recognition", "mutation")}}
DATA = {
    name: {
        "tiles": None if name in FEATURES else TILES if name == "demo" else TileConfig(),
        "settings": SETTINGS if name == "demo" else RunConfig(),
        "tasks": TASKS.get(name, {"subtype": ["subtype"], "recognition": ["recognition"]}),
    }
    for name in ("tcga", "bags", "crc", "demo")
}
SHOTS = 25
FEW = 10  # where a class has fewer than 25 patients
PROBE = EvalConfig(shots=(FEW, SHOTS))
PARTS = {f.name: part for part in ("encoder", "model", "train") for f in fields(type(getattr(RunConfig(), part)))}


# the cohort


@dataclass(frozen=True)
class Study:
    """A cohort in two parts: slides whose reports are learnt from, and held-out patients."""

    name: str
    out: Path
    reports: Path
    vectors: Path | None
    everything: Cohort
    train: Cohort
    labels: list[dict[str, str]]
    """With a column `split`: train or test."""


def share(patient: str, salt: str = "") -> int:
    """A percentage, 0 to 99, that a patient's id alone decides."""
    return int(hashlib.sha256(f"{salt}{patient}".encode()).hexdigest(), 16) % 100


def load_study(
    name: str, folder: Path, out: Path, vectors: Path | None, tiles: TileConfig | None, fold: str | None, salt: str = ""
) -> Study:
    labels, reports = read_table(folder / "labels.csv", ["slide_id", "patient_id"]), folder / "reports.csv"
    if tiles is None:
        everything = Cohort.of_features(find_features(folder / "features"), patients=folder / "labels.csv")
        for row in labels if name == "tcga" else ():
            row["split"] = "test" if share(row["patient_id"], salt) < 35 else "train"
    else:
        tile_slides(folder / "slides", out / "work", tiles)
        everything = Cohort.load(out / "work", patients=folder / "labels.csv")
    if fold:
        number, count = map(int, fold.split("/"))
        left = {row["patient_id"] for row in labels if row["split"] != "test"}
        everything = everything.subset([m for m in everything.members if m.patient_id in left])
        labels = [row for row in labels if row["patient_id"] in left]
        for row in labels:
            row["split"] = "test" if share(row["patient_id"], "fold") % count == number else "train"
    held = out / f"held_out{salt}{fold.replace('/', 'of') if fold else ''}.txt"
    held.write_text("\n".join(sorted({row["patient_id"] for row in labels if row["split"] == "test"})))
    train, _ = everything.with_reports(reports, vectors).split(str(held), None)
    log.info("%s: %d slides, %d to train on, %d held-out patients", name, len(everything), len(train), len(held.read_text().split()))
    return Study(name, out, reports, vectors, everything, train, labels)


def untrained(study: Study, config: RunConfig) -> tuple[Embeddings, Embeddings]:
    """The baselines that learn nothing: the mean of a slide's tile features, and its residuals to a codebook, each at unit length."""
    out = study.out / f"untrained-{fingerprint(asdict(config.encoder))}"
    pixels = study.everything.work is not None
    means = embed(study.everything, out, encoder=config.encoder if pixels else None, tile_features=pixels)
    files = {m.slide_id: out / "tile_features" / f"{m.slide_id}.h5" if pixels else m.source for m in study.everything.members}
    rows = {slide: read_features(file) for slide, file in files.items()}
    seen, rng = frozenset(m.slide_id for m in study.train.members), np.random.default_rng(config.train.seed)
    each = max(1, 20_000 // len(seen))
    sample = np.concatenate([rng.permutation(rows[slide])[:each] for slide in sorted(seen)])
    words = torch.from_numpy(fit_codebook(sample, config.model.codewords, seed=config.train.seed))
    vectors = []
    for slide in means.ids:
        features = torch.from_numpy(rows[slide])
        sums, _ = residual_sums(features, nearest_codeword(features, words), words)
        vectors.append(nn.functional.normalize(nn.functional.normalize(sums[0], dim=1).flatten(), dim=0).numpy())
    return replace(means, seen=seen), Embeddings(means.ids, means.patients, np.stack(vectors), None, seen)


# one run


def settings(base: RunConfig, changes: dict[str, Any]) -> RunConfig:
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for setting, value in changes.items():
        parts[PARTS[setting]][setting] = value
    return updated(base, **parts)


def run(study: Study, config: RunConfig, key: str) -> dict[str, Any]:
    """Train, embed, measure. Returns columns of the CSV."""
    folder, start = study.out / "runs" / key, time.monotonic()
    model = pretrain(study.train, folder, config)
    trained = embed(study.everything, folder / "embeddings", model=model)
    row: dict[str, Any] = {"seconds": round(time.monotonic() - start)}
    row |= {f"last.{name}": value for name, value in read_table(folder / "metrics.csv")[-1].items()}
    means, residuals = untrained(study, config)
    if study.everything.work is None:  # then the mean of the trained tile features is that of the untrained ones
        means, trained = None, replace(trained, mean=means.vectors)
    split = {} if study.name == "tcga" else {"split": "split"}
    for task, columns in DATA[study.name]["tasks"].items():
        ours = evaluate((trained, means) if means else trained, study.labels, task, columns=columns, config=PROBE, **split)
        row |= scores(ours, task)
        row |= scores(baseline(study, residuals, task, columns, split), task, "residuals")
    row |= scores(evaluate(trained, study.vectors or study.reports, "retrieval", config=PROBE), "retrieval")
    for name in ("bank", "embeddings", "text"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "checkpoint.pt").unlink()
    return row


_measured: dict[tuple[Any, ...], Any] = {}


def baseline(study: Study, residuals: Embeddings, task: str, columns: list[str], split: dict[str, str]) -> Any:
    key = (fingerprint(residuals.vectors.tobytes().hex()), task)
    if key not in _measured:
        _measured[key] = evaluate(residuals, study.labels, task=task, columns=columns, config=PROBE, **split)
    return _measured[key]


def scores(result: Any, task: str, alias: str = "embedding") -> dict[str, float]:
    """Columns task.features.probe.metric, with .low and .high, of a result; differences as task.embedding-features.probe.metric."""
    found = {}
    for outcome in result.outcomes:
        tables = {f: s for f, s in outcome.scores.items() if f not in ("majority class",)}
        tables |= {f"{alias}-{f}": s for f, s in outcome.differences.items() if f != "majority class"}
        for features, probes in tables.items():
            features = {"embedding": alias, "compared": "untrained-mean", "embedding-compared": "embedding-untrained-mean"}.get(
                features, features
            )
            for probe, metrics in probes.items():
                for metric, value in metrics.items():
                    name = ".".join((task, features, probe, metric)).replace(" ", "_")
                    found |= {name: round(value.value, 4), f"{name}.low": round(value.low, 4), f"{name}.high": round(value.high, 4)}
    return found


# all runs


def setting(text: str) -> tuple[str, Any]:
    """KEY=VALUE as on the command line, the value as JSON or else as text."""
    key, _, value = text.partition("=")
    if key not in PARTS:
        raise SystemExit(f"{key!r} is no setting of config.py; there are {', '.join(PARTS)}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """A name in VARIANTS, or KEY=VALUE,KEY=VALUE ..., or both: NAME,KEY=VALUE."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        if "=" in part:
            found |= [setting(part)]
        elif part in VARIANTS:
            found |= VARIANTS[part]
        else:
            raise SystemExit(f"no variant {part!r}; there are {', '.join(VARIANTS)}, and KEY=VALUE")
    return text, found


def summary(rows: list[dict[str, Any]], shown: list[str]) -> None:
    """Mean and standard deviation over runs of each variant, in the order of the CSV."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[f"{row['data']} {row['variant']} [{row['set']}]"].append(row)
    print("\t".join(["variant", "runs", *shown]))
    for name, group in groups.items():
        cells = []
        for column in shown:
            values = [float(row[column]) for row in group if row.get(column)]
            cells.append(f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}" if values else "")
        print("\t".join([name, str(len(group)), *cells]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(DATA))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report-embeddings", type=Path, help="report vectors in place of the encoder's text tower")
    parser.add_argument("--variants", nargs="*", default=["default"], help="names in VARIANTS, or KEY=VALUE,KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], help="KEY=VALUE for all variants")
    parser.add_argument("--tiles", nargs="+", default=[], help="KEY=VALUE of TileConfig, pixels only")
    parser.add_argument(
        "--fold", nargs="+", default=[None], help="I/N: leave out the held-out patients, hold out part I of N of the others"
    )
    parser.add_argument("--salt", default="", help="tcga: another 35 %% of the patients, by a hash of this text and their id")
    parser.add_argument("--show", nargs="+", help="columns of the summary", default=None)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    data = DATA[options.data]
    tiles = replace(data["tiles"], **{k: json.loads(v) for k, v in (t.split("=") for t in options.tiles)}) if data["tiles"] else None
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "study.csv"
    rows: list[dict[str, Any]] = list(read_table(table)) if table.exists() else []
    done = {row["key"] for row in rows}
    for fold in options.fold:
        study = load_study(options.data, options.folder, options.out, options.report_embeddings, tiles, fold, options.salt)
        for seed in options.seeds:
            for name, changes in map(variant, options.variants):
                changes = dict(map(setting, options.set)) | changes
                config = settings(data["settings"], changes | {"seed": seed})
                key = fingerprint(options.data, asdict(config), str(tiles), fold, options.salt, str(options.report_embeddings))
                if key in done:
                    continue
                head = {"key": key, "data": options.data, "variant": name, "set": " ".join(options.set)}
                head |= {"fold": fold or "", "salt": options.salt, "seed": seed}
                rows.append(head | run(study, config, key))
                columns = list(dict.fromkeys(column for row in rows for column in row))
                write_table(table, columns, [[row.get(c, "") for c in columns] for row in rows])
                done.add(key)
                log.info("%s, seed %d, fold %s: %s s", name, seed, fold, rows[-1]["seconds"])
    recall = "retrieval.embedding.report_→_slide.recall@10"
    tasks = [f"{task}.{f}.linear.auroc" for task in data["tasks"] for f in ("embedding", "mean-pool", "untrained-mean", "residuals")]
    tasks += [f"{task}.embedding.{probe}.auroc" for task in data["tasks"] for probe in ("5-NN", f"{FEW}-shot", f"{SHOTS}-shot")]
    summary([{k: str(v) for k, v in row.items()} for row in rows], options.show or [recall, *tasks])


if __name__ == "__main__":
    main()
