import pytest
from folders import refused

from dreslcl.common import ConfigError
from dreslcl.config import PRESETS, TABLES, RunConfig, TrainConfig, read_settings, updated


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_changed_settings_survive_writing_and_reading(preset, tmp_path):
    config = updated(PRESETS[preset], train={"lr": 1e-9, "seed": 7}, encoder={"name": 'local-dir:/a "b"\\ü'})
    config.save(tmp_path / "config.toml")
    assert RunConfig.load(tmp_path / "config.toml") == config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_absent_settings_have_their_defaults_and_a_file_can_hold_every_table(tmp_path, encoding):
    (tmp_path / "c.toml").write_bytes("# é\r\n[train]\r\nlr = 1\n[tile]\nmpp = 2\n[eval]\nshots = [1, 4]\n".encode(encoding))
    assert RunConfig.load(tmp_path / "c.toml") == RunConfig(train=TrainConfig(lr=1.0))
    settings = read_settings(tmp_path / "c.toml")
    assert settings == {"tile": {"mpp": 2.0}, "encoder": {}, "model": {}, "train": {"lr": 1.0}, "eval": {"shots": (1, 4)}}


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
    with refused(ConfigError, message):
        RunConfig.load(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("table", "name", "value", "rule"),
    [
        ("tile", "mpp", 0.0, "positive"), ("tile", "size", 3, "at least 16 px"), ("tile", "overlap", 256, "less than size"),
        ("tile", "min_tissue", 1.5, "from 0 to 1"), ("tile", "threshold", 1.0, "between 0 and 1"),
        ("encoder", "tune", "last:x", "all, none or last:N"), ("encoder", "tune", "some", "all, none or last:N"),
        ("model", "codewords", 1, "from 2 to 65,535"), ("model", "width", 10, "a multiple of 4"),
        ("train", "batch", 1, "at least 2 slides"), ("train", "tiles", 0, "at least 1"), ("train", "epochs", 0, "at least 1"),
        ("train", "bank_share", 1.1, "from 0 to 1"), ("train", "report_part", 0.0, "above 0 and at most 1"),
        ("train", "tile_batch", 0, "at least 1"), ("train", "temperature", 0.0, "positive"),
        ("train", "lr", -1.0, "at least 0"), ("eval", "folds", 1, "at least 2"), ("eval", "shots", (3, 0), "at least 1"),
    ],
)  # fmt: skip
def test_senseless_value_is_refused_with_the_setting_and_its_rule(table, name, value, rule):
    with pytest.raises(ConfigError, match=f"^{name} must be {rule}.*got "):
        TABLES[table](**{name: value})
