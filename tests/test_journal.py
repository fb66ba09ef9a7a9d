"""What a run tells people: TensorBoard holds what metrics.csv holds, report.html is one escaped file about the run."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import SMALL, trainer

from dreslcl.cohort import Cohort, Member
from dreslcl.report import Journal, codebook_atlas, retrieval_examples
from dreslcl.trainer import Trainer, pretrain

QUICK = replace(SMALL, train=replace(SMALL.train, epochs=1))


def events(out):
    """name -> {step: value} as TensorBoard shows them."""
    reader = EventAccumulator(str(out), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_tensorboard_holds_every_quantity_of_metrics_csv(cohort, tmp_path):
    pretrain(cohort, tmp_path, SMALL)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = events(tmp_path)
    assert shown.keys() == rows[0].keys() - {"step"} and len(rows) == 2
    for name, points in shown.items():
        assert [step for step, _ in points] == [int(row["step"]) for row in rows], name
        np.testing.assert_allclose([value for _, value in points], [float(row[name]) for row in rows], rtol=1e-6)


def test_what_a_killed_run_logged_beyond_its_checkpoint_is_void(tmp_path):
    rows = [{"epoch": epoch, "step": 10 * epoch, "loss": float(epoch)} for epoch in (1, 2, 3)]
    killed = Journal(tmp_path)
    for n in (1, 2, 3):
        killed.write(rows[:n], picture=False)
    resumed = Journal(tmp_path)  # from the checkpoint of epoch 1, with other steps per epoch
    rows[1:] = [{"epoch": epoch, "step": 10 + 7 * (epoch - 1), "loss": 9.0} for epoch in (2, 3)]
    for n in (2, 3):
        resumed.write(rows[:n], picture=False)
    assert events(tmp_path)["loss"] == [(10, 1.0), (17, 9.0), (24, 9.0)]
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,step,loss", "1,10,1.0", "2,17,9.0", "3,24,9.0"]


def test_report_tells_about_the_run_in_one_escaped_file(cohort, tmp_path):
    evil = '<script>alert("x")</script>'
    hostile = replace(cohort, reports=tuple(f"{evil} {r}" for r in cohort.reports), notes=(*cohort.notes, evil))
    pretrain(hostile, tmp_path, QUICK)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert" in html
    for text in (
        "8 of 8 slides have a report",
        "longer than the text tower",
        "8 training slides, which the model has seen",
        "codewords = 4",
    ):
        assert text in html, text
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 1 + 4 and all(source.startswith("data:image/") for source in sources), "curves and a strip per codeword"


def test_held_out_slides_are_the_examples_where_there_are_any(cohort, work, tmp_path):
    kept, held_out = cohort.split("split=val", work / "reports.csv")
    pretrain(kept, tmp_path, QUICK, held_out=held_out)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 held-out slides, encoded by the kept model" in html
    assert "<td>s6</td>" in html and "<td>s7</td>" in html and "<td>s0</td>" not in html


def test_the_atlas_shows_the_nearest_tiles_of_different_slides(cohort, tmp_path, monkeypatch):
    made: Trainer = trainer(cohort, tmp_path)
    words = made.model.aggregator.codewords.numpy()
    shown = []
    read = made.reader.read
    monkeypatch.setattr(made.reader, "read", lambda m, index: shown.append((m, int(index[0]))) or read(m, index))
    pictures = codebook_atlas(made.bank, words, cohort, made.reader, seed=0)
    assert len(pictures) == 4 and "%" in pictures[0].caption
    rows = [made.bank.gather(m.slide_id, np.arange(m.tiles)).astype(np.float32) for m in cohort.members]
    shares = []
    for picture, start in zip(pictures, range(0, len(shown), 6)):
        k = int(re.search(r"codeword (\d+)", picture.caption)[1])
        strip, nearest = shown[start : start + 6], []
        for m, features in enumerate(rows):
            distance = ((features[:, None] - words) ** 2).sum(2)
            own = np.flatnonzero(distance.argmin(1) == k)
            if len(own):
                best = own[distance[own, k].argmin()]
                nearest.append((distance[best, k], (m, int(best))))
        assert strip[: len(nearest)] == [place for _, place in sorted(nearest)[:6]]
        shares.append(float(re.search(r"([\d.]+)%", picture.caption)[1]))
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3)


def test_strips_of_the_atlas_have_one_size_however_few_tiles_they_show(cohort, tmp_path, monkeypatch):
    made: Trainer = trainer(cohort, tmp_path)
    monkeypatch.setattr(made.bank, "codes", lambda slide, tiles: np.where((slide == "s0") & (tiles == 0), 1, 0))
    pictures = codebook_atlas(made.bank, made.model.aggregator.codewords.numpy(), cohort, made.reader, seed=0)
    assert len(pictures) == 2 and len({Image.open(io.BytesIO(p.data)).size for p in pictures}) == 1


def test_examples_run_from_the_best_rank_to_the_worst(tmp_path):
    members = tuple(Member(f"s{i}", f"p{i}", 5, tmp_path, report=i) for i in range(12))
    texts = Cohort(members, tuple(f"Report {i} " + "long " * 40 for i in range(12)))
    z = np.eye(12, dtype=np.float32)
    u = np.tril(np.ones((12, 12), np.float32), -1) + z / 2  # report i finds i other slides before its own
    table = retrieval_examples(texts, z, u)
    assert [row[:2] for row in table.rows] == [[f"s{i}", f"{i + 1} of 12"] for i in (0, 2, 4, 6, 8, 11)]
    assert {row[2] for row in table.rows} == {"s0"} and table.caption == "Median rank 6.5."
    assert table.rows[0][3].startswith("Report 0 long") and table.rows[0][3].endswith("…")
    vectors = replace(texts, reports=tuple(np.ones((1, 4), np.float32) for _ in members))
    assert retrieval_examples(vectors, z, u).rows[0][3] == "(a vector)"
