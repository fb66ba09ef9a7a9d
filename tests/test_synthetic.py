"""Synthetic scans open like real ones; a synthetic cohort leaks nothing between its splits."""

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile

from dreslcl.common import ConfigError, read_table
from dreslcl.demo import BACKGROUND, FIELD, KINDS, TUMOUR, TUMOUR_MEAN, _draw, write_cohort, write_scan


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cohort")
    write_cohort(out, 15, seed=3, side=(4, 6))
    return out


@pytest.fixture
def image() -> np.ndarray:
    y, x = np.mgrid[:701, :1003]
    return np.stack([x % 256, y % 256, (x + y) // 8], -1).astype(np.uint8)


def test_scan_opens_in_openslide_with_its_resolution_and_levels(tmp_path, image):
    write_scan(tmp_path / "a.svs", image, mpp=0.25, quality=95, subsampling=(1, 1))
    with openslide.OpenSlide(tmp_path / "a.svs") as scan:
        assert scan.properties["openslide.vendor"] == "aperio"
        assert float(scan.properties["openslide.mpp-x"]) == 0.25
        assert scan.properties["aperio.AppMag"] == "40"
        assert scan.level_dimensions == ((1003, 701), (250, 175), (62, 43))
        assert "thumbnail" in scan.associated_images
        pixels = np.asarray(scan.read_region((0, 0), 0, scan.dimensions))[..., :3]
    assert np.abs(pixels.astype(int) - image).mean() < 3


def test_scan_is_a_tiled_bigtiff_with_a_thumbnail_in_strips(tmp_path, image):
    write_scan(tmp_path / "a.svs", image, tile=(240, 128), levels=(2,))
    with tifffile.TiffFile(tmp_path / "a.svs") as scan:
        assert scan.is_bigtiff
        assert scan.is_svs
        assert [page.is_tiled for page in scan.pages] == [True, False, True]
        assert (scan.pages[0].tilewidth, scan.pages[0].tilelength) == (240, 128)
        assert scan.pages[2].shape == (350, 501, 3)


@pytest.mark.parametrize("compression", [None, "deflate", "jpeg2000"])
def test_other_compressions_hold_the_pixels_exactly_or_nearly(tmp_path, image, compression):
    write_scan(tmp_path / "a.svs", image, compression=compression)
    pixels = tifffile.imread(tmp_path / "a.svs").astype(int)
    assert np.abs(pixels - image).max() <= (2 if compression == "jpeg2000" else 0)


def test_without_mpp_the_description_holds_no_resolution(tmp_path, image):
    write_scan(tmp_path / "a.svs", image, mpp=None)
    with openslide.OpenSlide(tmp_path / "a.svs") as scan:
        assert "openslide.mpp-x" not in scan.properties


def test_a_level_is_the_mean_of_whole_blocks(tmp_path, image):
    write_scan(tmp_path / "a.svs", image, levels=(4,), compression=None)
    with tifffile.TiffFile(tmp_path / "a.svs") as scan:
        level = scan.pages[2].asarray().astype(float)
    blocks = image[:700, :1000].reshape(175, 4, 250, 4, 3).mean((1, 3))
    assert np.abs(level - blocks).max() <= 1


def test_every_table_names_the_slides_that_are_there(cohort):
    files = {path.stem for path in (cohort / "slides").iterdir()}
    assert len(files) == 15
    for name in ("reports", "labels", "cells"):
        assert {row["slide_id"] for row in read_table(cohort / f"{name}.csv")} == files


def test_splits_share_no_patient_and_no_sheet(cohort):
    labels = read_table(cohort / "labels.csv")
    split = {row["slide_id"]: row["split"] for row in labels}
    patients, sheets = {"train": set(), "test": set()}, {"train": set(), "test": set()}
    for row in labels:
        patients[row["split"]].add(row["patient_id"])
    for cell in read_table(cohort / "cells.csv"):
        sheets[split[cell["slide_id"]]].add(cell["sheet"])
    assert patients["train"] and sheets["train"]
    assert not patients["train"] & patients["test"]
    assert not sheets["train"] & sheets["test"]


def test_sheets_of_two_splits_show_different_pixels(monkeypatch, tmp_path):
    drawn = {}

    def remember(kind, rng):
        drawn[kind, len(drawn)] = sheet = rng.integers(0, 255, (2, 896, 896)).astype(np.uint8)
        return sheet

    monkeypatch.setattr("dreslcl.demo._draw", remember)
    write_cohort(tmp_path, 6, side=(3, 3))
    assert len({sheet.tobytes() for sheet in drawn.values()}) == len(drawn) == 2 * len(KINDS)


def test_a_patient_has_one_class_and_one_mutation_state(cohort):
    seen: dict[str, set] = {}
    for row in read_table(cohort / "labels.csv"):
        seen.setdefault(row["patient_id"], set()).add((row["subtype"], row["mutation"], row["split"]))
    assert all(len(states) == 1 for states in seen.values())


def test_classes_are_balanced_and_only_tumour_mutates(cohort):
    labels = read_table(cohort / "labels.csv")
    assert sum(row["split"] == "train" for row in labels) == 9
    for subtype, kind in TUMOUR.items():
        mine = [row for row in labels if row["subtype"] == subtype]
        assert len(mine) == 5
        assert {row["recognition"] for row in mine} == {"1" if kind else "0"}
        assert {row["mutation"] for row in mine} == ({"0", "1"} if kind else {"0"})


def test_tumour_fills_a_part_of_tumour_slides_and_none_of_normal_ones(cohort):
    label = {row["slide_id"]: row for row in read_table(cohort / "labels.csv")}
    kinds: dict[str, list[str]] = {}
    for cell in read_table(cohort / "cells.csv"):
        assert int(cell["x"]) % FIELD == int(cell["y"]) % FIELD == 0
        kinds.setdefault(cell["slide_id"], []).append(cell["kind"])
    for slide, found in kinds.items():
        own = [kind for kind in found if kind not in BACKGROUND]
        expected = TUMOUR[label[slide]["subtype"]]
        assert set(own) == ({expected + "_mutated" * (label[slide]["mutation"] == "1")} if expected else set())
        assert 0.10 < len(own) / len(found) < 0.40 or not expected


def test_reports_name_the_class_in_varied_words_and_some_are_longer_than_the_clip_context(cohort):
    subtype = {row["slide_id"]: row["subtype"] for row in read_table(cohort / "labels.csv")}
    word = {"LUAD": "adenocarcinoma", "LUSC": "squamous", "normal": "malignancy|carcinoma|tumour|neoplasm"}
    reports = read_table(cohort / "reports.csv")
    for row in reports:
        assert any(w in row["report"].lower() for w in word[subtype[row["slide_id"]]].split("|"))
        assert "{" not in row["report"]
    assert len({row["report"] for row in reports}) == len(reports)
    long = sum(len(row["report"].split()) > 77 for row in reports) / len(reports)
    assert 0.05 < long < 0.6


def test_tumour_sheets_of_every_kind_have_the_same_mean_stain():
    for kind in KINDS[len(BACKGROUND) :]:
        sheet = _draw(kind, np.random.default_rng(0))
        assert sheet.mean((1, 2)) == pytest.approx(TUMOUR_MEAN, abs=1.5)


def test_the_smallest_cohort_has_every_class_in_both_splits_and_is_the_same_again(tmp_path, monkeypatch):
    write_cohort(tmp_path / "a", 6, seed=1, side=(3, 4))
    write_cohort(tmp_path / "b", 6, seed=1, side=(3, 4))
    monkeypatch.setattr("dreslcl.demo._draw", lambda kind, rng: np.zeros((2, 896, 896), np.uint8))
    write_cohort(tmp_path / "c", 6, seed=2, side=(3, 4))
    labels = read_table(tmp_path / "a" / "labels.csv")
    assert len({(row["split"], row["subtype"]) for row in labels}) == 6
    first = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(first) == 9
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in first)
    assert (tmp_path / "a" / "cells.csv").read_bytes() != (tmp_path / "c" / "cells.csv").read_bytes()


def test_too_small_a_cohort_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 6 slides"):
        write_cohort(tmp_path, 5)
