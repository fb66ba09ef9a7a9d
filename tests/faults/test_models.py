"""Hostile models: pickled code, cut files, a configuration of another architecture.

The same for CLAM's .pt files stands in tests/test_features.py, for OpenCLIP's folders and weight files in tests/test_encoder.py.
"""

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kill import SETTINGS

from dreslcl import trainer
from dreslcl.bank import MemoryBank
from dreslcl.cohort import Cohort
from dreslcl.common import ModelError, StoreError
from dreslcl.model import DRESLCL


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def run(whole) -> Path:
    return whole / "pretrain"


@pytest.fixture
def resume(work, run, tmp_path):
    """Put another checkpoint in the run's place and go on."""
    shutil.copytree(run, tmp_path / "run")
    cohort = Cohort.load(work).with_reports(work / "reports.csv")

    def call(write):
        write(tmp_path / "run" / "checkpoint.pt")
        with pytest.raises(StoreError, match="cannot be resumed") as caught:
            trainer.pretrain(cohort, tmp_path / "run", SETTINGS, resume=True)
        assert "\n" not in str(caught.value)

    return call


def test_pickled_code_in_a_checkpoint_is_never_run(run, resume, tmp_path):
    state, bomb = torch.load(run / "checkpoint.pt", weights_only=True), Bomb(tmp_path / "ran")
    resume(lambda path: torch.save(bomb, path))
    resume(lambda path: torch.save(state | {"rows": bomb}, path))
    resume(lambda path: path.write_bytes(pickle.dumps(bomb)))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_another_shape_or_cut_anywhere_is_refused_in_one_line(run, resume):
    state, data, draw = torch.load(run / "checkpoint.pt", weights_only=True), (run / "checkpoint.pt").read_bytes(), random.Random(0)
    resume(lambda path: torch.save(torch.zeros(3), path))
    for key in ("rows", "visits", "best"):
        resume(lambda path, key=key: torch.save({k: v for k, v in state.items() if k != key}, path))
    resume(lambda path: torch.save(state | {"visits": "none"}, path))
    for _ in range(3):
        resume(lambda path: path.write_bytes(data[: draw.randrange(len(data))]))


def damage(folder: Path, how: str) -> None:
    weights, config = folder / "weights.safetensors", json.loads((folder / "config.json").read_text())
    if how == "cut weights":
        weights.write_bytes(weights.read_bytes()[: random.Random(1).randrange(weights.stat().st_size)])
    elif how == "weights with a header of 2^62 bytes":
        weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif how == "pickled weights":
        weights.write_bytes(pickle.dumps(Bomb(folder / "ran")))
    elif how == "cut encoder":
        encoder = folder / "open_clip" / "open_clip_model.safetensors"
        encoder.write_bytes(encoder.read_bytes()[:5000])
    elif how == "pickled encoder":
        (folder / "open_clip" / "open_clip_model.safetensors").unlink()
        torch.save({"state_dict": Bomb(folder / "ran")}, folder / "open_clip" / "open_clip_pytorch_model.bin")
    elif how == "other number of codewords":
        config["model"]["codewords"] *= 2
    elif how == "other width of features":
        config["dim"] += 1
    elif how == "no count term":
        config["model"]["count_term"] = False
    elif how == "unknown setting":
        config["model"]["layers_of_attention"] = 3
    elif how == "settings that make no sense":
        config["model"]["heads"] = 7
    elif how == "no settings":
        config = []
    elif how == "other architecture of the encoder":
        path = folder / "open_clip" / "open_clip_config.json"
        path.write_text(path.read_text().replace("test_efficientnet_gn", "test_resnet"))
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "how",
    [
        "cut weights", "weights with a header of 2^62 bytes", "pickled weights", "cut encoder", "pickled encoder",
        "other number of codewords",
        "other width of features", "no count term", "unknown setting", "settings that make no sense", "no settings",
        "other architecture of the encoder",
    ],
)  # fmt: skip
def test_a_hostile_model_folder_is_refused_in_one_line(run, tmp_path, how):
    shutil.copytree(run / "model", tmp_path / "model")
    damage(tmp_path / "model", how)
    with pytest.raises(ModelError) as caught:
        DRESLCL.load(tmp_path / "model")
    assert "\n" not in str(caught.value) and not (tmp_path / "model" / "ran").exists()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"version": 1, "dim": 3}', '{"version": 1, "dim": 8, "codewords": 2, "shards": ["."], "spans": {"a": 3}}']
)
def test_a_hostile_bank_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "bank.json").write_text(text)
    with pytest.raises(StoreError) as caught:
        MemoryBank.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_pickled_code_in_a_codebook_is_never_run(run, tmp_path):
    shutil.copytree(run / "bank", tmp_path / "bank")
    np.savez(tmp_path / "bank" / "codebook.npz", codewords=np.array([Bomb(tmp_path / "ran")], dtype=object), fingerprint="x")
    for data in (None, b"PK cut"):
        if data:
            (tmp_path / "bank" / "codebook.npz").write_bytes(data)
        with pytest.raises(StoreError) as caught:
            MemoryBank.open(tmp_path / "bank")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
