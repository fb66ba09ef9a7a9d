import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from folders import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from dreslcl.cohort import Cohort, SlideRecord, TileReader, deal_patients, draw_tiles, plan_epoch, window_tiles
from dreslcl.common import ConfigError, TableError, prefetch, write_table
from dreslcl.formats import read_report_vectors, read_reports
from dreslcl.slide import Slide


def cohort_of(*names):
    return Cohort.of_features({name: (Path(f"{name}.h5"), 3) for name in names})


def table(path, columns, *rows):
    write_table(path, columns.split(), rows)
    return path


def test_tiled_slides_are_joined_with_their_reports_and_patients(work):
    cohort = Cohort.load(work).with_reports(work / "reports.csv")
    assert [m.slide_id for m in cohort.members] == [f"s{i}" for i in range(8)]
    assert cohort.members[1].patient_id == "p0" and cohort.reports[cohort.members[5].report].startswith("Report of p5.")
    assert any("8 of 8 slides have a report" in note for note in cohort.notes)
    assert len(cohort.grid(0)) == cohort.members[0].tiles == len(cohort.coordinates(0))


def test_join_says_what_matched_and_what_did_not_and_no_match_shows_both_sides(tmp_path):
    reports = table(tmp_path / "r.csv", "slide_id report", ("a.svs", "One."), ("b", "One."), ("z", "Nobody."))
    cohort = cohort_of("a", "b", "c").with_reports(reports)
    assert [(m.slide_id, m.report) for m in cohort.members] == [("a", 0), ("b", 0)]  # one text: positives of each other
    assert cohort.notes[1:] == (
        "2 of 3 slides have a report; without: 'c'",
        "2 of 3 reports have a slide; without: 'z'",
        "1 distinct reports, 1 of them of several slides; 2 patients",
    )
    with pytest.raises(TableError, match=r"slides are 'x', 'y'; reports are 'a\.svs', 'b', 'z'"):
        cohort_of("x", "y").with_reports(reports)
    with pytest.raises(ConfigError, match="--reports TABLE or --report-embeddings FILE"):
        cohort_of("a").with_reports(None)


