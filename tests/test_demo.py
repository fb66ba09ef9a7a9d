"""Synthetic scans open like real ones; a synthetic cohort leaks nothing between its splits."""

from collections import defaultdict
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("mpp", [0.25, None])
def test_scan_opens_in_openslide_with_its_resolution_and_levels_that_are_means_of_whole_blocks(openslide, tmp_path, image, mpp):
    write_scan(tmp_path / "a.svs", image, mpp=mpp, tile=(240, 128), subsampling=(1, 1))
    with openslide.OpenSlide(tmp_path / "a.svs") as scan:
        facts = [scan.properties.get(name) for name in ("openslide.vendor", "openslide.mpp-x", "aperio.AppMag")]
        assert facts == ["aperio", mpp and "0.25", mpp and "40"]
        assert scan.level_dimensions == ((1003, 701), (250, 175), (62, 43)) and "thumbnail" in scan.associated_images
        pixels = np.asarray(scan.read_region((0, 0), 0, scan.dimensions))[..., :3]
    assert np.abs(pixels.astype(int) - image).mean() < 3
    with tifffile.TiffFile(tmp_path / "a.svs") as scan:
        assert scan.is_bigtiff and scan.is_svs and [page.is_tiled for page in scan.pages] == [True, False, True, True]
        assert (scan.pages[0].tilewidth, scan.pages[0].tilelength) == (240, 128)
        blocks = image[:700, :1000].reshape(175, 4, 250, 4, 3).mean((1, 3))
        assert np.abs(scan.pages[2].asarray() - blocks).mean() < 3


def test_every_table_names_the_slides_that_are_there_and_splits_share_no_patient_and_no_sheet(cohort):
    labels, cells = read_table(cohort / "labels.csv"), read_table(cohort / "cells.csv")
    files = {path.stem for path in (cohort / "slides").iterdir()}
    assert len(files) == 15
    for rows in (labels, cells, read_table(cohort / "reports.csv")):
        assert {row["slide_id"] for row in rows} == files
    split = {row["slide_id"]: row["split"] for row in labels}
    for found in ([(row["split"], row["patient_id"]) for row in labels], [(split[cell["slide_id"]], cell["sheet"]) for cell in cells]):
        train, test = ({name for part, name in found if part == which} for which in ("train", "test"))
        assert train and test and not train & test


def test_classes_are_balanced_by_patient_and_only_tumour_mutates(cohort):
    labels, patients = read_table(cohort / "labels.csv"), defaultdict(set)
    for row in labels:
        patients[row["patient_id"]].add((row["subtype"], row["mutation"], row["split"]))
    assert all(len(states) == 1 for states in patients.values())
    assert sum(row["split"] == "train" for row in labels) == 9
    for subtype, kind in TUMOUR.items():
        mine = [(row["recognition"], row["mutation"]) for row in labels if row["subtype"] == subtype]
        assert len(mine) == 5 and set(mine) == ({("1", "0"), ("1", "1")} if kind else {("0", "0")})


def test_tumour_fills_a_part_of_tumour_slides_and_none_of_normal_ones(cohort):
    label, kinds = {row["slide_id"]: row for row in read_table(cohort / "labels.csv")}, defaultdict(list)
    for cell in read_table(cohort / "cells.csv"):
        assert int(cell["x"]) % FIELD == int(cell["y"]) % FIELD == 0
        kinds[cell["slide_id"]].append(cell["kind"])
    for slide, found in kinds.items():
        own, expected = [kind for kind in found if kind not in BACKGROUND], TUMOUR[label[slide]["subtype"]]
        assert set(own) == ({expected + "_mutated" * (label[slide]["mutation"] == "1")} if expected else set())
        assert 0.10 < len(own) / len(found) < 0.40 or not expected


def test_reports_name_the_class_in_varied_words_and_some_are_longer_than_the_clip_context(cohort):
    subtype, reports = {row["slide_id"]: row["subtype"] for row in read_table(cohort / "labels.csv")}, read_table(cohort / "reports.csv")
    word = {"LUAD": "adenocarcinoma", "LUSC": "squamous", "normal": "malignancy|carcinoma|tumour|neoplasm"}
    for row in reports:
        assert any(w in row["report"].lower() for w in word[subtype[row["slide_id"]]].split("|")) and "{" not in row["report"]
    assert len({row["report"] for row in reports}) == len(reports)
    assert 0.05 < sum(len(row["report"].split()) > 77 for row in reports) / len(reports) < 0.6


def test_tumour_sheets_of_every_kind_have_the_same_mean_stain():
    for kind in KINDS[len(BACKGROUND) :]:
        assert _draw(kind, np.random.default_rng(0)).mean((1, 2)) == pytest.approx(TUMOUR_MEAN, abs=1.5)


def test_the_smallest_cohort_has_every_class_in_both_splits_and_is_the_same_again(tmp_path, monkeypatch):
    for name in "ab":
        write_cohort(tmp_path / name, 6, seed=1, side=(3, 4))
    drawn = []  # sheets of noise in the place of tissue
    monkeypatch.setattr("dreslcl.demo._draw", lambda kind, rng: drawn.append(rng.integers(0, 255, (2, 896, 896), np.uint8)) or drawn[-1])
    write_cohort(tmp_path / "c", 6, seed=2, side=(3, 4))
    assert len({sheet.tobytes() for sheet in drawn}) == len(drawn) == 2 * len(KINDS), "no sheet of one split is like one of the other"
    assert len({(row["split"], row["subtype"]) for row in read_table(tmp_path / "a" / "labels.csv")}) == 6
    first, again, other = ({p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abc")
    assert len(first) == 9 and first == again and first[Path("cells.csv")] != other[Path("cells.csv")]
    with pytest.raises(ConfigError, match="at least 6 slides"):
        write_cohort(tmp_path, 5)
