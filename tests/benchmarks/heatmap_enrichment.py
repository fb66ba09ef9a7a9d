"""How far the tiles that contribute most to a tumour slide's own class show its own tumour. Goal: 3 times its base rate.

    python tests/benchmarks/heatmap_enrichment.py DEMO [--json]

DEMO is what `dreslcl demo --out DEMO` wrote. A probe is fitted on the training patients' slide vectors; on each tumour slide of the test
patients the contributions to the logit of the slide's own class are ranked. `cells.csv` says what each tile shows. `own_over_base` is the
share of own tumour in the top decile of each slide's tiles (all slides together) over its share among all tiles; `pooled_over_base` the
same with one decile over all slides; `ceiling` what a perfect ranking could reach.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from dreslcl.cohort import Cohort
from dreslcl.common import read_table
from dreslcl.config import TrainConfig
from dreslcl.embedding import encode_slides
from dreslcl.evaluation import fit_probe
from dreslcl.heatmaps import contributions
from dreslcl.model import DRESLCL

OWN = {"LUAD": "gland", "LUSC": "squamous"}


def enrichment(demo: Path) -> dict[str, float]:
    """The ratios, and how many slides and tiles they rest on."""
    cohort, model = Cohort.load(demo / "work", patients=demo / "labels.csv"), DRESLCL.load(demo / "run" / "model")
    labels = {row["slide_id"]: row for row in read_table(demo / "labels.csv")}
    shown = {(row["slide_id"], int(row["x"]), int(row["y"])): row["kind"] for row in read_table(demo / "cells.csv")}
    features = {}
    stream = encode_slides(model.encoder, cohort, range(len(cohort)), TrainConfig(tile_batch=512, precision="fp32", workers=2), "tiles")
    for i, parts in stream:
        features[i] = np.concatenate(list(parts)).astype(np.float16).astype(np.float32)
    vectors = np.stack([model.embed_features([features[i]]) for i in range(len(cohort))])
    rows = [labels[member.slide_id] for member in cohort.members]
    names = sorted({row["subtype"] for row in rows})
    y, patients = np.array([names.index(row["subtype"]) for row in rows]), np.array([member.patient_id for member in cohort.members])
    train = np.array([row["split"] == "train" for row in rows])
    probe = fit_probe(vectors[train], y[train], patients[train])
    slopes = torch.from_numpy(probe[-1].coef_ / probe[0].scale_).float()
    own, top, value, ceiling, slides = [], [], [], [], 0
    for i, row in enumerate(rows):
        if row["split"] != "test" or row["subtype"] not in OWN:
            continue
        kinds = [shown.get((cohort.members[i].slide_id, *xy), "glass") for xy in cohort.grid(i).xy.tolist()]
        mine = np.array([kind.startswith(OWN[row["subtype"]]) for kind in kinds])
        gained = len(mine) * contributions(model.aggregator, torch.from_numpy(features[i]), slopes[y[i]])[2]
        best = max(1, round(len(mine) / 10))
        own.append(mine)
        value.append(gained)
        top.append(mine[np.argsort(-gained)[:best]])
        ceiling += [True] * min(best, mine.sum()) + [False] * max(0, best - mine.sum())
        slides += 1
    tiles, base = np.concatenate(own), np.concatenate(own).mean()
    pooled = tiles[np.argsort(-np.concatenate(value))[: round(len(tiles) / 10)]]
    ratios = {"own_over_base": np.concatenate(top).mean(), "pooled_over_base": pooled.mean(), "ceiling": np.mean(ceiling)}
    return {"slides": slides, "tiles": len(tiles), "base": round(float(base), 3)} | {
        k: round(float(v / base), 2) for k, v in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = enrichment(options.demo)
    print(json.dumps(result) if options.json else "\n".join(f"{key:20} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
