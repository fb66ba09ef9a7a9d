"""The commands and Python of README and examples/ are read against the real command line; what needs no outside data also runs."""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer

from dreslcl.cli import app
from dreslcl.config import ModelConfig, RunConfig, TrainConfig
from dreslcl.demo import write_cohort

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENTS = [ROOT / "README.md", EXAMPLES / "lung_cohort.md"]
SCRIPTS = [EXAMPLES / "quickstart.sh", EXAMPLES / "slurm_pretrain.sh"]


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text):
    """The words of each `dreslcl ...` in a shell text, what torchrun starts included."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        for n, word in enumerate(words):
            if Path(word).name == "dreslcl" and "pip" not in word and (n == 0 or words[n - 1] in ("-m", "&&")):
                yield words[n + 1 :]


def check_command(words):
    """Raise where the command line does not know a command, a flag or a choice, or lacks a required one."""
    command = typer.main.get_command(app).commands[words[0]]
    given = command.make_parser(command.context_class(command, info_name=words[0])).parse_args(words[1:])[0]
    for parameter in command.params:
        assert not parameter.required or given.get(parameter.name), f"{words}: {parameter.name} is missing"
        kind = parameter.type_descriptor.annotation
        choices = [choice for part in (kind, *get_args(kind)) if get_origin(part) is Literal for choice in get_args(part)]
        if choices and parameter.name in given:
            assert given[parameter.name] in choices, f"{words}: {parameter.name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_what_the_command_line_knows(document):
    found = [words for block in blocks(document, "bash") for words in commands(block)]
    assert len(found) >= 7
    for words in found:
        check_command(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_of_documents_are_there(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        assert target.startswith("https://") or (document.parent / target).is_file(), target
    for block in blocks(document, "python"):
        compile(block, document.name, "exec")


def test_wrong_words_are_told_apart():
    for wrong in ("embed work --otu emb", "embed work", "eval emb --task subtyp --out e", "tiel scans --out work"):
        with pytest.raises(Exception, match=r"otu|out|task|tiel"):
            check_command(wrong.split())


def run(*command: str, cwd: Path | None = None, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_start_commands_that_exist(script, tmp_path):
    """Runs the script with stand-ins that write down how they were called."""
    (tmp_path / "bin").mkdir()
    for name in ("dreslcl", "torchrun"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n')
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nexec "$@"\n')
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/bash\nprintf 'node1\\nnode2\\n'\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    run("bash", str(script), "a b", "r.csv", "l.csv", "o", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **slurm)
    calls = (tmp_path / "calls").read_text()
    found = list(commands(calls))
    assert len(found) == (4 if script.name == "quickstart.sh" else 1) and any("a b" in words for words in found)
    for words in found:
        check_command([w for w in words if w != "o"] if script.name == "slurm_pretrain.sh" else words)
    if "torchrun" in calls:
        from torch.distributed.run import get_args_parser

        torchrun = get_args_parser().parse_args(shlex.split(calls)[1:])
        assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint, torchrun.module) == ("2", "4", "node1:29500", True)


def test_the_table_of_labels_in_the_lung_recipe_comes_from_a_sample_sheet(tmp_path):
    header = ["File ID", "File Name", "Data Category", "Data Type", "Project ID", "Case ID", "Sample ID"]
    names = [("TCGA-05-4244-01Z-00-DX1.A.svs", "TCGA-LUAD"), ("TCGA-18-3406-01Z-00-DX1.B.svs", "TCGA-LUSC"), ("notes.txt", "TCGA-LUSC")]
    lines = [
        "\t".join(header),
        *("\t".join(["id", name, "Biospecimen", "Slide Image", project, name[:12], "s"]) for name, project in names),
    ]
    (tmp_path / "sample_sheet.tsv").write_text("\n".join(lines) + "\n")
    run(sys.executable, "-c", blocks(EXAMPLES / "lung_cohort.md", "python")[0], cwd=tmp_path)
    with (tmp_path / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["slide_id"], r["patient_id"], r["subtype"], r["split"]) for r in rows] == [
        ("TCGA-05-4244-01Z-00-DX1.A", "TCGA-05-4244", "LUAD", "test"),
        ("TCGA-18-3406-01Z-00-DX1.B", "TCGA-18-3406", "LUSC", "train"),
    ]
    assert (tmp_path / "test_patients.txt").read_text() == "TCGA-05-4244\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What `dreslcl demo` leaves, of three dozen small scans: slides, tables and the settings of its run, here shorter."""
    folder = tmp_path_factory.mktemp("examples") / "demo"
    write_cohort(folder, slides=24, seed=0, side=(3, 4))
    RunConfig(model=ModelConfig(codewords=4, width=32), train=TrainConfig(epochs=2, tiles=8)).save(folder / "run" / "config.toml")
    return folder


def test_the_four_commands_of_the_readme_run(demo, tmp_path):
    (tmp_path / "demo").symlink_to(demo)
    (block,) = [b for b in blocks(ROOT / "README.md", "bash") if "dreslcl tile demo/slides" in b]
    (tmp_path / "dreslcl").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m dreslcl "$@"\n')
    (tmp_path / "dreslcl").chmod(0o755)
    out = run("bash", "-e", "-c", block, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "24 slides: 24 ok" in out and "model: run/model" in out and "24 vectors of width 128" in out
    assert "AUROC" in out and "mean-pool" in out
    assert (tmp_path / "eval" / "report.html").stat().st_size > 10_000


def test_the_python_of_the_readme_runs(demo, tmp_path):
    (tmp_path / "demo").symlink_to(demo)
    (block,) = blocks(ROOT / "README.md", "python")
    assert "AUROC" in run(sys.executable, "-c", block, cwd=tmp_path)


def test_the_python_example_runs(demo, tmp_path):
    tables = [str(demo / name) for name in ("reports.csv", "labels.csv")]
    out = run(sys.executable, str(EXAMPLES / "python_api.py"), str(demo / "slides"), *tables, str(tmp_path))
    assert "AUROC" in out and "nearest to 'squamous cell carcinoma': P" in out


def test_every_block_runs_here_or_names_what_it_needs():
    """Blocks of README that no test runs, each with the reason; a new block belongs in one of the two."""
    runs = ("dreslcl tile demo/slides",)
    needs = {
        "pip install . ": "the demo: minutes, by hand",
        'pip install -e ".[dev]"': "this suite",
        "--features FEATURES": "features of another tool; the same flags run in test_cli.py",
        "torchrun --nproc-per-node": "several processes; run in test_trainer.py",
    }
    for block in blocks(ROOT / "README.md", "bash"):
        assert sum(key in block for key in (*runs, *needs)) == 1, block
