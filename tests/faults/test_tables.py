"""Hostile tables: encodings, sizes, ids that climb out of folders, formulas for spreadsheets, scripts for browsers."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from attack import dreslcl, in_child
from folders import contents, refused

from dreslcl.common import TableError, read_table
from dreslcl.embedding import Embeddings

FORMULAS = ("=cmd|'/c calc'!A1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", '=HYPERLINK("x")')
EVIL = ("<script>document.title='RAN'</script>", "<img src=x onerror=\"document.title='RAN'\">", '"><svg onload="document.title=\'RAN\'">')
EVIL += ("{{ 7*7 }}", "</td></table><iframe srcdoc=\"<script>parent.document.title='RAN'</script>\">", "javascript:document.title='RAN'")


def quoted(rows: list[list[str]]) -> str:
    """A table with every field quoted."""
    return "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in rows) + "\n"


def test_a_field_of_a_megabyte_is_read_whole_and_a_field_of_seventeen_is_refused(tmp_path):
    for size, path in ((1 << 20, tmp_path / "a.csv"), (17 << 20, tmp_path / "b.csv")):
        path.write_text(quoted([["slide_id", "report"], ["a", "x" * size]]))
    assert len(read_table(tmp_path / "a.csv")[0]["report"]) == 1 << 20
    with refused(TableError, "field larger than field limit"):
        read_table(tmp_path / "b.csv")


def test_nothing_is_written_outside_the_output_folder(work, tmp_path):
    """A hostile slides.csv whose climbing id has a grid to match, and a patient's id that climbs."""
    inside = tmp_path / "deep" / "er"
    shutil.copytree(work, inside / "work")
    shutil.copy(work / "tiles" / "s2.h5", inside / "x.h5")
    (inside / "patients.csv").write_text(quoted([["slide_id", "patient_id"], *([f"s{i}", f"../../p{i}"] for i in range(8))]))
    before = contents(tmp_path)
    by_patient = ["--patients", inside / "patients.csv", "--by", "patient", "--layout", "patho-bench"]
    in_child(dreslcl, "embed", inside / "work", *by_patient, "--out", inside / "out" / "a").says("'../../p0' cannot be an id")
    table = inside / "work" / "slides.csv"
    table.write_text(table.read_text().replace("s2,", "../../x,"))
    before["deep/er/work/slides.csv"] = (inside / "work" / "slides.csv").read_bytes()
    in_child(dreslcl, "embed", inside / "work", "--out", inside / "out" / "b").says("'../../x' cannot be an id")
    assert {key: value for key, value in contents(tmp_path).items() if not key.startswith("deep/er/out/a")} == before


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Embeddings and labels whose ids, patients and classes are all hostile texts."""
    folder, rng = tmp_path_factory.mktemp("hostile"), np.random.default_rng(0)
    names = [*FORMULAS[:4], *EVIL]
    ids = [f"{names[i % len(names)]}{i}" for i in range(40)]
    labels = [(EVIL[0], FORMULAS[0])[i % 2] for i in range(40)]
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    Embeddings(tuple(ids), tuple(ids), vectors).save(folder / "emb" / "embeddings.h5")
    header = ["slide_id", "patient_id", EVIL[1], FORMULAS[3]]
    (folder / "labels.csv").write_text(quoted([header, *([s, s, c, c] for s, c in zip(ids, labels))]))
    (folder / "reports.csv").write_text(quoted([["slide_id", "report"], *([s, f"{c} {EVIL[2]}"] for s, c in zip(ids, labels))]))
    columns = ("--column", EVIL[1], "--column", FORMULAS[3])
    evaluation = ("--task", "mutation", "--reports", folder / "reports.csv", "--bootstrap", 20, "--shots", 1, "--positive", EVIL[0])
    done = in_child(dreslcl, "eval", folder / "emb", "--labels", folder / "labels.csv", *columns, *evaluation, "--out", folder / "eval")
    assert done.code == 0, done
    return folder / "eval"


def test_html_of_hostile_texts_runs_nothing_in_a_browser(hostile, tmp_path):
    html = (hostile / "report.html").read_text()
    assert "&lt;script&gt;document.title" in html and "&lt;img src=x" in html and "<script" not in html
    assert set(json.loads((hostile / "metrics.json").read_text())["results"]) == {EVIL[1], FORMULAS[3]}
    browser = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no chromium here to open the page in")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
    flags += ["--disable-component-update", "--disable-sync", "--virtual-time-budget=2000", "--dump-dom"]

    def dom(page: Path) -> str:
        profile = f"--user-data-dir={tmp_path / page.stem}"
        done = subprocess.run([browser, *flags, profile, page.as_uri()], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    (tmp_path / "control.html").write_text(f"<title>x</title>{EVIL[0]}")
    assert "<title>RAN</title>" in dom(tmp_path / "control.html")  # the browser does run scripts
    page = dom(hostile / "report.html")
    assert "<title>dreslcl evaluation: mutation</title>" in page and "document.title='RAN'" in page
    for tag in ("<script", "<iframe", "<svg", '<img src="x'):
        assert tag not in page, tag
