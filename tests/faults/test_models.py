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

from dreslcl import trainer
from dreslcl.common import ModelError, StoreError
from dreslcl.config import RunConfig
from dreslcl.model import DRESLCL


def test_another_checkpoint_is_refused_in_one_line_and_its_code_is_never_run(cohort, whole, tmp_path):
    path, bomb, draw = tmp_path / "run" / "checkpoint.pt", Bomb(tmp_path / "ran"), random.Random(0)
    shutil.copytree(whole / "pretrain", tmp_path / "run")
    settings = RunConfig.load(tmp_path / "run" / "config.toml")
    state, data = torch.load(path, weights_only=True), path.read_bytes()
    others = [bomb, state | {"rows": bomb}, torch.zeros(3), state | {"config": "none"}, pickle.dumps(bomb)]
    others += [{k: v for k, v in state.items() if k != key} for key in ("rows", "optimizer", "best")]
    others += [data[: draw.randrange(len(data))] for _ in range(3)]
    for other in others:
        path.write_bytes(other) if isinstance(other, bytes) else torch.save(other, path)
        with refused(StoreError, "cannot be read.*delete the folder to start anew"):
            trainer.pretrain(cohort, tmp_path / "run", settings)
        assert not (tmp_path / "ran").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: random.Random(1).randrange(path.stat().st_size)])


def change(path: Path, part: str, **settings) -> None:
    config = json.loads(path.read_text())
    (config[part] if part else config).update(settings)
    path.write_text(json.dumps(config))


DAMAGES = {
    "cut settings": lambda m: cut(m / "config.json"),
    "cut weights": lambda m: cut(m / "weights.safetensors"),
    "weights with a header of 2^62 bytes": lambda m: (m / "weights.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
    "pickled weights": lambda m: (m / "weights.safetensors").write_bytes(pickle.dumps(Bomb(m / "ran"))),
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
