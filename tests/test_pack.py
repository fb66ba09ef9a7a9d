"""Packs hold the same tiles as the scan, bit by bit where the scan's own tiles are copied."""

import numpy as np
import pytest
from test_tiles import picture

from dreslcl.config import TileConfig
from dreslcl.demo import write_scan
from dreslcl.slide import Slide
from dreslcl.tiles import TileGrid, grid_path, open_tiles, pack_path, packed_corners, packed_fingerprint, tile_slides, write_pack


@pytest.mark.parametrize("size, mpp, stored, subsampling, copied", [
    (64, 0.5, 64, (2, 2), True),
    (64, 0.5, 64, (1, 1), True),
    (128, 0.5, 64, (2, 2), False),
    (64, 1.0, 64, (2, 2), False),
    (72, 0.7, 64, (2, 1), False),
])  # fmt: skip
def test_a_pack_reads_back_as_the_scan_does(tmp_path, size, mpp, stored, subsampling, copied):
    scan, work = tmp_path / "a.svs", tmp_path / "w"
    write_scan(scan, picture(), tile=stored, levels=(), subsampling=subsampling)
    tile_slides(scan, work, TileConfig(size=size, mpp=mpp), pack=True)
    grid = TileGrid.load(grid_path(work, "a"))
    with Slide.open(scan) as slide:
        expected = slide.read_tiles(grid.xy, grid.size, grid.mpp)
        assert write_pack(slide, grid, tmp_path / "again.tiff") == copied
    assert (tmp_path / "again.tiff").read_bytes() == pack_path(work, "a").read_bytes()
    scan.rename(tmp_path / "away.svs")  # the pack stands alone
    packed, xy = open_tiles(work, scan, grid)
    with packed:
        tiles = packed.read_tiles(xy, grid.size, grid.mpp)
        assert packed.path == pack_path(work, "a") and len(xy) == len(grid) > 10
        order = np.random.default_rng(0).permutation(len(xy))
        assert (packed.read_tiles(xy[order], grid.size, grid.mpp) == tiles[order]).all()
    difference = np.abs(tiles.astype(int) - expected)
    assert difference.max() == 0 if copied else difference.mean() < 2


def test_real_tiles_are_copied_with_their_colours(test_data, tmp_path):
    """The CMU slide stores RGB without Adobe's marker: a decoder that trusts the stream alone gets its colours wrong."""
    scan = test_data / "slides/CMU-1-Small-Region.svs"
    tile_slides(scan, tmp_path, TileConfig(size=240, mpp=0.499), pack=True)
    grid = TileGrid.load(grid_path(tmp_path, scan.stem))
    packed, xy = open_tiles(tmp_path, scan, grid)
    with packed, Slide.open(scan) as slide:
        assert write_pack(slide, grid, tmp_path / "again.tiff")
        assert (packed.read_tiles(xy, 240, grid.mpp) == slide.read_tiles(grid.xy, 240, grid.mpp)).all()


def test_a_pack_of_another_grid_is_not_read_and_is_written_anew(tmp_path):
    scan, work = tmp_path / "a.svs", tmp_path / "w"
    write_scan(scan, picture())
    tile_slides(scan, work, TileConfig(size=64), pack=True)
    tile_slides(scan, work, TileConfig(size=48))
    grid = TileGrid.load(grid_path(work, "a"))
    slide, xy = open_tiles(work, scan, grid)
    slide.close()
    assert slide.path == scan and (xy == grid.xy).all()
    tile_slides(scan, work, TileConfig(size=48), pack=True)
    assert packed_fingerprint(pack_path(work, "a")) == grid.fingerprint
    pack_path(work, "a").write_bytes(b"II*\0")
    assert packed_fingerprint(pack_path(work, "a")) == ""
    tile_slides(scan, work, TileConfig(size=48), pack=True)
    assert packed_fingerprint(pack_path(work, "a")) == grid.fingerprint


def test_an_empty_slide_gets_no_pack(tmp_path):
    write_scan(tmp_path / "a.svs", np.full((300, 300, 3), 255, np.uint8))
    for _ in range(2):
        assert tile_slides(tmp_path / "a.svs", tmp_path / "w", TileConfig(size=64), pack=True)[0]["status"] == "empty"
    assert not pack_path(tmp_path / "w", "a").exists()
    assert packed_corners(TileGrid.load(grid_path(tmp_path / "w", "a"))).shape == (0, 2)
