import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

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

    yield call
    logging.getLogger("dreslcl").setLevel(logging.NOTSET)


@pytest.fixture
def features(tmp_path):
    """Six slides of tile features with reports."""
    rng, folder = np.random.default_rng(0), tmp_path / "features"
    folder.mkdir()
    for i in range(6):
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"] = rng.normal(size=(20, 8)).astype(np.float32)
    write_table(tmp_path / "reports.csv", ["slide_id", "report"], [(f"s{i}", f"Finding {i}.") for i in range(6)])
    np.savez(tmp_path / "vectors.npz", **{f"s{i}": rng.normal(size=5) for i in range(6)})
    return folder


def fails(result, code, *words):
    assert result[0] == code, result
    assert result[1] == "" and result[2].count("\n") == 1 and "Traceback" not in result[2], result
    for word in words:
        assert word in result[2], result[2]


@pytest.mark.parametrize("name", ["tile", "pretrain", "embed", "eval", "demo", "encoders"])
def test_help_of_each_command_says_what_its_options_count(dreslcl, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = dreslcl(name, "--help")
    assert code == 0 and err == "" and f"dreslcl {name}" in out
    units = {
        "tile": ["µm per pixel", "pixels"],
        "pretrain": ["GB", "Tiles in one pass"],
        "embed": ["Tiles in one pass"],
        "encoders": ["px"],
    }
    for unit in units.get(name, []):
        assert unit in " ".join(out.split())


def test_version_is_printed(dreslcl):
    assert dreslcl("--version") == (0, "dreslcl 0.1.0\n", "")


def test_mistakes_in_the_command_end_in_one_line_and_code_2(dreslcl, tmp_path):
    out = ("--out", tmp_path / "o")
    fails(dreslcl("tile", tmp_path / "nothing", *out), 2, "nothing", "does not exist", "dreslcl tile --help")
    fails(dreslcl("tile", tmp_path), 2, "Missing option", "--out")
    fails(dreslcl("tile", tmp_path, *out, "--mpp", "half"), 2, "--mpp")
    fails(dreslcl("tile", tmp_path, *out, "--mpp", "-1"), 2, "mpp must be positive, got -1.0")
    fails(dreslcl("tile", tmp_path, *out, "--shard", "3"), 2, "--shard is I/N, like 0/4; got '3'")
    fails(dreslcl("tile", tmp_path, *out, "--shard", "4/4"), 2, "from 0 to 3")
    fails(dreslcl("tlie"), 2, "No such command")
    fails(dreslcl("embed", *out), 2, "--features FOLDER")
    fails(dreslcl("embed", tmp_path, "--features", tmp_path, *out), 2, "give either")
    fails(dreslcl("pretrain", *out, "--preset", "huge"), 2, "--preset")


def test_wrong_inputs_end_in_one_line(dreslcl, tmp_path, features):
    reports, out = tmp_path / "reports.csv", ("--out", tmp_path / "run")
    write_table(tmp_path / "bad.csv", ["slide_id", "text"], [("s0", "x")])
    log = dreslcl("--quiet", "pretrain", "--features", features, "--reports", tmp_path / "bad.csv", *out)
    fails(log, 1, "TableError", "bad.csv: needs columns report", "there are slide_id, text")
    fails(dreslcl("pretrain", "--features", features, *out), 2, "--reports TABLE")
    fails(dreslcl("-q", "pretrain", "--features", features, "--reports", reports, *out, "--encoder", "ViT-S-61"), 1, "near names: ViT-S-16")
    fails(dreslcl("pretrain", "--features", features, "--reports", reports, *out, "--exclude", "split=test"), 1, "no column 'split'")
    fails(dreslcl("encoders", "ViT-S-61"), 1, "near names: ViT-S-16")
    fails(dreslcl("embed", tmp_path, *out), 1, "slides.csv")
    fails(dreslcl("embed", "--features", features, "--model", tmp_path, *out), 1, "not a whole dreslcl model folder")
    fails(dreslcl("embed", "--features", features, "--tile-features", *out), 2, "already in files")
    fails(dreslcl("embed", "--features", features, "--layout", "clam", *out), 2, "add --tile-features")


def test_features_and_report_vectors_train_a_model_that_refuses_other_widths(dreslcl, tmp_path, features):
    code, out, _ = dreslcl(
        *("pretrain", "--features", features, "--report-embeddings", tmp_path / "vectors.npz", "--out", tmp_path / "run"),
        *("--epochs", "1", "--batch", "3", "--codewords", "3", "--joint-dim", "6"),
    )
    assert code == 0 and out == f"model: {tmp_path / 'run' / 'model'}\n"
    code, out, _ = dreslcl("embed", "--features", features, "--model", tmp_path / "run" / "model", "--out", tmp_path / "emb")
    assert code == 0 and out.startswith("6 vectors of width 6")
    for path in features.glob("*.h5"):
        with h5py.File(path, "w") as file:
            file["features"] = np.ones((4, 9))
    result = dreslcl("-q", "embed", "--features", features, "--model", tmp_path / "run" / "model", "--out", tmp_path / "emb2")
    fails(result, 1, "features have width 9, the model was trained on width 8")
    write_table(tmp_path / "labels.csv", ["slide_id", "subtype"], [(f"s{i}", "ab"[i % 2]) for i in range(6)])
    fails(dreslcl("eval", tmp_path / "emb", "--task", "subtype", "--out", tmp_path / "ev"), 2, "--labels TABLE")
    wrong = dreslcl(
        "eval", tmp_path / "emb", "--task", "subtype", "--labels", tmp_path / "labels.csv", "--column", "grade", "--out", tmp_path
    )
    fails(wrong, 1, "grade", "subtype")


def test_frozen_text_tower_with_random_weights_is_said_to_tell_little(dreslcl, tmp_path, features):
    train = ("pretrain", "--features", features, "--reports", tmp_path / "reports.csv", "--out", tmp_path / "run", "--text", "frozen")
    code, out, err = dreslcl("-q", *train, "--epochs", "1", "--batch", "3", "--codewords", "3")
    assert code == 0 and out.startswith("model: ")
    assert err.count("\n") == 1 and "the frozen text tower has random weights" in err and "--report-embeddings" in err


def test_dry_run_forecasts_and_writes_nothing(dreslcl, tmp_path, features):
    code, out, err = dreslcl(
        "pretrain", "--features", features, "--report-embeddings", tmp_path / "vectors.npz", "--out", tmp_path / "run", "--dry-run"
    )
    assert code == 0 and out == "" and not (tmp_path / "run").exists()
    assert "6 of 6 slides have a report" in err and "120 tile features" in err and "the bank takes" in err


def test_encoders_are_a_table_of_width_and_input(dreslcl):
    code, out, err = dreslcl("encoders")
    rows = [line.split("\t") for line in out.splitlines()]
    assert code == 0 and rows[0] == ["encoder", "width", "input px", "context tokens"] and rows[1][0] == "dreslcl-tiny"
    assert ["ViT-S-16", "384", "224", "77"] in rows and "local-dir:FOLDER" in err
    assert dreslcl("encoders", "ViT-S-16")[1].splitlines()[1].split("\t")[-2:] == ["21.8", "40.4"]


def test_tiling_with_a_bad_scan_exits_1_and_names_the_count(tmp_path, dreslcl):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "bad.svs").write_bytes(b"not a scan")
    code, out, err = dreslcl("-q", "tile", tmp_path / "scans", "--out", tmp_path / "work")
    assert code == 1 and out.startswith("1 slides: 0 ok") and "1 of 1 slides failed" in err
    assert read_table(tmp_path / "work" / "slides.csv")[0]["status"] == "error"


