"""Grids against plain loops, a folder of good and bad scans, and runs that are killed, repeated, shared out and doubled."""

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from folders import stamps, tiled
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from dreslcl import tiles
from dreslcl.common import ConfigError, DiskError, StoreError, TableError
from dreslcl.config import TileConfig
from dreslcl.demo import write_scan
from dreslcl.slide import Slide
from dreslcl.tiles import Given, TileGrid, TilePixels, find_tiles, grid_corners, grid_path, pack_path, read_slides, tile_slides

SMALL = TileConfig(size=64)


def picture(width=1024, height=768, seed=0) -> np.ndarray:
    """Glass with a textured purple rectangle over the middle half."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 243, np.uint8)
    h, w = height // 2, width // 2
    grain = rng.integers(-30, 30, (h // 4, w // 4, 1)).repeat(4, 0).repeat(4, 1)
    image[height // 4 : height // 4 + h, width // 4 : width // 4 + w] = np.array((150, 80, 160)) + grain
    return image


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Eight small scans in two folders; the same name occurs in both."""
    folder = tmp_path_factory.mktemp("scans")
    for n in range(8):
        path = folder / ("a" if n < 4 else "b") / f"{n % 4}.svs"
        path.parent.mkdir(exist_ok=True)
        write_scan(path, picture(1024, 768 + 64 * n, seed=n))
    return folder


# -- grid maths -------------------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 50), st.integers(1, 60))
def test_grid_corners_equal_a_plain_loop(w, h, extent, step):
    loop = [(x, y) for y in range(0, h, step) for x in range(0, w, step) if x + extent <= w and y + extent <= h]
    assert grid_corners((w, h), extent, step).tolist() == [list(p) for p in loop]


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_neighbours_along_the_hilbert_curve_are_neighbours_on_the_slide(bits):
    xy = grid_corners((2**bits * 10, 2**bits * 10), 10, 10)
    order = tiles.hilbert_order(xy, 10)
    assert sorted(order.tolist()) == list(range(4**bits))
    assert (np.abs(np.diff(xy[order], axis=0)).sum(axis=1) == 10).all()


