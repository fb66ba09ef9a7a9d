"""The four steps from Python: python_api.py SCANS REPORTS.csv LABELS.csv OUT (tables as in quickstart.sh)."""

import sys
from pathlib import Path

from dreslcl import Cohort, embed, evaluate, load, pretrain, tile_slides
from dreslcl.config import RunConfig


def main(scans: Path, reports: Path, labels: Path, out: Path) -> None:
    tile_slides(scans, out / "work")
    cohort = Cohort.load(out / "work", patients=labels)
    train, _ = cohort.with_reports(reports).split("split=test", reports)
    model = pretrain(train, out / "run", RunConfig())
    embeddings = embed(cohort, out / "embeddings", model=model)
    print(evaluate(embeddings, labels, "subtype", split="split"))
    similarity = embeddings.vectors @ load(model).embed_text("squamous cell carcinoma")
    print("nearest to 'squamous cell carcinoma':", embeddings.ids[similarity.argmax()])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