def test_embedding_with_a_bad_slide_does_the_others_and_exits_1_with_the_count(tmp_path, dreslcl, features):
    (features / "s2.h5").write_bytes(b"torn")
    code, out, err = dreslcl("-q", "embed", "--features", features, "--out", tmp_path / "emb")
    assert code == 1 and out.startswith("5 vectors of width 8")
    assert err.count("\n") == 1 and "1 of 6 slides failed, the others are done; s2: " in err and "not a readable file" in err


def test_heatmaps_say_what_they_need(tmp_path, dreslcl, features, model):
    out = ("--out", tmp_path / "o")
    fails(dreslcl("embed", "--features", features, *out, "--heatmaps"), 2, "--heatmaps needs --model")
    fails(dreslcl("embed", "--features", features, "--model", model, *out, "--heatmaps"), 2, "drawn over the scans")
    fails(dreslcl("embed", "--features", features, *out, "--heatmap-text", "x"), 2, "need --heatmaps")


def test_texts_are_encoded_by_the_model_of_each_embedding(tmp_path, dreslcl, work, model):
    assert dreslcl("-q", "embed", work, "--model", model, "--out", tmp_path / "emb")[0] == 0
    ask = ("-q", "eval", tmp_path / "emb", "--task", "retrieval", "--reports", work / "reports.csv", "--bootstrap", "10")
    ask = (*ask, "--include-seen", "--out", tmp_path / "ev", "--compare", tmp_path / "emb")
    code, out, err = dreslcl(*ask)
    assert code == 0, err
    assert [line for line in out.splitlines() if line.startswith("report\tembedding − compared\tslide → report\t0.000 (0.000, 0.000)")]


