import os
import re
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

from dreslcl import cli
from dreslcl.common import read_table, write_table


@pytest.fixture
def dreslcl(monkeypatch, capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dreslcl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def features(features, tmp_path):
    """Those slides with reports and labels."""
    write_table(tmp_path / "reports.csv", ["slide_id", "report"], [(f"s{i}", f"Finding {i}.") for i in range(8)])
    write_table(tmp_path / "labels.csv", ["slide_id", "subtype"], [(f"s{i}", "ab"[i % 2]) for i in range(8)])
    write_table(tmp_path / "bad.csv", ["slide_id", "text"], [("s0", "x")])
    return features


def fails(result, code, *words):
    assert result[0] == code, result
    assert result[1] == "" and result[2].count("\n") == 1 and "Traceback" not in result[2], result
    for word in words:
        assert word in result[2], result[2]


UNITS = {"tile": "µm per pixel", "pretrain": "GB", "embed": "Tiles in one pass", "heatmap": "Tiles in one pass", "encoders": "px"}


@pytest.mark.parametrize("name", [*UNITS, "eval", "demo"])
def test_help_of_each_command_says_what_its_options_count_and_has_at_most_twelve_of_its_own(dreslcl, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = dreslcl(name, "--help")
    assert code == 0 and err == "" and f"dreslcl {name}" in out and UNITS.get(name, "") in " ".join(out.split())
    panels = re.split(r"^╭─ (\w[\w :]*) ─", out, flags=re.MULTILINE)
    own = [text for title, text in zip(panels[1::2], panels[2::2]) if not title.startswith(("More: ", "Settings that"))]
    flags = {flag for text in own for flag in re.findall(r"^│[ *]+(--[\w-]+)", text, re.MULTILINE)} - {"--help", "--config"}
    assert (flags and len(flags) <= 12) or name == "encoders", flags


def test_version_is_printed_also_of_the_module_as_torchrun_needs(dreslcl):
    assert dreslcl("--version") == (0, "dreslcl 0.1.0\n", "")
    done = subprocess.run([sys.executable, "-m", "dreslcl", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "dreslcl 0.1.0\n"


BAGS = "--features FOLDER/features"
TRAIN = f"-q pretrain {BAGS} --out FOLDER/o --reports FOLDER"
VECTORS = f"-q pretrain {BAGS} --out FOLDER/o --report-embeddings FOLDER/vectors.npz"


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("tile FOLDER/nothing --out FOLDER/o", 2, ["nothing", "does not exist", "dreslcl tile --help"]),
        ("tile FOLDER", 2, ["Missing option", "--out"]),
        ("tile FOLDER --out FOLDER/o --mpp half", 2, ["--mpp"]),
        ("tile FOLDER --out FOLDER/o --mpp -1", 2, ["mpp must be positive, got -1.0"]),
        ("tile FOLDER --out FOLDER/o --shard 3", 2, ["--shard is I/N, like 0/4; got '3'"]),
        ("tile FOLDER --out FOLDER/o --shard 4/4", 2, ["from 0 to 3"]),
        ("tlie", 2, ["No such command"]),
        ("embed --out FOLDER/o", 2, ["--features FOLDER"]),
        (f"embed FOLDER {BAGS} --out FOLDER/o", 2, ["give either"]),
        ("pretrain --out FOLDER/o --preset huge", 2, ["--preset"]),
        ("heatmap FOLDER", 2, ["Missing option", "--embeddings"]),
        ("eval FOLDER --task subtype --out FOLDER/o", 2, ["--labels TABLE"]),
        ("eval FOLDER --task retrieval --out FOLDER/o", 2, ["--reports TABLE or --report-embeddings FILE"]),
        (f"{TRAIN}/bad.csv", 1, ["TableError", "bad.csv: needs columns report", "there are slide_id, text"]),
        (f"pretrain {BAGS} --out FOLDER/o", 2, ["--reports TABLE"]),
        (f"{VECTORS} --aggregator mean", 2, ["no aggregator 'mean'", "residual, attention, mean-mlp"]),
        (f"{TRAIN}/reports.csv --exclude split=test", 1, ["no column 'split'"]),
        ("embed FOLDER --out FOLDER/o", 1, ["slides.csv"]),
        (f"embed {BAGS} --tile-features --out FOLDER/o", 2, ["already in files"]),
    ],
)
def test_a_mistake_ends_in_one_line_that_says_what_to_do(dreslcl, tmp_path, features, words, code, said):
    fails(dreslcl(*(word.replace("FOLDER", str(tmp_path)) for word in words.split())), code, *said)


def test_features_and_report_vectors_are_forecast_train_go_on_and_refuse_other_settings_and_widths(dreslcl, tmp_path, features):
    train = ("pretrain", "--features", features, "--report-embeddings", tmp_path / "vectors.npz", "--out", tmp_path / "run")
    train = (*train, "--batch", "3", "--codewords", "3", "--joint-dim", "6", "--epochs")
    code, out, err = dreslcl(*train, "1", "--dry-run")
    assert code == 0 and out == "" and not (tmp_path / "run").exists()
    assert "8 of 8 slides have a report" in err and "320 tile features" in err and "the bank takes" in err
    code, out, _ = dreslcl(*train, "1")
    assert code == 0 and out == f"model: {tmp_path / 'run' / 'model'}\n"
    assert "going on after epoch 1 of 2; changed: epochs 1 → 2" in dreslcl(*train, "2")[2]
    fails(dreslcl("-q", *train, "2", "--tiles", "5"), 1, "started with other settings (tiles 16 → 5)")
    embed = ("-q", "embed", "--features", features, "--model", tmp_path / "run" / "model", "--out")
    code, out, _ = dreslcl(*embed, tmp_path / "emb")
    assert code == 0 and out.startswith("8 vectors of width 6")
    fails(dreslcl("-q", "heatmap", tmp_path, "--embeddings", tmp_path / "emb"), 1, "slides.csv")
    for path in features.glob("*.h5"):
        with h5py.File(path, "w") as file:
            file["features"] = np.ones((4, 9))
    fails(dreslcl(*embed, tmp_path / "emb2"), 1, "features have width 9, the model was trained on width 24")
    labels = ("--labels", tmp_path / "labels.csv", "--column", "grade", "--out", tmp_path)
    fails(dreslcl("eval", tmp_path / "emb", "--task", "subtype", *labels), 1, "grade", "subtype")


def test_encoders_are_a_table_of_width_and_input(dreslcl, no_network):
    code, out, err = dreslcl("encoders")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and rows[0] == ["encoder", "width", "input px", "10⁶ parameters", "licence"] and "local-dir:FOLDER" in err
    assert {("dreslcl-tiny", "128", "64"), ("ViT-S-16", "384", "224"), ("hf-hub:MahmoodLab/UNI", "1024", "224")} < {(*r[:3],) for r in rows}


def test_a_bad_slide_is_left_out_and_counted_and_the_code_is_1(tmp_path, dreslcl, features):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "bad.svs").write_bytes(b"not a scan")
    code, out, err = dreslcl("-q", "tile", tmp_path / "scans", "--out", tmp_path / "work")
    assert code == 1 and out.startswith("1 slides: 0 ok") and "1 of 1 slides failed" in err
    assert read_table(tmp_path / "work" / "slides.csv")[0]["status"] == "error"
    (features / "s2.h5").write_bytes(b"torn")
    code, out, err = dreslcl("-q", "embed", "--features", features, "--out", tmp_path / "emb")
    assert code == 1 and out.startswith("7 vectors of width 24")
    assert err.count("\n") == 1 and "1 of 8 slides failed, the others are done; s2: " in err and "not a readable file" in err


def test_maps_and_texts_of_the_embeddings_model_enter_the_evaluations_page(tmp_path, dreslcl, work, model):
    write_table(tmp_path / "labels.csv", ["slide_id", "subtype"], [(f"s{i}", "ab"[i // 2 % 2]) for i in range(8)])
    emb, labels = tmp_path / "emb", ("--labels", tmp_path / "labels.csv")
    assert dreslcl("-q", "embed", work, "--model", model, "--out", emb)[0] == 0
    assert dreslcl("-q", "heatmap", work, "--embeddings", emb, *labels) == (0, f"maps: {emb / 'heatmaps'}\n", "")
    protocol = ("--bootstrap", "10", "--include-seen", "--out", tmp_path / "ev")
    assert dreslcl("-q", "eval", emb, "--task", "subtype", *labels, "--folds", "2", *protocol)[0] == 0
    page = (tmp_path / "ev" / "report.html").read_text()
    assert 2 <= page.count("data:image/jpeg") <= 6 and "probability of a" in page
    code, out, err = dreslcl("-q", "eval", emb, "--task", "retrieval", "--reports", work / "reports.csv", "--compare", emb, *protocol)
    assert code == 0, err
    assert "report\tembedding − compared\tslide → report\t0.000 (0.000, 0.000)" in out


def start(*arguments, **options):
    """The command in a process of its own, stdout and stderr in one pipe."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": os.environ | {"PYTHONUNBUFFERED": "1"}}
    return subprocess.Popen([sys.executable, "-m", "dreslcl", *map(str, arguments)], **pipes | options)


def test_ctrl_c_says_how_to_go_on_also_in_a_long_step_on_threads(dreslcl, tmp_path, monkeypatch, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell is started deaf to it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr("dreslcl.tiles.tile_slides", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, _, err = dreslcl("tile", tmp_path, "--out", tmp_path / "o")
    assert code == 130 and "run the same command again" in err
    process = start("demo", "--out", tmp_path / "demo", "--slides", "400")
    assert process.stdout.readline().startswith("1/5 drawing 400")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert out.strip() == "stopped; delete the folder of --out, or choose another, and run it again"


@pytest.mark.parametrize("words", ["--help", "embed --help", "-v tile SLIDES --out OUT", "tile OUT/no"])
def test_output_that_is_no_terminal_holds_no_control_characters(tmp_path, work, words):
    words = words.replace("SLIDES", str(work.parent / "slides")).replace("OUT", str(tmp_path))
    out = start(*words.split()).communicate(timeout=60)[0]
    assert out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out), repr(out)


def test_shells_are_given_the_words_that_fit():
    words = {"_DRESLCL_COMPLETE": "complete_bash", "COMP_WORDS": "dreslcl eval --task ", "COMP_CWORD": "3"}
    program = "import sys; sys.argv = ['dreslcl']; from dreslcl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | words, timeout=60)
    assert done.stdout.split() == ["subtype", "recognition", "mutation", "retrieval", "zeroshot"]


def test_settings_come_from_a_file_and_flags_override_them(dreslcl, tmp_path, work):
    (tmp_path / "settings.toml").write_text("[tile]\nsize = 64\nmpp = 2.0\nmin_tissue = 0.9\n[eval]\nfolds = 3\n")
    tile = ("-q", "tile", work.parent / "slides", "--out", tmp_path / "work", "--config", tmp_path / "settings.toml")
    assert dreslcl(*tile, "--size", "128")[0] == 0
    with h5py.File(tmp_path / "work" / "tiles" / "s0.h5") as file:
        assert (file["coords"].attrs["patch_size"], file["coords"].attrs["mpp"]) == (128, 2.0)
        assert file["tissue_fraction"][:].min() >= 0.9
    (tmp_path / "settings.toml").write_text("[tile]\nszie = 64\n")
    fails(dreslcl(*tile), 2, "unknown key 'szie'; there are size")