def test_thinned_out_tiles_cover_the_slide_evenly():
    xy = grid_corners((6400, 6400), 100, 100)
    rows = tiles.thin_out(xy, 100, 64)
    assert len(set(rows.tolist())) == 64 and (np.diff(rows) > 0).all()
    assert set(Counter((xy[rows] // 1600 @ [1, 10]).tolist()).values()) <= {3, 4, 5}
    assert (tiles.thin_out(xy, 100, 64) == rows).all()


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 50), st.floats(0.1, 4), st.floats(0.1, 4), st.integers(16, 4096))
def test_a_grid_survives_the_way_to_disk_and_back(tmp_path_factory, count, mpp, mpp0, size):
    rng = np.random.default_rng(count)
    xy, tissue = rng.integers(0, 10**6, (count, 2)), rng.random(count, np.float32)
    grid = TileGrid("007", xy, tissue, 3 * size, size, mpp, mpp0, "x", (9, 8), "f", 3)
    path = tmp_path_factory.mktemp("g") / "tiles" / "007.h5"
    grid.save(path)
    back = TileGrid.load(path)
    assert (back.xy == grid.xy).all() and (back.tissue == grid.tissue).all() and len(back) == count
    assert all(getattr(back, name) == value for name, value in vars(grid).items() if name not in ("xy", "tissue"))


# -- a folder of scans ------------------------------------------------------------------------------------------------


def test_what_is_found_in_an_open_scan_is_what_a_batch_run_writes(scans, tmp_path):
    config = TileConfig(size=64, overlap=32, mpp=0.6, max_tiles=50, min_sharpness=1.0)
    tile_slides(scans / "a" / "0.svs", tmp_path, config)
    written = TileGrid.load(grid_path(tmp_path, "0"))
    with Slide.open(scans / "a" / "0.svs") as slide:
        found = find_tiles(slide, config)
    assert len(found) == 50 and (found.xy == written.xy).all() and (found.tissue == written.tissue).all()
    others = {name: value for name, value in vars(written).items() if name not in ("xy", "tissue", "fingerprint")}
    assert others == {name: getattr(found, name) for name in others} and written.fingerprint
    assert set(np.diff(np.unique(written.xy[:, 0]))) == {38, 76} and written.xy.tolist() == sorted(
        written.xy.tolist(), key=lambda p: p[::-1]
    )
    with h5py.File(grid_path(tmp_path, "0")) as file:  # TRIDENT needs patch_size and the two magnifications
        xy, at = file["coords"][:], file["coords"].attrs
        assert xy.dtype == np.int64 and at["name"] == "0" and file["tissue_fraction"].shape == (50,)
        ratio = at["level0_magnification"] / at["target_magnification"]
        assert round(at["patch_size"] * ratio) == at["patch_size_level0"] == 77 and 10 / at["target_magnification"] == pytest.approx(0.6)
        assert (at["level0_width"], at["level0_height"]) == (1024, 768)


def test_every_slide_of_a_mixed_batch_gets_the_right_row(tmp_path):
    source, work = tmp_path / "in", tmp_path / "work"
    source.mkdir()
    write_scan(source / "good.svs", picture())
    write_scan(source / "white.tiff", np.full((600, 600, 3), 255, np.uint8))
    write_scan(source / "black.tiff", np.zeros((600, 600, 3), np.uint8))
    write_scan(source / "tiny.svs", picture(48, 48))
    write_scan(source / "nompp.svs", picture(), mpp=None)
    (source / "zero.svs").touch()
    (source / "text.svs").write_text("not a scan")
    (source / "slide.mrxs").write_bytes(b"x")
    (source / "notes.txt").write_text("skip me")
    (source / "labels.csv").write_text("skip,me")
    (source / ".hidden.svs").write_text("skip me")
    rows = {row["slide_id"]: row for row in tile_slides(source, work, SMALL)}
    assert {s for s, row in rows.items() if row["status"] == "empty"} == {"white", "black", "tiny"}
    assert {s for s, row in rows.items() if row["status"] == "error"} == {"nompp", "zero", "text", "slide"}
    assert rows["good"]["status"] == "ok" and len(rows) == 8
    assert rows["good"]["tiles"] == 48 and rows["good"]["tissue_mm2"] == pytest.approx(1024 * 768 / 4 * 0.25e-6, rel=0.1)
    reasons = {"white": "no tissue", "tiny": "smaller than one tile", "nompp": "--overrides", "zero": "empty file", "text": "text file"}
    for name, reason in reasons.items():
        assert reason in rows[name]["error"] and "\n" not in rows[name]["error"]
    assert read_slides(work) == [{k: str(v) for k, v in row.items()} for row in rows.values()]
    assert len(TileGrid.load(grid_path(work, "white"))) == 0
    with h5py.File(grid_path(work, "white")) as file:
        assert file["coords"].shape == (0, 2)
    assert {p.stem for p in (work / "overlays").iterdir()} == {"good", "white", "black", "tiny"}
    assert json.loads((work / "tissue" / "good.geojson").read_text())["features"][0]["properties"]["tissue_id"] == 0
    assert Image.open(work / "contact_sheet.jpg").size[0] > 100


def test_real_scans_get_their_rows(test_data, tmp_path):
    rows = tile_slides(test_data / "slides", tmp_path)
    assert [(row["status"], row["vendor"], row["reader"]) for row in rows if not row["path"].endswith(".dcm")] == [
        ("ok", "aperio", "tifffile"), ("ok", "hamamatsu", "tifffile"),
    ]  # fmt: skip
    assert rows[0]["tiles"] > 30 and rows[2]["tiles"] > 30


def test_same_names_stay_apart_colliding_ones_are_told_and_formulas_come_back_as_they_are(scans, tmp_path):
    source = tmp_path / "in"
    (source / "x").mkdir(parents=True)
    for name in ("a.svs", "a.tiff", "b.svs", "x__c.svs", "x/c.svs", "x/b.svs", "=1+1.svs", "-a.svs", "007.svs"):
        shutil.copy(scans / "a" / "0.svs", source / name)
    rows = {row["slide_id"]: row for row in tile_slides(source, tmp_path / "w", SMALL)}
    assert {name for name, row in rows.items() if row["status"] == "ok"} == {"-a", "007", "=1+1", "b", "x__b"}
    assert {name for name, row in rows.items() if row["status"] == "error"} == {"a", "x__c"}
    assert "a.svs and a.tiff" in rows["a"]["error"]
    assert {row["slide_id"] for row in read_slides(tmp_path / "w")} == set(rows) and "\n'-a," in (tmp_path / "w" / "slides.csv").read_text()


def test_results_inside_the_input_folder_are_not_taken_for_scans(scans, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(scans / "a", source)
    (source / "loop").symlink_to(source)
    for _ in range(2):
        assert len(tile_slides(source, source / "work", SMALL)) == 4
    with pytest.raises(ConfigError, match="among the scans"):
        tile_slides(source, source, SMALL)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(ConfigError, match="no scan in there"):
        tile_slides(tmp_path, tmp_path / "w")
    with pytest.raises(ConfigError, match="no such file"):
        tile_slides(tmp_path / "x", tmp_path / "w")
    with pytest.raises(TableError, match="dreslcl tile"):
        read_slides(tmp_path)
    (tmp_path / "x.h5").write_text("text")
    for name in ("x.h5", "gone.h5"):
        with pytest.raises(StoreError, match="dreslcl tile"):
            TileGrid.load(tmp_path / name)


# -- choices ----------------------------------------------------------------------------------------------------------


def test_a_table_sets_resolution_and_settings_per_slide(scans, tmp_path):
    (tmp_path / "in").mkdir()
    write_scan(tmp_path / "in" / "x.svs", picture(), mpp=None)
    shutil.copy(scans / "a" / "0.svs", tmp_path / "in" / "y.svs")
    table = tmp_path / "o.csv"
    table.write_text("slide_id,mpp,min_tissue,max_tiles\nx,0.25,,\ny.svs,,,5\n")
    rows = tile_slides(tmp_path / "in", tmp_path / "w", SMALL, given=Given(table))
    assert [(r["mpp"], r["mpp_source"]) for r in rows] == [(0.25, "given"), (0.5, "Aperio MPP")]
    assert rows[1]["tiles"] == 5
    [row] = tile_slides(tmp_path / "in" / "x.svs", tmp_path / "w2", TileConfig(size=64, default_mpp=0.125))
    assert (row["mpp"], row["mpp_source"]) == (0.125, "default")
    for text, message in {
        "slide_id,colour\nx,1": "unknown column 'colour'",
        "slide_id,mpp\nx,abc": "mpp of x: could not",
        "id,mpp\nx,1": "id",
    }.items():
        table.write_text(text)
        with pytest.raises(TableError, match=message):
            tile_slides(tmp_path / "in", tmp_path / "w", SMALL, given=Given(table))


@pytest.mark.parametrize("theirs", ["Caf\u00e9", "Cafe\u0301", "Caf\u00e9.SVS", "Cafe\u0301.svs"])
@pytest.mark.parametrize("ours", ["Caf\u00e9.svs", "Cafe\u0301.Tiff"])
def test_files_of_other_tools_find_their_slide_in_either_unicode_form_with_or_without_suffix(scans, tmp_path, ours, theirs):
    for folder in ("in/sub", "areas", "coords/patches"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(scans / "a" / "0.svs", tmp_path / "in" / "sub" / ours)
    area = {"type": "Polygon", "coordinates": [[[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]]}
    (tmp_path / "areas" / f"{theirs}.geojson").write_text(json.dumps(area), encoding="utf-16")
    with h5py.File(tmp_path / "coords" / "patches" / f"{theirs}_patches.h5", "w") as file:
        file.create_dataset("coords", data=[[10, 20]]).attrs.update(patch_size=64, patch_size_level0=128)
    (tmp_path / "o.csv").write_text(f"slide_id,mpp\nsub/{theirs},0.25\n", encoding="utf-16")
    given = Given(tmp_path / "o.csv", tmp_path / "areas", tmp_path / "coords")
    [row] = tile_slides(tmp_path / "in", tmp_path / "w", SMALL, given=given)
    assert (row["status"], row["tiles"], row["mpp"], row["mpp_source"]) == ("ok", 1, 0.25, "given")
    (tmp_path / "o.csv").write_text(f"slide_id,mpp\n{theirs},0.25\n{ours},0.25\n Caf\u00e9.svs,0.5\n")
    with pytest.raises(TableError, match=r"slide_id 'Café' has more than one mpp: .*line 2.* and .*line 4"):
        tile_slides(tmp_path / "in", tmp_path / "w", SMALL, given=given)


def test_annotations_replace_the_mask(scans, tmp_path):
    box = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [box]}, "properties": {}}
    (tmp_path / "0.geojson").write_text(json.dumps(feature))
    rows = tile_slides(scans / "a", tmp_path / "w", SMALL, given=Given(tissue_geojson=tmp_path))
    assert rows[0]["tiles"] == 16 and [row["status"] for row in rows] == ["ok", "error", "error", "error"]
    assert "no tissue annotation" in rows[1]["error"]
    assert (TileGrid.load(grid_path(tmp_path / "w", "0")).xy < 256).all()


@pytest.mark.parametrize("tool", ["trident", "clam"])
def test_coordinates_of_other_tools_replace_the_grid(scans, tmp_path, tool):
    xy = np.array([[512, 300], [10, 20]])
    name = "patches/0_patches.h5" if tool == "trident" else "0.h5"
    (tmp_path / "patches").mkdir()
    with h5py.File(tmp_path / name, "w") as file:
        file["coords"] = xy
        trident = {"patch_size": 96, "patch_size_level0": 192, "level0_magnification": 20, "target_magnification": 10}
        file["coords"].attrs.update(trident if tool == "trident" else {"patch_size": 96, "patch_level": 1, "downsample": [2.0, 2.0]})
    [row] = tile_slides(scans / "a" / "0.svs", tmp_path / "w", SMALL, given=Given(coords=tmp_path))
    grid = TileGrid.load(grid_path(tmp_path / "w", "0"))
    assert row["tiles"] == 2 and grid.xy.tolist() == xy.tolist()
    assert (grid.extent_px, grid.size, grid.mpp) == (192, 96, 1.0) and grid.tissue.tolist() == [1, 0]
    rows = tile_slides(scans / "a", tmp_path / "w", SMALL, given=Given(coords=tmp_path))
    assert [r["status"] for r in rows] == ["ok", "error", "error", "error"] and "TRIDENT or CLAM" in rows[1]["error"]


def test_blurry_tiles_and_surplus_tiles_are_left_out(tmp_path):
    image = picture()
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(6)))
    image[:, 512:] = blurred[:, 512:]
    write_scan(tmp_path / "a.svs", image)
    counts = [tile_slides(tmp_path, tmp_path / "w", config)[0]["tiles"] for config in (SMALL, TileConfig(size=64, min_sharpness=20.0))]
    assert counts[1] == counts[0] / 2 and (TileGrid.load(grid_path(tmp_path / "w", "a")).xy[:, 0] < 512).all()
    assert tile_slides(tmp_path, tmp_path / "w", TileConfig(size=64, max_tiles=7))[0]["tiles"] == 7