def test_heatmaps_from_the_command_line_enter_the_evaluations_page(tmp_path, dreslcl, work, model):
    write_table(tmp_path / "labels.csv", ["slide_id", "subtype"], [(f"s{i}", "ab"[i // 2 % 2]) for i in range(8)])
    maps = ("--heatmaps", "--heatmap-labels", tmp_path / "labels.csv")
    code, out, err = dreslcl("-q", "embed", work, "--model", model, "--out", tmp_path / "emb", *maps)
    assert (code, err) == (0, "") and out.endswith(f"maps: {tmp_path / 'emb' / 'heatmaps'}\n")
    protocol = ("--folds", "2", "--bootstrap", "10", "--include-seen")
    code, _, err = dreslcl(
        "-q", "eval", tmp_path / "emb", "--task", "subtype", "--labels", tmp_path / "labels.csv", "--out", tmp_path, *protocol
    )
    assert code == 0, err
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()


def test_ctrl_c_says_how_to_go_on(dreslcl, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("dreslcl.tiles.tile_slides", interrupt)
    code, _, err = dreslcl("tile", tmp_path, "--out", tmp_path / "o")
    assert code == 130 and "run the same command again" in err


def start(*arguments, **environment):
    """The command in a process of its own, stdout and stderr in one pipe."""
    command = [sys.executable, "-m", "dreslcl", *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    )


def test_ctrl_c_in_a_long_step_on_threads_ends_it_in_one_line(tmp_path):
    process = start("demo", "--out", tmp_path / "demo", "--slides", "400")
    assert process.stdout.readline().startswith("1/5 drawing 400")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert out.strip() == "stopped; delete the folder of --out, or choose another, and run it again"


def test_output_that_is_no_terminal_holds_no_control_characters(tmp_path, work):
    for arguments in (
        ["--help"],
        ["embed", "--help"],
        ["-v", "tile", work.parent / "slides", "--out", tmp_path],
        ["tile", tmp_path / "no"],
    ):
        out = start(*arguments).communicate(timeout=60)[0]
        assert out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", out), repr(out)


@pytest.mark.parametrize("choice", [{}, {"NO_COLOR": "1"}])
def test_a_terminal_gets_colours_unless_no_color_says_not_to(choice):
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "dreslcl", "tile", "--help"]
    process = subprocess.Popen(
        command,
        stdout=follower,
        stderr=follower,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm-256color", **choice},
    )
    os.close(follower)
    seen = b""
    with suppress(OSError):  # how a terminal ends
        while part := os.read(leader, 65536):
            seen += part
    os.close(leader)
    assert process.wait(60) == 0 and b"Tiles" in seen
    assert bool(re.search(rb"\x1b\[(\d+;)*[349]\d", seen)) == (not choice)


def test_shells_are_given_the_words_that_fit():
    words = {"_DRESLCL_COMPLETE": "complete_bash", "COMP_WORDS": "dreslcl eval --task ", "COMP_CWORD": "3"}
    program = "import sys; sys.argv = ['dreslcl']; from dreslcl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **words}, timeout=60)
    assert done.stdout.split() == ["subtype", "recognition", "mutation", "retrieval", "zeroshot"]


def test_knobs_come_from_a_file_and_flags_override_them(dreslcl, tmp_path, work):
    (tmp_path / "knobs.toml").write_text("[tile]\nsize = 64\nmpp = 2.0\nmin_tissue = 0.9\n[eval]\nfolds = 3\n")
    tile = ("-q", "tile", work.parent / "slides", "--out", tmp_path / "work", "--config", tmp_path / "knobs.toml")
    assert dreslcl(*tile, "--size", "128")[0] == 0
    with h5py.File(tmp_path / "work" / "tiles" / "s0.h5") as file:
        assert (file["coords"].attrs["patch_size"], file["coords"].attrs["mpp"]) == (128, 2.0)
        assert file["tissue_fraction"][:].min() >= 0.9
    (tmp_path / "knobs.toml").write_text("[tile]\nszie = 64\n")
    fails(dreslcl(*tile), 2, "unknown key 'szie'; there are size")


def test_package_runs_as_a_module_as_torchrun_needs():
    done = subprocess.run([sys.executable, "-m", "dreslcl", "--version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "dreslcl 0.1.0\n"