def test_tables_of_tcga_and_histgen_are_read(tmp_path):
    rows = ("TCGA-CQ-7063.be787b58-3a45", 0, "One."), ("TCGA-AA-0001.x", 0, " ")
    tcga = table(tmp_path / "t.csv", "patient_filename label text", *rows)
    assert read_reports(tcga) == [{"slide_id": "", "patient_id": "TCGA-CQ-7063", "report": "One."}]
    cohort = cohort_of("TCGA-CQ-7063-01Z-00-DX1.76b4", "TCGA-CQ-7063-01Z-00-DX2.99", "TCGA-CQ-7064-01").with_reports(tcga)
    assert [(m.patient_id, m.report) for m in cohort.members] == 2 * [("TCGA-CQ-7063", 0)]
    odd = "page\x0cone\u2028\x85two"
    train = [{"id": "a", "report": "One.", "image_path": []}, {"id": "c", "report": None}, {"id": "d", "report": float("nan")}]
    text = json.dumps({"train": train, "test": [{"id": "b.svs", "report": odd}]}, ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(text, encoding=encoding)
        assert [(row["slide_id"], row["report"]) for row in read_reports(tmp_path / "a.json")] == [("a", "One."), ("b.svs", odd)]
    kept, gone = cohort_of("a", "b").with_reports(tmp_path / "a.json").split("split=test", tmp_path / "a.json")
    assert [m.slide_id for m in kept.members] == ["a"] and [m.slide_id for m in gone.members] == ["b"]


def test_real_tcga_reports_match_their_slides(test_data):
    from dreslcl.formats import find_features

    cohort = Cohort.of_features(find_features(test_data / "tcga" / "features"))
    by_patient = cohort.with_reports(test_data / "tcga" / "TCGA_Reports.csv")
    by_slide = cohort.with_reports(test_data / "tcga" / "reports.csv")
    assert len(cohort) == 944 and len(by_slide) == 530 and len(by_patient) >= 530


# vectors


def test_report_vectors_come_from_hdf5_and_npz_with_one_or_several_rows_and_equal_ones_are_one_report(tmp_path):
    one, many = np.arange(4.0), np.ones((3, 4))
    np.savez(tmp_path / "v.npz", a=many, b=one, c=many)
    with h5py.File(tmp_path / "v.h5", "w") as file:
        file["a"], file["b"], file["c"] = many, one, many.astype(np.float16)
    for name in ("v.npz", "v.h5"):
        cohort = cohort_of("a", "b", "c", "d").with_reports(None, tmp_path / name)
        assert [(m.slide_id, m.report) for m in cohort.members] == [("a", 0), ("b", 1), ("c", 0)]
        assert [r.dtype for r in cohort.reports] == 2 * [np.float32] and np.array_equal(np.concatenate(cohort.reports), [*many, one])
    np.savez(tmp_path / "v.npz", **{"a": one, "a.svs": one + 1})
    with refused(TableError, r"'a\.svs' has more than one report"):
        cohort_of("a").with_reports(None, tmp_path / "v.npz")


ODD = np.array([{}], dtype=object)
WIDTHS = [{"a": np.ones(3), "b": np.ones(4)}, {"a": np.ones((1, 2, 3))}, {"a": np.ones((0, 3))}, {}]


@pytest.mark.parametrize(
    "values, message",
    [
        *((values, "with one width") for values in WIDTHS),
        ({"a": [np.nan, 1]}, "not finite"),
        ({"a": ODD}, "not an HDF5 or npz"),
        (60, "npz"),
    ],
)
def test_files_that_hold_no_vectors_are_refused_in_one_line(tmp_path, values, message):
    np.savez(tmp_path / "v.npz", **(values if isinstance(values, dict) else {"a": np.ones(4)}))
    if values == 60:  # bytes left of the file
        (tmp_path / "v.npz").write_bytes((tmp_path / "v.npz").read_bytes()[:60])
    (tmp_path / "text.h5").write_text("hello")
    for name, why in (("v.npz", message), ("text.h5", "not an HDF5")):
        with refused(TableError, why):
            read_report_vectors(tmp_path / name)


# splits


def test_a_patient_with_one_slide_taken_out_is_out_with_all(tmp_path):
    reports = table(tmp_path / "r.csv", "slide_id patient_id report part", *(row.split() for row in ("a p 1 x", "b p 2 y", "c q 3 y")))
    cohort = cohort_of("a", "b", "c").with_reports(reports)
    kept, gone = cohort.split("part=x", reports)
    assert [m.slide_id for m in kept.members] == ["c"] and [m.slide_id for m in gone.members] == ["a", "b"]
    (tmp_path / "ids.txt").write_text("\ufeffb.SVS\r\n\r\nz\r\n")
    kept, gone = cohort.split(str(tmp_path / "ids.txt"), None)
    assert [m.slide_id for m in kept.members] == ["c"] and kept.notes[-1].endswith("1 of 2 names match no slide and no patient: 'z'")
    (tmp_path / "ids.txt").write_text("q")
    assert [m.slide_id for m in cohort.split(str(tmp_path / "ids.txt"), None)[1].members] == ["c"]
    assert cohort.split(None, None)[0] is cohort
    with refused(TableError, "no column 'prat'"):
        cohort.split("prat=x", reports)
    with refused(TableError, "names none of the 3 slides"):
        cohort.split("part=w", reports)
    with refused(ConfigError, "neither a file of ids nor column=value"):
        cohort.split("nothing.txt", reports)


# batches


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 99))
def test_a_batch_never_holds_two_slides_of_a_patient(owners, batches, seed):
    members = [SlideRecord(f"s{i}", f"p{p}", 1, Path("x")) for i, p in enumerate(owners)]
    plan = plan_epoch(members, range(len(members)), batches, np.random.default_rng(seed))
    for batch in plan:
        assert len({members[i].patient_id for i in batch}) == len(batch)
    dealt = np.concatenate(plan)
    assert len(set(dealt.tolist())) == len(dealt) == sum(min(owners.count(p), batches) for p in set(owners))
    assert max(map(len, plan)) - min(map(len, plan)) <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(1, 5))
def test_shards_keep_a_patient_together_and_are_about_equal(owners, shards):
    members = [SlideRecord(f"s{i}", f"p{p}", 1, Path("x")) for i, p in enumerate(owners)]
    home = deal_patients(members, shards)
    assert all(len({h for h, o in zip(home, owners) if o == p}) == 1 for p in set(owners))
    sizes = np.bincount(home, minlength=shards)
    assert sizes.max() - sizes.min() <= max(owners.count(p) for p in owners)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 40))
def test_windows_reach_every_tile_within_one_round(tiles, count, first):
    order = np.random.default_rng(0).permutation(tiles)
    visits = -(-tiles // count)
    seen = np.concatenate([window_tiles(order, count, first + v) for v in range(visits)])
    assert set(seen.tolist()) == set(range(tiles))
    drawn = draw_tiles(tiles, count, np.random.default_rng(first))
    assert len(set(drawn.tolist())) == min(tiles, count) and (np.diff(drawn) > 0).all()


def test_reader_gives_the_tiles_asked_for_with_and_without_cache(work):
    cohort = Cohort.load(work)
    plain, cached = TileReader(cohort), TileReader(cohort, cache_bytes=1 << 30)
    jobs = [(i, np.array([5, 2])) for i in (0, 3, 0)]
    for member, index in jobs:
        a, b = plain.read(member, index), cached.read(member, index)
        grid = cohort.grid(member)
        assert a.shape == (2, grid.size, grid.size, 3) and np.array_equal(a, b)
        scan = Slide.open(cohort.members[member].source, mpp=grid.mpp_level0)
        assert np.array_equal(a, scan.read_tiles(grid.xy[index], grid.size, grid.mpp))


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert list(prefetch(lambda n: n * n, range(20), workers=4, ahead=3)) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda n: 1 / n, [1, 0], workers=2, ahead=1))
