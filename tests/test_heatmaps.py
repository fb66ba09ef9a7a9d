"""Contributions against finite differences; maps, their resumption, and what QuPath reads."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.pipeline import Pipeline

from dreslcl.cohort import Cohort
from dreslcl.common import ConfigError, TableError, write_table
from dreslcl.config import ModelConfig
from dreslcl.embedding import Embeddings, embed
from dreslcl.formats import read_features
from dreslcl.heatmaps import class_targets, contributions, draw_heatmaps, score_slopes, tile_values
from dreslcl.model import DRESLCL
from dreslcl.residual import ResidualAggregator, assignment_shares

VARIANTS = [
    {},
    {"intra_norm": False},
    {"count_term": False, "mean_path": False},
    {"soft_assignment": 3.0},
]


def slide(**settings):
    """An aggregator, a slide's features (30, 6) that leave a codeword empty, and a direction."""
    torch.manual_seed(1)
    config = ModelConfig(codewords=4, width=8, depth=1, heads=2, **settings)
    aggregator = ResidualAggregator(6, 5, config).eval()
    words = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    words[3] = 20
    aggregator.set_codebook(words.numpy(), np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32))
    return aggregator, torch.nn.functional.normalize(torch.randn(30, 6), dim=1), torch.randn(5)


def score(aggregator, features, direction, weights):
    """direction · z in float64 where tile i weighs weights[i] in all sums, written as a plain loop."""
    words, shares = aggregator.codewords, assignment_shares(features.float(), aggregator.codewords, aggregator.config.soft_assignment)
    sums, counts = torch.zeros(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for x, share, weight in zip(features.double(), shares.double(), weights):
        for k in range(4):
            sums[k] += weight * share[k] * (x - words[k].double())
            counts[k] += weight * share[k]
    double = ResidualAggregator(6, 5, aggregator.config).double().eval()
    double.load_state_dict(aggregator.state_dict())
    with torch.no_grad():
        return float(double(sums[None], counts[None])[0] @ direction.double())


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_contribution_is_the_finite_difference_of_the_score_when_the_tiles_weight_changes(settings):
    aggregator, features, direction = slide(**settings)
    _, values = contributions(aggregator, features, direction)
    for i in (0, 7, 19):
        step = 1e-4 * torch.eye(30, dtype=torch.float64)[i]
        difference = (score(aggregator, features, direction, 1 + step) - score(aggregator, features, direction, 1 - step)) / 2e-4
        assert values[i] == pytest.approx(difference, rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("settings", VARIANTS[:3])
def test_summed_contributions_move_as_the_score_when_one_tiles_feature_moves(settings):
    aggregator, features, direction = slide(**settings)
    slopes = score_slopes(aggregator, features, direction)
    move, one = torch.zeros_like(features), torch.ones(30, dtype=torch.float64)
    move[7] = 1e-3 * torch.randn(6)
    before, after = (tile_values(aggregator, features + sign * move, *slopes) for sign in (-1, 1))
    assert torch.equal(before[0], after[0])  # the tile keeps its codeword
    difference = score(aggregator, features + move, direction, one) - score(aggregator, features - move, direction, one)
    assert float((after[1].double() - before[1].double()).sum()) == pytest.approx(difference, rel=2e-2, abs=1e-8)


def test_contributions_sum_to_zero_as_weights_only_count_against_each_other():
    aggregator, features, direction = slide()
    codes, values = contributions(aggregator, features, direction)
    assert abs(values.sum()) < 1e-3 * np.abs(values).sum() and 3 not in codes


# maps of a cohort


@pytest.fixture(scope="module")
def embedded(work, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("maps")
    cohort = Cohort.load(work).with_reports(work / "reports.csv")
    return cohort, out, embed(cohort, out, model=model, tile_features=True, workers=1)


def test_maps_show_every_tile_and_are_drawn_once(embedded, model):
    cohort, out, result = embedded
    assert draw_heatmaps(cohort, out, model, result, text="carcinoma") == {}
    for name in ("codewords/s1.png", "contributions/s1.png", "top_tiles/s1.jpg"):
        with Image.open(out / "heatmaps" / name) as image:
            assert min(image.size) > 200
    grid, trained = cohort.grid(1), DRESLCL.load(model)
    rows = torch.from_numpy(read_features(out / "tile_features" / "s1.h5").astype(np.float16)).float()
    codes, values = contributions(trained.aggregator, rows, torch.from_numpy(trained.embed_text("carcinoma")))
    features = json.loads((out / "heatmaps" / "geojson" / "s1.geojson").read_text())["features"]
    assert len(features) == len(grid)
    for feature, (x, y), code, value in zip(features, grid.xy.tolist(), codes, values):
        ring, at = feature["geometry"]["coordinates"][0], feature["properties"]
        assert ring[0] == ring[-1] == [x, y] and ring[2] == [x + grid.extent_px, y + grid.extent_px] and at["objectType"] == "tile"
        assert at["classification"]["name"] == f"codeword {code}" and len(at["classification"]["color"]) == 3
        assert at["measurements"] == {"codeword": code, "contribution": pytest.approx(len(grid) * value, rel=1e-3, abs=1e-4)}

    times = {path: path.stat().st_mtime_ns for path in (out / "heatmaps").rglob("*.*")}
    (out / "heatmaps" / "codewords" / "s2.png").unlink()
    draw_heatmaps(cohort, out, model, result, text="carcinoma")
    assert {p.stem for p in times if p.stat().st_mtime_ns > times[p]} == {"s2"}
    draw_heatmaps(cohort, out, model, result, text="benign")
    assert all(p.stat().st_mtime_ns > times[p] for p in times)


def test_the_map_is_painted_where_the_tile_lies(embedded, model, monkeypatch):
    cohort, out, result = embedded
    drawn = {}
    monkeypatch.setattr("dreslcl.heatmaps._save_map", lambda path, thumbnail, grid, colours, *_: drawn.update({path.parent.name: colours}))
    draw_heatmaps(replace(cohort, members=cohort.members[:1]), out, model, result, text="red and blue")
    values = [
        f["properties"]["measurements"]["contribution"]
        for f in json.loads((out / "heatmaps" / "geojson" / "s0.geojson").read_text())["features"]
    ]
    red, _, blue, _ = drawn["contributions"].astype(int).T
    assert red[np.argmax(values)] > blue[np.argmax(values)] and red[np.argmin(values)] < blue[np.argmin(values)]


def test_a_slide_whose_scan_is_gone_is_named_and_the_others_are_drawn(embedded, model, tmp_path):
    cohort, out, result = embedded
    members = tuple(replace(m, source=tmp_path / "gone.svs") if m.slide_id == "s3" else m for m in cohort.members[2:5])
    failed = draw_heatmaps(replace(cohort, members=members), out, model, result, text="something new")
    assert list(failed) == ["s3"] and "gone.svs" in failed["s3"] and "\n" not in failed["s3"]
    with Image.open(out / "heatmaps" / "codewords" / "s4.png") as image:
        assert image.info["fingerprint"]


def test_each_slide_is_mapped_for_its_own_class_or_else_the_predicted_one(embedded, tmp_path, monkeypatch):
    cohort, out, _ = embedded
    members, names = list(range(8)), ["a", "b", "c"]
    classes = [i % 3 for i in range(8)]
    monkeypatch.setattr(Pipeline, "predict", lambda self, x: np.ones(len(x), int))  # a probe that says b to all
    write_table(tmp_path / "l.csv", ["slide_id", "grade"], [(f"s{i}", names[c] if i != 5 else "") for i, c in enumerate(classes)])
    targets = class_targets(cohort, members, out, tmp_path / "l.csv", "grade")
    titles = [f"Contribution to grade {names[c]}" for c in classes]
    assert [t.title for i, t in enumerate(targets) if i != 5] == titles[:5] + titles[6:]
    assert np.allclose(sum(targets[i].direction for i in range(3)), 0, atol=1e-4)  # logits of all classes sum to a constant
    own = next(t for i, t in enumerate(targets) if i != 5 and t.title == targets[5].title)
    assert np.array_equal(targets[5].direction, own.direction)
    assert targets[5].title == "Contribution to grade b"
    write_table(tmp_path / "two.csv", ["slide_id", "grade"], [(f"s{i}", "ab"[i % 2]) for i in range(8)])
    a, b = class_targets(cohort, members[:2], out, tmp_path / "two.csv", "grade")
    assert np.array_equal(a.direction, -b.direction)
    with pytest.raises(TableError, match=r"no column 'subtype'; there are slide_id, grade"):
        class_targets(cohort, members, out, tmp_path / "l.csv", "subtype")


def test_maps_need_pixels_and_one_score(embedded, model, tmp_path):
    cohort, out, result = embedded
    with pytest.raises(ConfigError, match="needs the folder that `dreslcl tile` wrote"):
        draw_heatmaps(replace(cohort, work=None), out, model, Embeddings(("a",), ("a",), np.ones((1, 2), np.float32)))
    with pytest.raises(ConfigError, match="a map shows one score"):
        draw_heatmaps(cohort, out, model, result, text="x", labels=tmp_path / "l.csv")
