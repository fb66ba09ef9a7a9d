"""The forecast of a run: what it measures is plausible, what does not fit is said, nothing is written."""

import logging
from dataclasses import replace

import pytest
import torch
from test_encoder import TIMM, VIT, build
from test_trainer import SMALL, trainer

from dreslcl.bank import bank_bytes
from dreslcl.cohort import Cohort
from dreslcl.config import EncoderConfig
from dreslcl.trainer import _kept_bytes, clock, forecast, pretrain


def expect(made, **changes):
    config = replace(made.config, train=replace(made.config.train, **changes))
    return forecast(made.model, made.cohort, Cohort(()), made.reader, made.pieces, config, made.out, steps=2, ranks=1)


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(cohort, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        pretrain(cohort, tmp_path / "run", SMALL, dry_run=True)
    assert not (tmp_path / "run").exists()
    said = ("0 of 8 reports are longer", "2 steps per epoch", "the bank takes", "memory: about", "estimate", "forward and backward")
    assert not [text for text in said if text not in caplog.text]


def test_forecast_grows_with_what_is_asked(cohort, tmp_path):
    made = trainer(cohort, tmp_path)
    before = {n: p.clone() for n, p in made.model.state_dict().items()}
    plain = expect(made)
    spans = {m.slide_id: m.tiles for m in cohort.members}
    assert plain.bank_gb == bank_bytes(spans, made.model.dim, 4) / 1e9
    assert 0 < plain.tile_gb < plain.memory_gb < plain.free_memory_gb and plain.read_s > 0 and plain.tile_s > 0
    assert not plain.warnings()
    assert expect(made, tile_batch=8).tile_gb == pytest.approx(plain.tile_gb / 2, rel=0.02)  # a step has 16 tiles
    assert expect(made, cache_gb=0.0).pixels_gb < plain.pixels_gb
    assert all(torch.equal(before[n], p) for n, p in made.model.state_dict().items())
    assert all(p.grad is None for p in made.model.parameters())


def test_epoch_time_counts_steps_tiles_and_held_out_slides(cohort, tmp_path, monkeypatch):
    made = trainer(cohort, tmp_path)
    monkeypatch.setattr("dreslcl.trainer._seconds", lambda work, device: 1.0)
    tiles = sum(m.tiles for m in cohort.members)

    def seconds(held_out=(), **changes):
        config = replace(made.config, train=replace(made.config.train, workers=10**6, **changes))
        return forecast(made.model, cohort, Cohort(tuple(held_out)), made.reader, made.pieces, config, tmp_path, steps=2, ranks=1)

    plain = seconds()
    assert plain.fill_s == pytest.approx(tiles / 8, rel=0.05)  # one pass over 8 tiles "takes" a second
    for more, tiles_encoded in (
        ({"held_out": cohort.members}, tiles),
        ({"tiles": 8}, 8 * 4),
        ({"tile_batch": 8}, 8 * 4),  # gradient caching: one more forward
        ({"refresh": 2}, 8 * 2),
    ):
        assert seconds(**more).epoch_s - plain.epoch_s == pytest.approx(tiles_encoded / 8, rel=0.05), more


def test_what_does_not_fit_is_said(cohort, tmp_path):
    found = replace(expect(trainer(cohort, tmp_path)), free_disk_gb=0.0, free_memory_gb=0.0)
    bank, memory = found.warnings()
    assert "choose another --out" in bank and "lower --tile-batch" in memory


def test_a_resting_encoder_needs_no_memory_for_tiles(cohort, tmp_path):
    made = trainer(cohort, tmp_path, replace(SMALL, encoder=EncoderConfig(tune="none")))
    found = expect(made)
    assert found.tile_gb == 0 and found.fill_s > 0 and "forward and backward" not in found.lines()[-1]


@pytest.mark.parametrize("vision", [VIT, TIMM], ids=["OpenCLIP", "timm"])
def test_memory_of_a_tile_grows_with_the_picture_and_leaves_weights_out(vision):
    sizes = {}
    for edge in (32, 64):
        encoder = build(vision | {"image_size": edge})
        tile = torch.zeros((1, edge, edge, 3), dtype=torch.uint8)
        sizes[edge] = _kept_bytes(lambda encoder=encoder, tile=tile: encoder.encode_tiles(tile), encoder)
        double = _kept_bytes(lambda encoder=encoder, tile=tile: encoder.encode_tiles(tile.repeat(2, 1, 1, 1)), encoder)
        assert double == pytest.approx(2 * sizes[edge], rel=0.05)
    assert 2 < sizes[64] / sizes[32] < 6


def test_times_are_said_as_people_say_them():
    assert [clock(s) for s in (3.21, 600.0, 9000.0)] == ["3.2 s", "10 min", "2.5 h"]
