"""Hostile models: pickled code, cut files, a configuration of another architecture.

The same for CLAM's .pt files stands in tests/test_formats.py, for OpenCLIP's folders and weight files in tests/test_encoder.py.
"""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from folders import Bomb, refused
from test_kill import SETTINGS

from dreslcl import trainer
from dreslcl.bank import MemoryBank
from dreslcl.cohort import Cohort
from dreslcl.common import ModelError, StoreError
from dreslcl.model import DRESLCL


def test_another_checkpoint_is_refused_in_one_line_and_its_code_is_never_run(work, whole, tmp_path):
    path, bomb, draw = tmp_path / "run" / "checkpoint.pt", Bomb(tmp_path / "ran"), random.Random(0)
    shutil.copytree(whole / "pretrain", tmp_path / "run")
    cohort = Cohort.load(work).with_reports(work / "reports.csv")
    state, data = torch.load(path, weights_only=True), path.read_bytes()
    others = [bomb, state | {"rows": bomb}, torch.zeros(3), state | {"config": "none"}, pickle.dumps(bomb)]
    others += [{k: v for k, v in state.items() if k != key} for key in ("rows", "optimizer", "best")]
    others += [data[: draw.randrange(len(data))] for _ in range(3)]
    for other in others:
        path.write_bytes(other) if isinstance(other, bytes) else torch.save(other, path)
        with refused(StoreError, "cannot be read"):
            trainer.pretrain(cohort, tmp_path / "run", SETTINGS)
        assert not (tmp_path / "ran").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.Random(1).randrange(path.stat().st_size)])


def change(path: Path, part: str, **settings) -> None:
    config = json.loads(path.read_text())
    (config[part] if part else config).update(settings)
    path.write_text(json.dumps(config))


def pickled_encoder(model: Path) -> None:
    (model / "open_clip" / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": Bomb(model / "ran")}, model / "open_clip" / "open_clip_pytorch_model.bin")


def other_encoder(model: Path) -> None:
    path = model / "open_clip" / "open_clip_config.json"
    path.write_text(path.read_text().replace("test_efficientnet_gn", "test_resnet"))


DAMAGES = {
    "cut weights": lambda m: cut(m / "weights.safetensors"),
    "weights with a header of 2^62 bytes": lambda m: (m / "weights.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "pickled weights": lambda m: (m / "weights.safetensors").write_bytes(pickle.dumps(Bomb(m / "ran"))),
    "cut encoder": lambda m: cut(m / "open_clip" / "open_clip_model.safetensors"),
    "pickled encoder": pickled_encoder,
    "other architecture of the encoder": other_encoder,
    "other number of codewords": lambda m: change(m / "config.json", "model", codewords=5),
    "other width of features": lambda m: change(m / "config.json", "", dim=3),
    "unknown setting": lambda m: change(m / "config.json", "model", layers_of_attention=3),
    "settings that make no sense": lambda m: change(m / "config.json", "model", codewords=0),
    "no settings": lambda m: (m / "config.json").write_text("[]"),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_hostile_model_folder_is_refused_in_one_line(whole, tmp_path, how):
    shutil.copytree(whole / "pretrain" / "model", tmp_path / "model")
    DAMAGES[how](tmp_path / "model")
    with refused(ModelError):
        DRESLCL.load(tmp_path / "model")
    assert not (tmp_path / "model" / "ran").exists()


HEADERS = ["{", "[]", "{}", "[1]", '"x"', '{"version": 1, "dim": 128}', '{"version": 2, "dim": [], "codewords": {}, "encoder": 3}']


@pytest.mark.parametrize("header", HEADERS)
def test_a_hostile_bank_is_refused_in_one_line(tmp_path, header):
    (tmp_path / "bank.json").write_text(header)
    with refused(StoreError):
        MemoryBank(tmp_path, dim=128, codewords=4, encoder="e")