def test_a_dry_run_tells_what_would_be_and_writes_nothing(scans, tmp_path):
    rows = tile_slides(scans, tmp_path / "w", SMALL, write="nothing")
    assert not (tmp_path / "w").exists() and {(row["levels"], row["regions"], row["warning"]) for row in rows} == {(1, 1, "")}
    assert [row["tiles"] for row in rows] == [row["tiles"] for row in tile_slides(scans, tmp_path / "w", SMALL)]


def test_every_region_is_tiled_on_its_own_glass_and_no_tile_shows_two(tmp_path, caplog):
    from test_slide_vendors import scn

    glass = picture(896, 704)
    tinted = (picture(1000, 704, seed=1) * np.array([0.98, 0.94, 0.87])).astype(np.uint8)
    tinted[:, 700:] = tinted[:, 300:600]  # tissue up to the edge
    scn(tmp_path / "a.scn", glass, tinted)
    write_scan(tmp_path / "b.svs", picture(), mpp=0.03)
    rows = tile_slides(tmp_path, tmp_path / "w", SMALL, write="nothing")
    grids = []
    for path in (tmp_path / "a.scn", tmp_path / "b.svs"):
        with Slide.open(path) as slide:
            grids.append(find_tiles(slide, SMALL))
    assert [row["regions"] for row in rows] == [2, 1] and [row["tiles"] for row in rows] == [len(grid) for grid in grids]
    assert rows[0]["warning"] == "2 scanned regions, side by side" and "no light microscope has 0.03" in rows[1]["warning"]
    assert {record.message for record in caplog.records} >= {f"{row['warning']} ({row['path']})" for row in rows}
    x = grids[0].xy[:, 0]
    assert 20 < (x >= 4096).sum() < 60 and 40 < (x < 1024).sum() < 90 and ((x <= 1000 - 64) | (x >= 4096)).all()
    assert rows[1]["status"] == "empty" and "the scan has 0.03" in rows[1]["error"]


