"""The whole path on a synthetic cohort: draw scans and reports, then tile, pretrain, embed, evaluate. No download, no GPU."""

import logging
from pathlib import Path

from .cohort import Cohort
from .config import PRESETS, EvalConfig, TileConfig, updated
from .embedding import embed
from .errors import StoreError
from .evaluation import Result, evaluate
from .files import read_table
from .synthetic import write_cohort
from .tiles import tile_slides
from .trainer import pretrain

log = logging.getLogger(__name__)

TASKS = ("subtype", "recognition", "mutation")
TILES = TileConfig(size=64, mpp=2.0)
"""Structure of glands and sheets shows at 2 µm/px, and the tiny encoder takes 64 px."""
SETTINGS = PRESETS["tiny"]


def run_demo(out: Path, *, slides: int = 120, seed: int = 0) -> dict[str, Result]:
    """Write a synthetic cohort into `out` and run the four steps on it. Returns the evaluation of each task.

    Training sees the reports of the training patients only; test patients' slides are drawn from fields never used in training.

    Raises:
        StoreError: `out` holds a demo already.
    """
    out = Path(out)
    if (out / "run").exists():
        raise StoreError(f"{out}: holds a demo already; choose another --out, or delete it")
    log.info("1/5 drawing %d synthetic scans with reports and labels (nothing here is real tissue)", slides)
    write_cohort(out, slides=slides, seed=seed)
    log.info("2/5 dreslcl tile: finding tissue")
    tile_slides(out / "slides", out / "work", TILES)
    log.info("3/5 dreslcl pretrain: training on the reports of the training patients")
    cohort = Cohort.load(out / "work", patients=out / "labels.csv")
    train, _ = cohort.with_reports(out / "reports.csv").split("split=test", out / "reports.csv")
    settings = updated(SETTINGS, train={"seed": seed})
    model = pretrain(train, out / "run", settings)
    log.info("4/5 dreslcl embed: every tile of every slide, with the trained and with the untrained encoder")
    trained = embed(cohort, out / "embeddings", model=model)
    untrained = embed(cohort, out / "untrained", encoder=settings.encoder)
    log.info("5/5 dreslcl eval: a linear probe on the training patients, measured on the test patients")
    results = {}
    for task in TASKS:
        results[task] = evaluate(
            trained,
            out / "labels.csv",
            task=task,
            config=EvalConfig(seed=seed),
            split_column="split",
            compare=untrained,
            reports=[row for row in read_table(out / "reports.csv") if row["split"] == "train"],
        )
        results[task].save(out / "eval" / task)
    return results
