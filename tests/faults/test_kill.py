"""SIGKILL at random moments; the next run ends where an undisturbed one does."""

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from attack import durations, in_child, kill, kills, marked
from folders import contents, sums_of, tiled

from dreslcl import embedding, report, tiles, trainer
from dreslcl.bank import MemoryBank, SlideFile
from dreslcl.cohort import Cohort
from dreslcl.common import ModelError, read_table
from dreslcl.config import EncoderConfig, ModelConfig, RunConfig, TileConfig, TrainConfig
from dreslcl.model import DRESLCL

TRIES = [1, pytest.param(20, marks=pytest.mark.slow)]
SETTINGS = RunConfig(
    EncoderConfig(),
    ModelConfig(codewords=4, width=16, depth=1),
    TrainConfig(epochs=2, batch=4, tiles=4, tile_batch=64, encoder_lr=1e-3, bank_share=1.0),
)


def tile(work: Path, out: Path) -> None:
    tiles.tile_slides(work.parent / "slides", out, TileConfig(size=64, mpp=2.0), workers=2)


def pretrain(work: Path, out: Path, held_out: bool = False) -> None:
    report.curves = lambda _, path: path.write_bytes(b"\x89PNG")  # half of the time of such a small run
    cohort = Cohort.load(work).with_reports(work / "reports.csv")
    kept, val = cohort.split("split=val" if held_out else None, work / "reports.csv")
    trainer.pretrain(kept, out, SETTINGS, held_out=val)


def embed(work: Path, out: Path, model: Path) -> None:
    embedding.embed(Cohort.load(work), out, model=model, tile_features=True, settings=TrainConfig(workers=1))


STEPS = {"fill": "fill_bank", "step": "train_step", "checkpoint": "save_checkpoint", "epoch end": "end_epoch"}
COMMANDS = {
    "tile": (tile, {}),
    "pretrain": (pretrain, {phase: (trainer, name) for phase, name in STEPS.items()}),
    "embed": (embed, {"write": (embedding, "write_tiles")}),
}


def run(pipe, name: str, *arguments) -> None:
    function, phases = COMMANDS[name]
    marked(pipe, phases, function, arguments)


def assert_whole_run(out: Path, epochs: int) -> None:
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


@pytest.mark.parametrize("times", TRIES)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_killed_at_any_moment_ends_as_an_undisturbed_run(work, whole, tmp_path, name, times):
    rest = (whole / "pretrain" / "model",) if name == "embed" else ()
    phases = durations(run, name, work, tmp_path / "whole", *rest)
    if name == "pretrain":
        phases.pop("whole")
        assert phases.keys() == STEPS.keys()
    look = {"tile": tiled, "pretrain": lambda out: assert_whole_run(out, 2), "embed": contents}[name]
    expected = look(tmp_path / "whole")

    def attack(n: int, moment: tuple[str, int, float]) -> bool:
        out = tmp_path / f"killed{n}"
        cut = kill(*moment, run, name, work, out, *rest)
        for path in out.glob("tiles/*.h5"):
            tiles.TileGrid.load(path)  # what is there is whole
        in_child(COMMANDS[name][0], work, out, *rest)
        assert look(out) == expected
        shutil.rmtree(out)
        return cut

    moments = kills(phases, times, seed=times)
    with ThreadPoolExecutor(2) as pool:  # two at once
        cut = sum(pool.map(attack, range(len(moments)), moments))
    print(f"\n{len(moments)} killed, {cut} within {', '.join(phases)}")
    assert name != "pretrain" or cut >= times  # most kills hit their phase: else this shows nothing


def _pretrain_killed_in_second_save(work: Path, out: Path) -> None:
    """Dies between the encoder's weights and the aggregator's, of the second model it saves."""
    from dreslcl import model

    save, calls = model.save, []

    def dies(weights):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(weights)

    model.save = dies
    trainer.held_out_retrieval = lambda run: {"held_out_mrr": run.epoch / 10}  # each epoch is better
    pretrain(work, out, True)


def test_a_model_killed_while_it_replaces_an_older_one_is_never_a_mix(work, tmp_path):
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGKILL}"):
        in_child(_pretrain_killed_in_second_save, work, tmp_path)
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        DRESLCL.load(tmp_path / "model")
    in_child(pretrain, work, tmp_path, True)
    assert DRESLCL.load(tmp_path / "model")