def test_a_check_finds_damaged_stored_tiles_of_finished_slides_too(tmp_path):
    write_scan(tmp_path / "in" / "a.svs", picture(), tile=64, levels=())
    write_scan(tmp_path / "in" / "b.svs", picture(), tile=64, levels=())
    with Slide.open(tmp_path / "in" / "a.svs") as slide:
        at = int(slide._parts[0][0][1].offsets[100])
    with (tmp_path / "in" / "a.svs").open("r+b") as file:
        stat = os.fstat(file.fileno())
        file.seek(at)
        file.write(bytes(50))
    os.utime(tmp_path / "in" / "a.svs", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    calls = [(write, check) for write in ("nothing", "grids") for check in ("sample", "full")]
    for write, check in [("grids", ""), *calls]:
        rows = tile_slides(tmp_path / "in", tmp_path / "w", SMALL, write=write, check=check)
        if check:
            assert [row["status"] for row in rows] == ["error", "ok"] and "stored tile 100 cannot be decoded" in rows[0]["error"]


# -- runs that are repeated, killed, shared out, doubled -----------------------------------------------------------------


def test_a_second_run_does_only_what_is_missing_or_changed(scans, tmp_path):
    source, work = tmp_path / "in", tmp_path / "w"
    shutil.copytree(scans / "a", source)
    (source / "bad.svs").write_text("no scan")
    tile_slides(source, work, SMALL)
    (source / "new.svs").write_bytes((source / "0.svs").read_bytes())
    os.utime(source / "1.svs")
    grid_path(work, "2").unlink()
    write_scan(source / "bad.svs", picture())
    others = {"1", "2", "bad", "new"}
    for config, fresh in ((SMALL, others), (SMALL, set()), (TileConfig(size=64, min_tissue=0.5), others | {"0", "3"})):
        before = stamps(work, "rows/*.json")
        assert len(tile_slides(source, work, config)) == 6
        assert {name for name, time in stamps(work, "rows/*.json").items() if time != before.get(name)} == fresh
        assert {row["status"] for row in read_slides(work)} == {"ok"}


def test_rows_of_earlier_folders_stay_but_failures_of_scans_that_are_gone_go(scans, tmp_path):
    (tmp_path / "bad.svs").write_text("no scan")
    tile_slides(tmp_path / "bad.svs", tmp_path / "w", SMALL)
    tile_slides(scans / "a" / "0.svs", tmp_path / "w", SMALL)
    assert [row["slide_id"] for row in read_slides(tmp_path / "w")] == ["0", "bad"]
    (tmp_path / "bad.svs").unlink()
    tile_slides(scans / "a" / "1.svs", tmp_path / "w", SMALL)
    assert [row["slide_id"] for row in read_slides(tmp_path / "w")] == ["0", "1"]


def test_shards_running_at_once_do_what_one_run_does(scans, tmp_path):
    tile_slides(scans, tmp_path / "whole", SMALL)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: tile_slides(scans, tmp_path / "w", SMALL, workers=2, shard=(i, 3)), range(3)))
    assert tiled(tmp_path / "w") == tiled(tmp_path / "whole")
    assert [row["slide_id"] for row in tile_slides(scans, tmp_path / "w", SMALL, shard=(1, 4))] == ["a__1", "b__1"]
    with pytest.raises(ConfigError, match="numbered from 0 to 2"):
        tile_slides(scans, tmp_path / "w", SMALL, shard=(3, 3))


