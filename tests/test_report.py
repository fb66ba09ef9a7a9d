"""The page is one escaped file with nothing from outside; the figures draw every kind of result."""

import re

import numpy as np
import pytest
from PIL import Image
from test_evaluation import QUICK, cohort

from dreslcl.common import TableError
from dreslcl.evaluation import evaluate
from dreslcl.report import Code, Notice, Picture, Table, curves, evaluation_page, page, versions


def read(path):
    return path.read_text(encoding="utf-8")


def test_every_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script>'
    png = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(png)
    blocks = [evil, Table([evil], [[evil]], evil), Notice(evil), Code(evil), Picture(png, evil), [Picture(png, evil)]]
    page(tmp_path / "a.html", evil, {evil: blocks})
    html = read(tmp_path / "a.html")
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 13  # the title stands twice, a picture's caption twice, all else once


def test_an_evaluation_with_hostile_ids_and_classes_is_one_file_without_outside_resources(tmp_path):
    embeddings, rows = cohort(24, ("<script>alert(1)</script>", "$x^$ _b", "_c"), mean=True, seen=["s000_0"])
    result = evaluate(embeddings, rows, task="subtype", config=QUICK, compare=embeddings)
    evaluation_page(result, tmp_path / "report.html", command="dreslcl eval <EMB>")
    html = read(tmp_path / "report.html")
    assert "<script" not in html and "dreslcl eval &lt;EMB&gt;" in html
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 5 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in html and "@import" not in html
    for text in ("Protocol", "StratifiedGroupKFold", "scikit-learn", "seen in pretraining", "mean-pool", "embedding − compared"):
        assert text in html


def test_examples_show_the_pictures_that_there_are(tmp_path):
    embeddings, rows = cohort(24)
    Image.new("RGB", (2000, 1000), "pink").save(tmp_path / "map.png")
    result = evaluate(embeddings, rows, task="subtype", config=QUICK)
    evaluation_page(result, tmp_path / "r.html", command="x", pictures=dict.fromkeys(embeddings.ids[:30], tmp_path / "map.png"))
    html = read(tmp_path / "r.html")
    assert 2 <= html.count("data:image/jpeg") <= 6 and "probability of A" in html


def test_retrieval_has_its_page_too(tmp_path):
    embeddings, rows = cohort(12)
    reports = [{"slide_id": row["slide_id"], "report": row["slide_id"]} for row in rows]
    result = evaluate(embeddings, reports, task="retrieval", config=QUICK, text=embeddings.vectors)
    evaluation_page(result, tmp_path / "r.html", command="x")
    assert "recall@10" in read(tmp_path / "r.html")


def test_curves_draw_one_panel_per_group_and_skip_what_is_no_number(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,loss,val_loss,recall@1,recall@5,note\n1,2.0,2.1,0.1,0.3,warm\n2,1.5,,0.2,0.4,\n3,nan,1.4,0.3,0.5,\n"
    )
    curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("L")).min() < 200
        assert image.width == pytest.approx(2 * 3.4 * 130, abs=2)  # two panels: loss and recall
    (tmp_path / "empty.csv").write_text("epoch,note\n1,x\n")
    with pytest.raises(TableError, match="no numbers to draw"):
        curves(tmp_path / "empty.csv", tmp_path / "none.png")


def test_versions_name_python_and_the_packages():
    assert versions().startswith("Python 3.") and "dreslcl" in versions()


def test_a_precision_curve_starts_at_the_first_hit_not_at_zero():
    from dreslcl.report import _sampled

    precision = _sampled(np.array([0.0, 1, 2]), np.array([1.0, 1, 1]), "pr")  # the highest score is a miss
    assert precision[0] == precision[1] == 1 / 2 and precision[-1] == 2 / 3
