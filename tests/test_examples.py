"""The examples run, on a cohort of three dozen small synthetic scans."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dreslcl.synthetic import write_cohort

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    write_cohort(folder, slides=24, seed=0, side=(3, 4))
    return folder


def run(*command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_quickstart_runs_the_four_steps(cohort, tmp_path):
    tables = [str(cohort / name) for name in ("reports.csv", "labels.csv")]
    out = run("bash", str(EXAMPLES / "quickstart.sh"), str(cohort / "slides"), *tables, str(tmp_path))
    assert "AUROC" in out and "mean-pool" in out
    assert (tmp_path / "eval" / "report.html").stat().st_size > 10_000


def test_the_python_example_runs(cohort, tmp_path):
    tables = [str(cohort / name) for name in ("reports.csv", "labels.csv")]
    out = run(sys.executable, str(EXAMPLES / "python_api.py"), str(cohort / "slides"), *tables, str(tmp_path))
    assert "AUROC" in out and "nearest to 'squamous cell carcinoma': P" in out
