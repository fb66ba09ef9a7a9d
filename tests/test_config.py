from dataclasses import fields

import pytest

from dreslcl.common import ConfigError
from dreslcl.config import (
    PRESETS,
    TABLES,
    EncoderConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    TileConfig,
    TrainConfig,
    knob_help,
    read_knobs,
    updated,
)


@pytest.mark.parametrize("config", TABLES.values())
def test_every_knob_has_help(config):
    assert set(knob_help(config)) == {f.name for f in fields(config)}
    assert all(text.endswith(".") for text in knob_help(config).values())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_changed_knobs_survive_writing_and_reading(preset, tmp_path):
    config = updated(PRESETS[preset], train={"lr": 1e-9, "seed": 7}, encoder={"name": 'local-dir:/a "b"\\ü'})
    config.save(tmp_path / "config.toml")
    assert RunConfig.load(tmp_path / "config.toml") == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_absent_knobs_have_their_defaults_and_a_file_can_hold_every_table(tmp_path, encoding):
    (tmp_path / "c.toml").write_bytes("# é\r\n[train]\r\nlr = 1\n[tile]\nmpp = 2\n[eval]\nshots = [1, 4]\n".encode(encoding))
    assert RunConfig.load(tmp_path / "c.toml") == RunConfig(train=TrainConfig(lr=1.0))
    knobs = read_knobs(tmp_path / "c.toml")
    assert (knobs[TileConfig], knobs[EvalConfig], knobs[ModelConfig]) == ({"mpp": 2.0}, {"shots": (1, 4)}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train", "not a readable TOML"),
        ("[trian]\nlr = 1", r"unknown table \[trian\]; there are tile, encoder, model, train, eval"),
        ("[train]\nlearning_rate = 1", "unknown key 'learning_rate'; there are epochs"),
        ("[train]\nepochs = 'ten'", "epochs should be of type int, got 'ten'"),
        ("[train]\nbatch = 1", "batch must be at least 2"),
        ("[train]\nbatch = true", "batch should be of type int"),
        ("[train]\nsampling = 'widnow'", "sampling must be one of random, window, got 'widnow'"),
        ("[encoder]\npretrained = 3", "pretrained should be of type str"),
        ("[eval]\nshots = [1, 'two']", r"shots should be a list of int, got \[1, 'two'\]"),
        ("lr = 1", r"unknown table \[lr\]"),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig.load(tmp_path / "c.toml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "knobs"),
    [
        (TileConfig, {"mpp": 0.0}), (TileConfig, {"size": 3}), (TileConfig, {"overlap": 256}), (TileConfig, {"min_tissue": 1.5}),
        (EncoderConfig, {"tune": "last:x"}), (EncoderConfig, {"tune": "some"}), (ModelConfig, {"codewords": 1}),
        (ModelConfig, {"width": 10}), (TrainConfig, {"batch": 1}), (TrainConfig, {"tiles": 0}), (TrainConfig, {"epochs": 0}),
        (TrainConfig, {"bank_share": 1.1}), (TrainConfig, {"report_part": 0.0}), (EvalConfig, {"folds": 1}),
        (TrainConfig, {"tile_batch": 0}), (TrainConfig, {"temperature": 0.0}), (TrainConfig, {"lr": -1.0}),
    ],
)  # fmt: skip
def test_senseless_value_is_refused_with_the_knob_named(config, knobs):
    (name,) = knobs
    with pytest.raises(ConfigError, match=name):
        config(**knobs)
