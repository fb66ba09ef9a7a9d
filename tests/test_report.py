"""A page is one escaped file with nothing from outside; the figures draw every kind of result; the journal holds all of a run."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from test_evaluation import QUICK, cohort, texts  # noqa: F401 (a fixture)
from test_trainer import SMALL

from dreslcl import report
from dreslcl.bank import MemoryBank
from dreslcl.cohort import Cohort, SlideRecord, TileReader
from dreslcl.common import ConfigError, read_table
from dreslcl.evaluation import evaluate
from dreslcl.trainer import pretrain

EVIL = '<script>alert("x")</script>'


def read(path):
    html = path.read_text(encoding="utf-8")
    assert "<script" not in html and "url(" not in html and "@import" not in html
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', html))
    return html


def test_every_text_is_escaped(tmp_path):
    png = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(png)
    blocks = [EVIL, report.Table([EVIL], [[EVIL]], EVIL), report.Picture(png, EVIL), [report.Picture(png, EVIL)]]
    report.page(tmp_path / "a.html", EVIL, {EVIL: blocks, "Warnings": [EVIL]}, EVIL)
    html = read(tmp_path / "a.html")
    assert re.search(r"<p>Python 3\.\S+, dreslcl \S+, numpy ", html)
    assert html.count("&lt;script&gt;") == 13  # the title stands twice, a picture's caption twice, all else once


def test_an_evaluation_with_hostile_ids_and_classes_is_one_file_without_outside_resources(tmp_path):
    embeddings, rows = cohort(24, (EVIL, "$x^$ _b", "_c"), mean=True, seen=["s000_0"])
    result = evaluate((embeddings, embeddings), rows, "subtype", config=QUICK)
    report.evaluation_page(result, tmp_path / "report.html", command="dreslcl eval <EMB>")
    html = read(tmp_path / "report.html")
    assert html.count("data:image/png") == 5 and "dreslcl eval &lt;EMB&gt;" in html
    for text in ("Protocol", "StratifiedGroupKFold", "scikit-learn", "seen in pretraining", "mean-pool", "embedding − compared"):
        assert text in html


def test_a_page_starts_with_the_result_in_words(tmp_path, texts):  # noqa: F811
    embeddings, rows = cohort(24, ("nonMSIH", "MSIH"), mean=True)
    result = evaluate((embeddings, embeddings), rows, "mutation", columns=["subtype"], config=QUICK)
    said = report.in_words(result.outcomes[0], "mutation")
    start = (
        r"The slide embedding separates MSIH from nonMSIH \(subtype\) with AUROC 0\.\d\d \(0\.\d\d to \d\.\d\d\); the second embedding 0"
    )
    assert re.match(start, said) and said.endswith(" on 48 slides.")
    assert "difference +0.00 (+0.00 to +0.00): not told apart on 48 slides; mean pooling 0." in said
    report.evaluation_page(result, tmp_path / "r.html", command="x")
    html = read(tmp_path / "r.html")
    assert html.index(said) < html.index("data:image/png") < html.index("<table") and "subtype (positive: MSIH)" in html
    assert all("(positive: MSIH)" in row[0] for row in result.table()[1])
    (three,) = evaluate(*cohort(24, ("a", "b", "c"), signal=9), "subtype", config=QUICK).outcomes
    many = "tells 'a', 'b', 'c' apart (subtype; mean of each class against the rest) with AUROC 1.00"
    assert many in report.in_words(three, "subtype")
    texts |= dict(zip(embeddings.ids, embeddings.vectors))
    result = evaluate(embeddings, [{"slide_id": i, "report": i} for i in embeddings.ids], "retrieval", config=QUICK)
    said = report.in_words(result.outcomes[0], "retrieval")
    assert said == "Given a report, its slide is among the first 10 of 48 with frequency 1.00 (1.00 to 1.00); a random order gives 0.38."
    report.evaluation_page(result, tmp_path / "r.html", command="x")
    assert "recall@10" in read(tmp_path / "r.html")


def test_a_precision_curve_starts_at_the_first_hit_not_at_zero():
    precision = report._sampled(np.array([0.0, 1, 2]), np.array([1.0, 1, 1]), "pr")  # the highest score is a miss
    assert precision[0] == precision[1] == 1 / 2 and precision[-1] == 2 / 3


# ---- the run


def test_curves_draw_one_panel_per_group_and_skip_what_is_no_number(tmp_path):
    first, second = {"loss": 2.0, "recall@1": 0.1}, {"recall@5": 0.4, "loss": np.nan}
    report.curves([{"epoch": 1, "step": 4, **first}, {"epoch": 2, "step": 8, **second}], tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("L")).min() < 200
        assert image.width == pytest.approx(2 * 3.4 * 140, abs=2)  # two panels: loss and recall


def events(out):
    """name -> [(step, value)] as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(out), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def test_tensorboard_holds_every_quantity_of_metrics_csv_and_what_a_killed_run_logged_beyond_its_checkpoint_is_void(tmp_path):
    rows = [{"epoch": epoch, "step": 10 * epoch, "loss": float(epoch)} for epoch in (1, 2, 3)]
    killed = report.Journal(tmp_path, tensorboard=True)
    for n in (1, 2, 3):
        killed.write(rows[:n], picture=False)
    resumed = report.Journal(tmp_path, tensorboard=True)  # from the checkpoint of epoch 1, with other steps per epoch
    rows[1:] = [{"epoch": epoch, "step": 10 + 7 * (epoch - 1), "loss": 9.0, "lr": 0.5} for epoch in (2, 3)]
    for n in (2, 3):
        resumed.write(rows[:n], picture=n == 3)
    assert events(tmp_path)["loss"] == [(10, 1.0), (17, 9.0), (24, 9.0)] and events(tmp_path).keys() == {"epoch", "loss", "lr"}
    assert (tmp_path / "metrics.csv").read_text().split() == ["epoch,step,loss,lr", "1,10,1.0,", "2,17,9.0,0.5", "3,24,9.0,0.5"]
    assert (tmp_path / "curves.png").exists()