def test_damaged_leftovers_and_a_file_in_the_way(scans, tmp_path):
    tile_slides(scans, tmp_path / "w", SMALL)
    expected = tiled(tmp_path / "w")
    for name, text in [("a__0", ""), ("a__1", "[]"), ("a__2", '{"row": 3}')]:
        (tmp_path / "w" / "rows" / f"{name}.json").write_text(text)
    tile_slides(scans, tmp_path / "w", SMALL)
    assert tiled(tmp_path / "w") == expected
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        tile_slides(scans, tmp_path / "file", SMALL)


def test_a_stopped_run_leaves_a_table_of_what_is_done(scans, tmp_path, monkeypatch):
    def stop(job, *rest):
        if job.slide_id == "b__2":
            raise KeyboardInterrupt
        return done(job, *rest)

    done = tiles._tile
    monkeypatch.setattr(tiles, "_tile", stop)
    with pytest.raises(KeyboardInterrupt):
        tile_slides(scans, tmp_path, SMALL, workers=1)
    assert {row["slide_id"] for row in read_slides(tmp_path)} >= {f"a__{n}" for n in range(4)}


# -- packs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, mpp, stored", [(64, 0.5, 64), (128, 0.5, 64), (64, 1.0, 64), (72, 0.7, 64)])
def test_a_pack_stands_alone_and_reads_back_as_the_scan_does(tmp_path, size, mpp, stored):
    scan, work = tmp_path / "a.svs", tmp_path / "w"
    write_scan(scan, picture(), tile=stored, levels=(), subsampling=(2, 1))
    tile_slides(scan, work, TileConfig(size=size, mpp=mpp))
    grid = TileGrid.load(grid_path(work, "a"))
    rows = np.random.default_rng(0).permutation(len(grid))
    expected = TilePixels(work, scan, grid).read(rows)
    tile_slides(scan, work, TileConfig(size=size, mpp=mpp), write="packs")
    scan.unlink()
    pixels = TilePixels(work, scan, grid)
    assert pixels.slide.path == pack_path(work, "a") and len(grid) > 10
    assert np.abs(pixels.read(rows).astype(int) - expected).mean() < 2
    assert (pixels.read(rows[5:6]) == pixels.read(rows)[5:6]).all()


def test_a_pack_of_another_grid_is_not_read_and_is_written_anew(tmp_path):
    scan, work = tmp_path / "in" / "a.svs", tmp_path / "w"
    write_scan(scan, picture())
    write_scan(tmp_path / "in" / "empty.svs", np.full((300, 300, 3), 255, np.uint8))
    tile_slides(tmp_path / "in", work, SMALL, write="packs")
    tile_slides(tmp_path / "in", work, TileConfig(size=48))
    grid = TileGrid.load(grid_path(work, "a"))
    assert TilePixels(work, scan, grid).slide.path == scan
    for _ in range(2):
        tile_slides(tmp_path / "in", work, TileConfig(size=48), write="packs")
        assert tiles.packed_fingerprint(pack_path(work, "a")) == grid.fingerprint
        pack_path(work, "a").write_bytes(b"II*\0")
        assert tiles.packed_fingerprint(pack_path(work, "a")) == ""
    assert not pack_path(work, "empty").exists()
