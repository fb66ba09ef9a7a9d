"""The commands and Python of README and examples/ are read against the real command line; what needs no outside data also runs."""

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
from dreslcl.common import read_table, write_table
from dreslcl.config import ModelConfig, RunConfig, TrainConfig
from dreslcl.demo import write_cohort

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DOCUMENTS = [ROOT / "README.md", EXAMPLES / "lung_cohort.md"]
SCRIPTS = {"quickstart.sh": 4, "slurm_pretrain.sh": 1}
RUNS = "dreslcl tile demo/slides"
BY_HAND = ("pip install . ", 'pip install -e ".[dev]"')  # the demo, minutes long, and this suite
ELSEWHERE = ("--features FEATURES", "torchrun --nproc-per-node")  # their flags run in test_cli.py and test_trainer.py


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(text):
    """The words of each `dreslcl ...` in a shell text, what torchrun starts included."""
    for line in text.replace("\\\n", " ").splitlines():
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
        assert not choices or given.get(parameter.name, choices[0]) in choices, f"{words}: {parameter.name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_links_and_python_of_documents_are_good(document):
    found = [words for block in blocks(document, "bash") for words in commands(block)]
    assert len(found) >= 7
    for block in blocks(document, "bash") if document.name == "README.md" else ():  # a new block gets a test, or its reason above
        assert sum(key in block for key in (RUNS, *BY_HAND, *ELSEWHERE)) == 1, block
    for words in found:
        check_command(words)
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", document.read_text(encoding="utf-8")):
        target = "".join(target)
        assert target.startswith("https://") or (document.parent / target).is_file(), target
    for block in blocks(document, "python"):
        compile(block, document.name, "exec")


@pytest.mark.parametrize("wrong", ["embed work --otu emb", "embed work", "eval emb --task subtyp --out e", "tiel scans --out work"])
def test_wrong_words_are_told_apart(wrong):
    with pytest.raises(Exception, match=r"otu|out|task|tiel"):
        check_command(wrong.split())


def run(*command: object, cwd: Path | None = None, **variables: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=cwd, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start_commands_that_exist(script, tmp_path):
    """Runs the script with stand-ins that write down how they were called."""
    (tmp_path / "bin").mkdir()
    note = f'#!/bin/bash\nprintf "%q " $(basename "$0") "$@" >> {tmp_path}/calls; echo >> {tmp_path}/calls\n'
    stand_ins = {"dreslcl": note, "torchrun": note, "srun": '#!/bin/bash\nexec "$@"\n', "scontrol": "#!/bin/bash\necho node1\necho node2\n"}
    for name, text in stand_ins.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "7"}
    rest = ["l.csv", "o"] if script == "quickstart.sh" else ["run", "--tune", "none"]
    run("bash", EXAMPLES / script, "a b", "r.csv", *rest, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", **slurm)
    calls = (tmp_path / "calls").read_text()
    found = list(commands(calls))
    assert len(found) == SCRIPTS[script] and any("a b" in words for words in found)
    for words in found:
        check_command(words)
    if "torchrun" in calls:
        from torch.distributed.run import get_args_parser

        torchrun = get_args_parser().parse_args(shlex.split(calls)[1:])
        assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint, torchrun.module) == ("2", "4", "node1:29500", True)


def test_the_table_of_labels_in_the_lung_recipe_comes_from_a_sample_sheet(tmp_path):
    names = [("TCGA-05-4244-01Z-00-DX1.A.svs", "TCGA-LUAD"), ("TCGA-18-3406-01Z-00-DX1.B.svs", "TCGA-LUSC"), ("notes.txt", "TCGA-LUSC")]
    lines = ["File ID\tFile Name\tProject ID\tCase ID", *(f"id\t{name}\t{project}\t{name[:12]}" for name, project in names)]
    (tmp_path / "sample_sheet.tsv").write_text("\n".join(lines) + "\n")
    run(sys.executable, "-c", blocks(EXAMPLES / "lung_cohort.md", "python")[0], cwd=tmp_path)
    first, second = (" ".join(row.values()) for row in read_table(tmp_path / "labels.csv"))
    assert first == "TCGA-05-4244-01Z-00-DX1.A TCGA-05-4244 LUAD test"
    assert second == "TCGA-18-3406-01Z-00-DX1.B TCGA-18-3406 LUSC train"
    assert (tmp_path / "test_patients.txt").read_text() == "TCGA-05-4244\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """What `dreslcl demo` leaves, of two dozen small scans: slides, tables and the settings of its run, here shorter."""
    folder = tmp_path_factory.mktemp("examples") / "demo"
    write_cohort(folder, slides=24, seed=0, side=(3, 4))
    RunConfig(model=ModelConfig(codewords=4, width=32), train=TrainConfig(epochs=2, tiles=8)).save(folder / "run" / "config.toml")
    return folder


def test_the_four_commands_and_the_python_of_the_readme_run(demo, tmp_path):
    (tmp_path / "demo").symlink_to(demo)
    (block,) = [b for b in blocks(ROOT / "README.md", "bash") if RUNS in b]
    (tmp_path / "dreslcl").write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -m dreslcl "$@"\n')
    (tmp_path / "dreslcl").chmod(0o755)
    out = run("bash", "-e", "-c", block, cwd=tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    for words in ("24 slides: 24 ok", "model: run/model", "24 vectors of width 512", "AUROC", "mean-pool"):
        assert words in out
    assert (tmp_path / "eval" / "report.html").stat().st_size > 10_000
    (block,) = blocks(ROOT / "README.md", "python")
    assert "AUROC" in run(sys.executable, "-c", block, cwd=tmp_path)


def test_the_python_example_runs(demo, tmp_path):
    tables = [demo / name for name in ("reports.csv", "labels.csv")]
    out = run(sys.executable, EXAMPLES / "python_api.py", demo / "slides", *tables, tmp_path)
    assert "AUROC" in out and "nearest to 'squamous cell carcinoma': P" in out


def test_an_aggregator_of_ones_own_goes_through_pretrain_embed_and_eval(work, tmp_path):
    command, model, emb = (sys.executable, EXAMPLES / "own_aggregator.py"), tmp_path / "run" / "model", tmp_path / "emb"
    train = ("--epochs", 1, "--batch", 4, "--tiles", 4, "--codewords", 4, "--aggregator", "max")
    assert "model: " in run(*command, "pretrain", work, "--reports", work / "reports.csv", *train, "--out", tmp_path / "run")
    assert "8 vectors of width 512" in run(*command, "embed", work, "--model", model, "--out", emb)
    write_table(tmp_path / "labels.csv", ["slide_id", "subtype"], [(f"s{i}", "ab"[i % 2]) for i in range(8)])
    probe = ("--task", "subtype", "--folds", 2, "--bootstrap", 10, "--include-seen", "--out", tmp_path / "eval")
    assert "AUROC" in run(*command, "eval", emb, "--labels", tmp_path / "labels.csv", *probe)
