"""Killed at random moments; the next run ends where an undisturbed one does."""

import json
import random
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from attack import Crash, command, doomed, dreslcl, in_child, moments
from folders import contents, sums_of, tiled

from dreslcl import trainer
from dreslcl.bank import MemoryBank, SlideFile
from dreslcl.common import ModelError, read_table
from dreslcl.model import DRESLCL
from dreslcl.tiles import TileGrid

PLACES = {  # functions after whose calls a command is killed
    "tile": ["cli.main"],
    "pretrain": ["trainer.fill_bank", "trainer.train_step", "bank.MemoryBank.write", "trainer.save_checkpoint", "trainer.end_epoch"],
    "embed": ["cli.main", "embedding.write_tiles"],
}


def assert_whole_run(out: Path, epochs: int = 2) -> None:
    """The log goes on without a gap, the bank's sums are those of its rows, and model and checkpoint belong together."""
    rows = read_table(out / "metrics.csv")
    assert [row["epoch"] for row in rows] == [str(e + 1) for e in range(epochs)]
    assert len(set(np.diff([0, *(int(row["step"]) for row in rows)]))) == 1
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    words = state["model"]["aggregator.codewords"].numpy()
    K, D = words.shape
    bank = MemoryBank(out / "bank", dim=D, codewords=K, encoder=json.loads((out / "bank" / "bank.json").read_text())["encoder"])
    files = list((out / "bank").glob("*.bank"))
    assert len(files) == 8
    for path in files:
        weights = SlideFile(path, D, K).weight.astype(np.float32)
        bank.set_codebook(words, lambda rows, weights=weights: torch.from_numpy(weights))  # as they stand beside the rows
        sums, counts = sums_of(bank, path.stem)
        bank._rebuild(bank._open(path.stem))
        again, again_counts = sums_of(bank, path.stem)
        assert np.allclose(counts, again_counts, rtol=1e-4) and np.abs(sums - again).max() <= 1e-4 * np.abs(again).max()
    assert state["epoch"] == epochs
    model = DRESLCL.load(out / "model").state_dict()
    assert all(torch.equal(model[key], value) for key, value in state["model"].items())
    assert not list(out.rglob("*.part"))


def assert_like_whole(name: str, out: Path, whole: Path) -> None:
    """The results are those of an undisturbed run."""
    assert not list(out.rglob("*.part"))
    if name == "pretrain":
        assert_whole_run(out)
    elif name == "tile":
        assert tiled(out) == tiled(whole / "tile")
    elif name == "embed":
        assert contents(out) == contents(whole / "embed")
    else:
        assert {p.name for p in out.iterdir()} == {".lock", "metrics.json", "predictions.csv", "report.html"}
        assert (out / "metrics.json").read_bytes() == (whole / "eval" / "metrics.json").read_bytes()


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PLACES)
def test_a_command_killed_at_any_moment_ends_as_an_undisturbed_run(work, whole, tmp_path, name, times):
    arguments, draw = command(name, work, whole), random.Random(times)
    calls = in_child(moments, PLACES[name], *arguments, tmp_path / "whole")
    chosen = [draw.choice([call for call in calls if call[0] == place]) for place in PLACES[name] for _ in range(times)]
    chosen = [(place, nth, draw.random() * seconds) for place, nth, seconds in chosen]

    def attack(n: int) -> None:
        out = tmp_path / f"killed{n}"
        with pytest.raises(Crash, match=f"ended with {-signal.SIGALRM}"):
            in_child(doomed, *chosen[n], *arguments, out)
        for path in out.glob("tiles/*.h5"):
            TileGrid.load(path)  # what is there is whole
        assert in_child(dreslcl, *arguments, out).code == 0
        assert_like_whole(name, out, whole)
        shutil.rmtree(out)

    with ThreadPoolExecutor(2) as pool:  # two at once
        list(pool.map(attack, range(len(chosen))))


def _killed_in_second_save(*arguments) -> None:
    """Dies between the encoder's weights and the aggregator's, of the second model it saves."""
    trainer.held_out_retrieval = lambda run: {"held_out_mrr": run.epoch / 10}  # each epoch is better
    doomed("model.save", 1, 0, *arguments)


def test_a_model_killed_while_it_replaces_an_older_one_is_never_a_mix(work, tmp_path):
    arguments = [*command("pretrain", work, tmp_path), tmp_path, "--held-out", "split=val"]
    with pytest.raises(Crash, match=f"ended with {-signal.SIGALRM}"):
        in_child(_killed_in_second_save, *arguments)
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        DRESLCL.load(tmp_path / "model")
    assert in_child(dreslcl, *arguments).code == 0
    assert DRESLCL.load(tmp_path / "model")
