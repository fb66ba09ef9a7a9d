import shutil
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from folders import stamps, torchrun

from dreslcl import load
from dreslcl.cohort import Cohort, TileReader
from dreslcl.common import ConfigError, DreslclError, ModelError, SlideError, StoreError, read_table
from dreslcl.config import EncoderConfig, TileConfig, TrainConfig
from dreslcl.demo import write_scan
from dreslcl.embedding import Embeddings, embed, encode_slides
from dreslcl.encoder import Encoder, inference
from dreslcl.formats import find_features
from dreslcl.slide import Slide
from dreslcl.tiles import find_tiles

ONE = TrainConfig(workers=1)


@pytest.fixture(scope="module")
def cohort(cohort):
    return cohort.subset(cohort.members[:3])  # p0 has two of the three


@pytest.fixture(scope="module")
def embedded(cohort, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("emb")
    return embed(cohort, out, model=model, tile_features=True, settings=ONE), out


def read(path):
    with h5py.File(path) as file:
        return {name: value[()] for name, value in file.items()}, dict(file.attrs), {n: dict(v.attrs) for n, v in file.items()}


def test_vectors_and_means_come_from_all_tiles_and_are_read_back_as_written(embedded, cohort, model):
    result, out = embedded
    again = Embeddings.load(out)
    assert again.ids == result.ids == ("s0", "s1", "s2") and again.patients == ("p0", "p0", "p2") and again.seen == {"s0"}
    assert np.array_equal(again.vectors, result.vectors) and np.array_equal(again.mean, result.mean)
    assert np.allclose(np.linalg.norm(again.vectors, axis=1), 1, atol=1e-5)
    rows = read(out / "tile_features" / "s1.h5")[0]["features"]
    assert rows.shape[0] == cohort.members[1].tiles and np.allclose(result.mean[1], rows.mean(0), atol=1e-5)
    assert np.allclose(load(model).embed_features([rows]), result.vectors[1], atol=1e-4)


def test_second_run_does_only_what_is_missing(embedded, cohort, model):
    _, out = embedded
    (out / "slide_features" / "s1.h5").unlink()
    (out / "tile_features" / "s2.h5").unlink()
    before = stamps(out, "slide_features/*.h5")
    embed(cohort, out, model=model, tile_features=True, settings=ONE)
    after = stamps(out, "slide_features/*.h5")
    assert after["s0"] == before["s0"] and after["s2"] > before["s2"] and "s1" in after


def test_without_a_model_a_slide_is_the_mean_of_its_tiles(cohort, tmp_path):
    result = embed(cohort, tmp_path, encoder=EncoderConfig(), settings=ONE)
    assert np.allclose(result.vectors, result.mean / np.linalg.norm(result.mean, axis=1, keepdims=True), atol=1e-6) and not result.seen


def test_loaded_model_embeds_scans_tiles_and_texts(cohort, model, embedded, tmp_path):
    result, _ = embedded
    loaded = load(model)
    assert np.allclose(loaded.embed_slide(cohort.members[2].source), result.vectors[2], atol=1e-4)
    assert loaded.embed_tiles(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, loaded.dim)
    assert loaded.embed_text("No tumour.").shape == (loaded.joint_dim,) and loaded.embed_text(["a", "b"]).shape == (2, loaded.joint_dim)
    loaded.about["tile"]["max_tiles"] = 4  # as the run's tiles were made, so is a new scan's
    with Slide.open(cohort.members[2].source) as slide:
        grid = find_tiles(slide, TileConfig(size=64, mpp=2.0, max_tiles=4))
        four = loaded.embed_features([loaded.embed_tiles(slide.read_tiles(grid.xy, grid.size, grid.mpp))])
    assert len(grid) == 4 and np.allclose(loaded.embed_slide(cohort.members[2].source), four, atol=1e-4)
    write_scan(tmp_path / "glass.svs", np.full((640, 640, 3), 244, np.uint8), mpp=1.0)
    with pytest.raises(SlideError, match="no tissue found"):
        loaded.embed_slide(tmp_path / "glass.svs")


def bags(folder, **values):
    """A cohort of files of three tile features each, of one value."""
    for name, value in values.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["features"] = np.full((3, 4), value, np.float32)
    unreadable = {}
    return Cohort.of_features(find_features(folder, unreadable), unreadable=unreadable)


def test_what_does_not_go_together_is_refused(model, cohort, tmp_path):
    features = bags(tmp_path, a=1)
    for members, options, error, message in (
        (features, {"model": model}, ModelError, "trained on pixels, so it cannot embed features"),
        (features, {"tile_features": True}, ConfigError, "already in files"),
        (cohort, {"model": model, "layout": "clam"}, ConfigError, "add --tile-features"),
        (cohort, {"model": model, "layout": "patho-bench", "tile_features": True}, ConfigError, "patho-bench reads no tile features"),
        (cohort, {"model": tmp_path}, ModelError, "not a whole dreslcl model folder"),
    ):
        with pytest.raises(error, match=message):
            embed(members, tmp_path / "out", **options)


# one bad slide


def test_a_slide_that_cannot_be_read_is_left_out_and_named(cohort, model, embedded, work, tmp_path):
    (tmp_path / "bad.svs").write_bytes(b"not a scan")
    a, b, c = cohort.members
    shutil.copytree(work, tmp_path / "work")
    (tmp_path / "work" / "tiles" / "s0.h5").write_bytes(b"no")
    bad = replace(cohort, work=tmp_path / "work", members=(a, replace(b, source=tmp_path / "bad.svs"), c))
    result = embed(bad, tmp_path / "out", model=model, settings=ONE)
    assert result.ids == ("s2",) == Embeddings.load(tmp_path / "out").ids and list(result.failed) == ["s0", "s1"]
    assert "run `dreslcl tile` again" in result.failed["s0"] and "bad.svs" in result.failed["s1"] and "\n" not in result.failed["s1"]
    assert np.allclose(result.vectors, embedded[0].vectors[[2]], atol=1e-5)
    with pytest.raises(DreslclError, match=r"none of the 1 slides could be embedded; s1: bad\.svs"):
        embed(replace(bad, members=bad.members[1:2]), tmp_path / "one", model=model)
    (tmp_path / "d.h5").write_bytes(b"no")
    result = embed(bags(tmp_path, a=1, b=1, c=np.nan), tmp_path / "features")
    assert result.ids == ("a", "b") and set(result.failed) == {"c", "d"} and "not finite" in result.failed["c"]


def test_pixels_stay_until_they_are_encoded_though_their_memory_is_used_again(cohort, model, monkeypatch):
    monkeypatch.setattr("dreslcl.embedding.CHUNK", 8)
    encoder, reader, rooms, plain = load(model).encoder, TileReader(cohort), set(), TileReader.read

    def noted(self, member, index, out):
        rooms.add(out.__array_interface__["data"][0])
        return plain(self, member, index, out)

    monkeypatch.setattr(TileReader, "read", noted)
    encode = Encoder.encode_tiles
    monkeypatch.setattr(Encoder, "encode_tiles", lambda self, tiles, *a: time.sleep(0.01) or encode(self, tiles, *a))
    chunks = 0
    for member, parts in encode_slides(encoder, cohort, range(3), TrainConfig(workers=2), "test"):
        rows = list(parts)
        chunks += len(rows)
        pixels = torch.from_numpy(plain(reader, member, np.arange(cohort.members[member].tiles)))
        with inference(encoder):
            assert np.allclose(np.concatenate(rows), encode(encoder, pixels), atol=1e-5)
    assert len(rooms) < chunks


def test_a_slide_that_breaks_midway_is_left_at_once(cohort, model, tmp_path, monkeypatch, spy):
    faults, read = [], TileReader.read

    def torn(self, member, index, *out):
        if member == 1 and index[0] >= 8:
            faults.append(index)
            raise OSError(5, "Input/output error")
        return read(self, member, index, *out)

    monkeypatch.setattr("dreslcl.embedding.CHUNK", 8)
    monkeypatch.setattr(TileReader, "read", torn)
    encoded = spy(Encoder, "encode_tiles")
    result = embed(cohort, tmp_path, model=model, settings=ONE)
    assert result.failed == {"s1": "cannot be read (Input/output error)"} and result.ids == ("s0", "s2")
    assert len(faults) == 1  # nothing more is read of it
    assert sum(len(tiles) for _, tiles, *_ in encoded) == cohort.members[0].tiles + 8 + cohort.members[2].tiles


RANKS = """
import sys
from dataclasses import replace
from pathlib import Path
from dreslcl import Cohort, embed
work, model, out = map(Path, sys.argv[1:])
cohort = Cohort.load(work)
members = [replace(m, source=Path("gone.svs")) if m.slide_id == "s1" else m for m in cohort.members[:5]]
result = embed(replace(cohort, members=tuple(members)), out, model=model)
assert result.ids == ("s0", "s2", "s3", "s4") and list(result.failed) == ["s1"], result
"""


def test_a_rank_with_a_bad_slide_does_not_hang_the_others(model, work, tmp_path):
    torchrun(2, RANKS, work, model, tmp_path)
    assert Embeddings.load(tmp_path).ids == ("s0", "s2", "s3", "s4")


def test_contradicting_embeddings_are_refused(tmp_path):
    for ids, last, message in (("a", 1, "differ in length"), ("aa", 1, "'a' comes twice"), ("ab", np.nan, "not finite, first 'b'")):
        with pytest.raises(StoreError, match=message):
            Embeddings(tuple(ids), ("p", "q"), np.array([[1, 0], [0, last]], np.float32))
    (tmp_path / "embeddings.h5").write_bytes(b"no")
    with pytest.raises(StoreError, match="not an embeddings file"):
        Embeddings.load(tmp_path)


# what other tools read: each reader below is written from that tool's format


def trident_tiles(path):
    data, _, attrs = read(path)
    at = attrs["coords"]
    assert at["patch_size_level0"] == round(at["patch_size"] * at["level0_magnification"] / at["target_magnification"])
    assert {"overlap", "name", "savetodir", "level0_width", "level0_height"} <= set(at)
    assert {"name", "savetodir", "encoder"} <= set(attrs["features"])
    assert data["coords"].dtype == np.int64
    return data["features"], data["coords"]


def clam_tiles(root, slide):
    data, _, _ = read(root / "h5_files" / f"{slide}.h5")
    tensor = torch.load(root / "pt_files" / f"{slide}.pt", weights_only=True)
    assert data["coords"].dtype == np.int32 and data["features"].dtype == np.float32 and np.array_equal(tensor.numpy(), data["features"])
    return data["features"], data["coords"]


def stamp_tiles(path):
    data, at, _ = read(path)
    assert at["unit"] == "um" and at["feat_type"] == "tile" and "stamp_version" not in at and {"extractor", "code_hash"} <= set(at)
    assert data["feats"].dtype == np.float16 and data["coords"].dtype == np.float32
    return data["feats"], data["coords"] * at["tile_size_px"] / at["tile_size_um"]


def test_tile_features_are_read_alike_from_each_layout(embedded, cohort, model, tmp_path):
    for layout in ("clam", "stamp"):
        embed(cohort, tmp_path, model=model, layout=layout, tile_features=True, settings=ONE)
    features, coords = trident_tiles(embedded[1] / "tile_features" / "s1.h5")
    assert np.array_equal(coords, cohort.grid(1).xy)
    theirs, places = clam_tiles(tmp_path / "clam", "s1")
    assert np.allclose(theirs, features, atol=1e-5) and np.array_equal(places, coords)
    theirs, places = stamp_tiles(tmp_path / "stamp_tiles" / "s1.h5")
    grid = cohort.grid(1)
    assert np.allclose(theirs, features, atol=1e-3) and np.allclose(places * grid.mpp / grid.mpp_level0, coords)


def test_slide_vectors_are_read_from_the_layouts_of_trident_stamp_and_patho_bench(embedded, cohort, model, tmp_path):
    data, _, _ = read(embedded[1] / "slide_features" / "s0.h5")
    assert np.array_equal(data["features"], embedded[0].vectors[0]) and data["coords"].shape == (cohort.members[0].tiles, 2)
    by_slide = embed(cohort, tmp_path / "a", model=model, layout="stamp", settings=ONE)
    assert [r["PATIENT"] for r in read_table(tmp_path / "a" / "stamp_slides.csv")] == ["p0", "p0", "p2"]
    for row, vector in zip(read_table(tmp_path / "a" / "stamp_slides.csv"), by_slide.vectors):
        data, at, _ = read(tmp_path / "a" / "stamp_slides" / row["FILENAME"])
        assert np.array_equal(data["feats"], vector[None]) and at["feat_type"] == "slide" and {"encoder", "precision"} <= set(at)
    by_patient = embed(cohort, tmp_path / "a", model=model, layout="patho-bench", by="patient", settings=ONE)
    assert by_patient.ids == ("p0", "p2") and sorted(p.stem for p in (tmp_path / "a" / "patho_bench").glob("*.h5")) == ["p0", "p2"]
    assert np.allclose(read(tmp_path / "a" / "patho_bench" / "p2.h5")[0]["features"], by_slide.vectors[2], atol=1e-6)
    rows = [read(embedded[1] / "tile_features" / f"s{i}.h5")[0]["features"] for i in (0, 1)]
    assert np.allclose(by_patient.vectors[0], load(model).embed_features(rows), atol=1e-4)  # as if p0's two slides were one
    with h5py.File(tmp_path / "a" / "slide_features" / "s1.h5", "a") as file:
        file["sums"][...] *= -3
    turned = embed(cohort, tmp_path / "a", model=model, by="patient", settings=ONE)
    assert np.abs(turned.vectors[0] - by_patient.vectors[0]).max() > 1e-3