def test_a_journal_without_tensorboard_writes_no_events_and_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report.Journal(tmp_path).write([{"epoch": 1, "step": 1, "loss": 2.0}], picture=True)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv", "curves.png"}
    with pytest.raises(ConfigError, match=r"pip install 'dreslcl\[tensorboard\]'"):
        report.Journal(tmp_path, tensorboard=True)


def test_the_page_of_a_run_tells_about_it_in_one_escaped_file(cohort, work, tmp_path):
    hostile = replace(cohort, reports=tuple(f"{EVIL} {r}" for r in cohort.reports), notes=(*cohort.notes, EVIL))
    kept, held_out = hostile.split("split=val", work / "reports.csv")
    pretrain(kept, tmp_path, replace(SMALL, train=replace(SMALL.train, epochs=1)), held_out=held_out)
    html = read(tmp_path / "report.html")
    assert "&lt;script&gt;alert" in html and html.count("data:image/") == 1 + 4, "curves and a strip per codeword"
    which = "2 held-out slides, encoded by the kept model"
    for text in ("8 of 8 slides have a report", which, "codewords = 4", "<td>s6</td>", "<td>s7</td>"):
        assert text in html and "<td>s0</td>" not in html, text
    (row,) = read_table(tmp_path / "metrics.csv")
    assert float(row["held_out_recall@5"]) == 1 and 0.5 <= float(row["held_out_mrr"]) <= 1


def test_a_run_that_went_badly_is_told_what_to_try_and_a_good_one_is_told_so():
    good = {"loss": 1.0, "row_cosine": 0.95, "codeword_use": 0.6, "effective_rank": 30.0, "held_out_mrr": 0.5}
    assert "looks well" in report.health([good] * 20)[0] and "looks well" in report.health([{"loss": 1.0}])[0]
    bad = {"row_cosine": 0.5, "codeword_use": 0.06, "effective_rank": 1.2, "held_out_mrr": 0.1}
    for name, value in bad.items():
        (said,) = report.health([good] * 19 + [good | {name: value}])
        assert f"{value / 0.5 if name == 'held_out_mrr' else value:.2f}. Try" in said
    (said,) = report.health([good | {"loss": 2.0 - i / 20} for i in range(20)])
    assert "the loss still falls" in said and "--epochs" in said


def test_the_atlas_shows_the_nearest_tiles_of_different_slides_in_strips_of_one_size(cohort, tmp_path, spy):
    rng, words = np.random.default_rng(0), np.eye(4, 6, dtype=np.float32)
    rows = {m.slide_id: rng.integers(-8, 9, (m.tiles, 6)).astype(np.float16) / 8 for m in cohort.members}  # exact in float16
    rows["s0"][0] = 9 * words[3]
    for slide in rows:
        rows[slide][:, 3] -= 9 * (np.arange(len(rows[slide])) + (slide != "s0") > 0)  # codeword 3 has a single tile
    bank, reader = MemoryBank(tmp_path, dim=6, codewords=4, encoder="e"), TileReader(cohort)
    bank.create()
    for slide, features in rows.items():
        bank.fill(slide, features, len(features), "mark")
    bank.set_codebook(words)
    calls = spy(reader, "read")
    pictures = report.codebook_atlas(bank, words, cohort, range(8), reader, seed=0)
    assert len(pictures) == 4 and len({p.shown.size for p in pictures}) == 1
    numbers = [int(re.search(r"codeword (\d+)", p.caption)[1]) for p in pictures]
    shares = [float(re.search(r"([\d.]+)%", p.caption)[1]) for p in pictures]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.3) and numbers[-1] == 3
    shown = iter((member, int(tile[0])) for member, tile in calls)
    for k in numbers:
        nearest = []
        for m, (slide, features) in enumerate(rows.items()):
            own = np.flatnonzero(bank.read(slide, np.arange(len(features)))[1] == k)
            distance = ((features[own].astype(np.float32) - words[k]) ** 2).sum(1)
            nearest += [(float(distance.min()), (m, int(own[distance.argmin()])))] if len(own) else []
        assert [next(shown) for _ in nearest[:6]] == [place for _, place in sorted(nearest)[:6]]
        assert len(nearest) == (1 if k == 3 else 8)


def test_examples_run_from_the_best_rank_to_the_worst(tmp_path):
    members = tuple(SlideRecord(f"s{i}", f"p{i}", 5, tmp_path, report=i) for i in range(12))
    reports = Cohort(members, tuple(f"Report {i} " + "long " * 40 for i in range(12)))
    z = np.eye(12, dtype=np.float32)
    u = np.tril(np.ones((12, 12), np.float32), -1) + z / 2  # report i finds i other slides before its own
    table = report.retrieval_examples(reports, z, u)
    assert [row[:2] for row in table.rows] == [[f"s{i}", f"{i + 1} of 12"] for i in (0, 2, 4, 6, 8, 11)]
    assert {row[2] for row in table.rows} == {"s0"} and table.caption == "Median rank 6.5."
    assert table.rows[0][3].startswith("Report 0 long") and table.rows[0][3].endswith("…")
    vectors = replace(reports, reports=tuple(np.ones((1, 4), np.float32) for _ in members))
    assert report.retrieval_examples(vectors, z, u).rows[0][3] == "(a vector)"
