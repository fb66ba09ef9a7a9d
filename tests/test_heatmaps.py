"""Contributions against finite differences; maps, their resumption, and what QuPath reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.pipeline import Pipeline
from test_model import features, make_aggregator

from dreslcl import heatmaps
from dreslcl.common import ConfigError, ModelError, TableError, write_table
from dreslcl.embedding import embed
from dreslcl.heatmaps import class_targets, contributions, draw_heatmaps
from dreslcl.model import AGGREGATORS, DRESLCL


@pytest.mark.parametrize("name, changes", [(name, {}) for name in AGGREGATORS] + [("residual", {"mean_path": False})])
def test_a_contribution_is_the_finite_difference_of_the_score_when_the_tiles_weight_changes(name, changes):
    aggregator, x, direction = make_aggregator(name, **changes).double(), features(30, 1).double(), features(1, 2, 8)[0].double()
    *_, values = contributions(aggregator, x, direction)

    def score(weights):
        return float(aggregator(aggregator.bag(x, weights))[0] @ direction)

    for i in (0, 7, 19):
        step = 1e-5 * torch.eye(30, dtype=torch.float64)[i]
        assert values[i] == pytest.approx((score(1 + step) - score(1 - step)) / 2e-5, rel=1e-5, abs=1e-9)
    assert abs(values.sum()) < 1e-9, "weights count against each other only"


@pytest.fixture(scope="module")
def embedded(cohort, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps")
    return cohort, out / "heatmaps", embed(cohort, out, model=model)


def test_maps_show_every_tile_and_are_drawn_once(embedded, model):
    cohort, out, result = embedded
    assert draw_heatmaps(cohort, result, out, text="carcinoma") == {}
    for name in ("codewords/s1.png", "weights/s1.png", "contributions/s1.png", "top_tiles/s1.jpg"):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
    drawn = json.loads((out / "geojson" / "s1.geojson").read_text())["features"]
    grid, trained = cohort.grid(1), DRESLCL.load(model)
    with grid.open_scan(cohort.members[1].source) as scan:
        rows = torch.from_numpy(trained.embed_tiles(scan.read_tiles(grid.xy, grid.size, grid.mpp)).astype(np.float16)).float()
    codes, weights, values = contributions(trained.aggregator, rows, torch.from_numpy(trained.embed_text("carcinoma")))
    assert len(drawn) == len(grid)
    for feature, (x, y), code, weight, value in zip(drawn, grid.xy.tolist(), codes, weights, values):
        ring, at = feature["geometry"]["coordinates"][0], feature["properties"]
        assert ring[0] == ring[-1] == [x, y] and ring[2] == [x + grid.extent_px, y + grid.extent_px] and at["objectType"] == "tile"
        assert at["classification"]["name"] == f"codeword {code}" and len(at["classification"]["color"]) == 3
        expected = {"codeword": code, "weight": weight, "contribution": len(grid) * value}
        assert at["measurements"] == pytest.approx(expected, rel=1e-2, abs=1e-3)

    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if ".lock" not in path.name}
    (out / "codewords" / "s2.png").unlink()
    draw_heatmaps(cohort, result, out, text="carcinoma")
    assert {p.stem for p in times if p.stat().st_mtime_ns > times[p]} == {"s2"}
    draw_heatmaps(cohort, result, out, text="benign")
    assert all(p.stat().st_mtime_ns > times[p] for p in times)


def test_the_map_is_painted_where_the_tile_lies(embedded, spy):
    cohort, out, result = embedded
    drawn = spy(heatmaps, "draw_overlay")
    draw_heatmaps(cohort.subset(cohort.members[:1]), result, out, text="red and blue")
    found = json.loads((out / "geojson" / "s0.geojson").read_text())["features"]
    values = [feature["properties"]["measurements"]["contribution"] for feature in found]
    red, _, blue, _ = drawn[0][-1].astype(int).T
    assert red[np.argmax(values)] > blue[np.argmax(values)] and red[np.argmin(values)] < blue[np.argmin(values)]


def test_a_slide_whose_scan_is_gone_is_named_and_the_others_are_drawn(embedded, tmp_path):
    cohort, out, result = embedded
    members = tuple(replace(m, source=tmp_path / "gone.svs") if m.slide_id == "s3" else m for m in cohort.members[2:5])
    failed = draw_heatmaps(replace(cohort, members=members), result, out, text="something new")
    assert list(failed) == ["s3"] and "gone.svs" in failed["s3"] and "\n" not in failed["s3"]
    with Image.open(out / "codewords" / "s4.png") as image:
        assert image.info["fingerprint"]


def test_each_slide_is_mapped_for_its_own_class_or_else_the_predicted_one(embedded, tmp_path, monkeypatch):
    names, classes, result = ["a", "b", "c"], [i % 3 for i in range(8)], embedded[2]
    monkeypatch.setattr(Pipeline, "predict", lambda self, x: np.ones(len(x), int))  # a probe that says b to all
    write_table(tmp_path / "l.csv", ["slide_id", "grade"], [(f"s{i}", names[c] if i != 5 else "") for i, c in enumerate(classes)])
    targets = class_targets(result, tmp_path / "l.csv", "grade")
    expected = [names[c] for c in classes[:5]] + ["b"] + [names[c] for c in classes[6:]]
    assert [targets[f"s{i}"].title for i in range(8)] == [f"Contribution to grade {name}" for name in expected]
    assert np.allclose(sum(targets[f"s{i}"].direction for i in range(3)), 0, atol=1e-4)  # logits of all classes sum to a constant
    write_table(tmp_path / "two.csv", ["slide_id", "grade"], [(f"s{i}", "ab"[i % 2]) for i in range(8)])
    two = class_targets(result, tmp_path / "two.csv", "grade")
    assert np.array_equal(two["s0"].direction, -two["s1"].direction)
    with pytest.raises(TableError, match=r"no column 'subtype'; there are slide_id, grade"):
        class_targets(result, tmp_path / "l.csv", "subtype")


def test_maps_need_pixels_one_score_a_model_and_slides_in_common(embedded, tmp_path):
    cohort, out, result = embedded
    for error, members, vectors, options, message in (
        (ConfigError, replace(cohort, work=None), result, {}, "the folder that `dreslcl tile` wrote"),
        (ModelError, cohort, replace(result, model_folder=""), {}, "embed with --model"),
        (ConfigError, cohort, replace(result, ids=tuple("abcdefgh")), {}, "none of the 8 tiled slides is in the embeddings"),
        (ConfigError, cohort, result, {"text": "x", "labels": tmp_path / "l.csv"}, "a map shows one score"),
    ):
        with pytest.raises(error, match=message):
            draw_heatmaps(members, vectors, out, **options)
