import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from dreslcl import load
from dreslcl.cohort import Cohort
from dreslcl.config import EncoderConfig, ModelConfig
from dreslcl.embedding import Embeddings, embed, prompt_vectors, report_rows
from dreslcl.encoder import Encoder
from dreslcl.errors import ConfigError, ModelError, SlideError, StoreError
from dreslcl.files import read_table
from dreslcl.grid import TileGrid
from dreslcl.layouts import write_tiles
from dreslcl.model import DRESLCL
from dreslcl.synthetic import write_scan


@pytest.fixture(scope="module")
def cohort(work):
    whole = Cohort.load(work).with_reports(work / "reports.csv")
    return replace(whole, members=whole.members[:3])  # p0 has two of the three


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    """A model folder as `pretrain` writes it, with random weights."""
    encoder = Encoder.create(EncoderConfig())
    about = {"tiles": "pixels", "text": "tower", "seen": ["s0"], "size": 64, "mpp": 2.0}
    torch.manual_seed(0)
    made = DRESLCL(
        encoder, ModelConfig(codewords=4, width=16, heads=2), dim=encoder.dim, text_dim=encoder.dim, frozen_text=False, about=about
    )
    words = np.random.default_rng(0).normal(size=(4, encoder.dim)).astype(np.float32)
    made.aggregator.set_codebook(words, words)
    folder = tmp_path_factory.mktemp("run") / "model"
    made.save(folder)
    return folder


@pytest.fixture(scope="module")
def embedded(cohort, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("emb")
    return embed(cohort, out, model=model, tile_features=True, workers=1), out


def read(path):
    with h5py.File(path) as file:
        return {name: value[()] for name, value in file.items()}, dict(file.attrs), {n: dict(v.attrs) for n, v in file.items()}


def test_embeddings_are_read_back_as_written(embedded):
    result, out = embedded
    again = Embeddings.load(out)
    assert again.ids == result.ids == ("s0", "s1", "s2") and again.patients == ("p0", "p0", "p2") and again.seen == {"s0"}
    assert np.array_equal(again.vectors, result.vectors) and np.array_equal(again.mean, result.mean)
    assert np.allclose(np.linalg.norm(again.vectors, axis=1), 1, atol=1e-5)


def test_slide_vector_and_mean_come_from_all_tiles(embedded, cohort, model):
    result, out = embedded
    rows, _, _ = read(out / "tile_features" / "s1.h5")
    assert rows["features"].shape[0] == cohort.members[1].tiles
    assert np.allclose(result.mean[1], rows["features"].mean(0), atol=1e-5)
    assert np.allclose(load(model).embed_features([rows["features"]]), result.vectors[1], atol=1e-4)


def test_second_run_does_only_what_is_missing(embedded, cohort, model):
    _, out = embedded
    (out / "slide_features" / "s1.h5").unlink()
    (out / "tile_features" / "s2.h5").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in (out / "slide_features").glob("*.h5")}
    embed(cohort, out, model=model, tile_features=True, workers=1)
    after = {p.name: p.stat().st_mtime_ns for p in (out / "slide_features").glob("*.h5")}
    assert after["s0.h5"] == before["s0.h5"] and after["s2.h5"] > before["s2.h5"] and "s1.h5" in after


def test_without_a_model_a_slide_is_the_mean_of_its_tiles(cohort, tmp_path):
    result = embed(cohort, tmp_path, encoder=EncoderConfig(), workers=1)
    assert np.allclose(result.vectors, result.mean / np.linalg.norm(result.mean, axis=1, keepdims=True), atol=1e-6) and not result.seen


def test_loaded_model_embeds_scans_tiles_and_texts(cohort, model, embedded, tmp_path):
    result, _ = embedded
    loaded = load(model)
    assert np.allclose(loaded.embed_slide(cohort.members[2].source), result.vectors[2], atol=1e-4)
    assert loaded.embed_tiles(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, loaded.dim)
    assert loaded.embed_text("No tumour.").shape == (loaded.joint_dim,) and loaded.embed_text(["a", "b"]).shape == (2, loaded.joint_dim)
    write_scan(tmp_path / "glass.svs", np.full((640, 640, 3), 244, np.uint8), mpp=1.0)
    with pytest.raises(SlideError, match="no tissue found"):
        loaded.embed_slide(tmp_path / "glass.svs")


def test_features_are_refused_by_a_model_of_pixels_and_the_other_way(model, cohort, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((3, 4), np.float32)
    bags = Cohort.of_features({"a": (tmp_path / "a.h5", 3)})
    with pytest.raises(ModelError, match="trained on pixels, so it cannot embed features"):
        embed(bags, tmp_path / "out", model=model)
    with pytest.raises(ConfigError, match="already in files"):
        embed(bags, tmp_path / "out", tile_features=True)
    with pytest.raises(ModelError, match="not a whole dreslcl model folder"):
        load(tmp_path)


def test_contradicting_embeddings_are_refused(tmp_path):
    rows = np.eye(2, dtype=np.float32)
    for parts, message in (((("a",), ("p", "q"), rows), "differ in length"), ((("a", "a"), ("p", "q"), rows), "'a' comes twice")):
        with pytest.raises(StoreError, match=message):
            Embeddings(*parts)
    with pytest.raises(StoreError, match="not finite, first 'b'"):
        Embeddings(("a", "b"), ("p", "q"), np.array([[1, 0], [np.nan, 0]], np.float32))
    (tmp_path / "embeddings.h5").write_bytes(b"no")
    with pytest.raises(StoreError, match="not an embeddings file"):
        Embeddings.load(tmp_path)


# what other tools read: each reader below is written from that tool's format


def trident_tiles(path):
    data, _, attrs = read(path)
    at = attrs["coords"]
    assert at["patch_size_level0"] == round(at["patch_size"] * at["level0_magnification"] / at["target_magnification"])
    assert {"overlap", "name", "savetodir", "level0_width", "level0_height"} <= set(at) and {"name", "savetodir", "encoder"} <= set(
        attrs["features"]
    )
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
        embed(cohort, tmp_path, model=model, layout=layout, tile_features=True, workers=1)
    features, coords = trident_tiles(embedded[1] / "tile_features" / "s1.h5")
    assert np.array_equal(coords, cohort.grid(1).xy)
    theirs, places = clam_tiles(tmp_path / "clam", "s1")
    assert np.allclose(theirs, features, atol=1e-5) and np.array_equal(places, coords)
    theirs, places = stamp_tiles(tmp_path / "stamp_tiles" / "s1.h5")
    grid = cohort.grid(1)
    assert np.allclose(theirs, features, atol=1e-3) and np.allclose(places * grid.mpp / grid.mpp_level0, coords)


def test_stamp_places_are_micrometres_at_any_level_0_resolution(tmp_path):
    xy = np.array([[0, 0], [512, 1024]])
    grid = TileGrid("s", xy, np.ones(2, np.float32), 512, 256, 0.5, 0.25, "scan", (2048, 2048), "made")
    write_tiles(tmp_path, "stamp", np.ones((2, 3), np.float32), grid, "ours")
    data, at, _ = read(tmp_path / "stamp_tiles" / "s.h5")
    assert data["coords"].tolist() == [[0, 0], [128, 256]] and (at["tile_size_um"], at["tile_size_px"]) == (128, 256)


def test_slide_vectors_are_read_from_the_layouts_of_trident_stamp_and_patho_bench(embedded, cohort, model, tmp_path):
    data, _, _ = read(embedded[1] / "slide_features" / "s0.h5")
    assert np.array_equal(data["features"], embedded[0].vectors[0]) and data["coords"].shape == (cohort.members[0].tiles, 2)
    by_slide = embed(cohort, tmp_path / "a", model=model, layout="stamp", workers=1)
    assert [r["PATIENT"] for r in read_table(tmp_path / "a" / "stamp_slides.csv")] == ["p0", "p0", "p2"]
    for row, vector in zip(read_table(tmp_path / "a" / "stamp_slides.csv"), by_slide.vectors):
        data, at, _ = read(tmp_path / "a" / "stamp_slides" / row["FILENAME"])
        assert np.array_equal(data["feats"], vector[None]) and at["feat_type"] == "slide" and {"encoder", "precision"} <= set(at)
    by_patient = embed(cohort, tmp_path / "a", model=model, layout="patho-bench", by="patient", workers=1)
    assert by_patient.ids == ("p0", "p2") and sorted(p.stem for p in (tmp_path / "a" / "patho_bench").glob("*.h5")) == ["p0", "p2"]
    assert np.allclose(read(tmp_path / "a" / "patho_bench" / "p2.h5")[0]["features"], by_slide.vectors[2], atol=1e-6)


def test_tools_without_such_files_are_named(cohort, model, tmp_path):
    with pytest.raises(ConfigError, match="add --tile-features"):
        embed(cohort, tmp_path, model=model, layout="clam")
    with pytest.raises(ConfigError, match="patho-bench reads no tile features"):
        embed(cohort, tmp_path, model=model, layout="patho-bench", tile_features=True)


# texts for the evaluation


def test_report_rows_and_prompts_are_vectors_of_the_joint_space(model, work, tmp_path):
    rows, vectors = report_rows(work / "reports.csv", None, model)
    assert len(rows) == len(vectors) == 8 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    (tmp_path / "p.json").write_text(json.dumps({"tumour": ["carcinoma", "cancer"], "normal": "benign"}))
    (tmp_path / "p.toml").write_text('tumour = ["carcinoma", "cancer"]\nnormal = "benign"\n')
    for name in ("p.json", "p.toml"):
        prompts = prompt_vectors(tmp_path / name, model)
        assert [v.shape[0] for v in prompts.values()] == [2, 1]


def test_slides_with_equal_report_vectors_have_one_report_to_retrieve(model, tmp_path):
    width = DRESLCL.load(model).text_dim
    np.savez(tmp_path / "v.npz", a=np.ones((2, width)), b=np.eye(2, width), c=np.ones((2, width)))
    rows, _ = report_rows(None, tmp_path / "v.npz", model)
    assert rows[0]["report"] == rows[2]["report"] != rows[1]["report"]


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"a": []}', '{"a": [1]}', '{"a": 3}'])
def test_prompts_of_another_layout_are_refused_in_one_line(model, tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.json") as caught:
        prompt_vectors(tmp_path / "p.json", model)
    assert "\n" not in str(caught.value)


def test_retrieval_and_zeroshot_say_what_they_need(model, tmp_path):
    with pytest.raises(ConfigError, match="--model RUN/model and --reports"):
        report_rows(None, None, model)
    with pytest.raises(ConfigError, match="--prompts FILE"):
        prompt_vectors(None, model)
    np.savez(tmp_path / "v.npz", a=np.ones(3))
    with pytest.raises(ModelError, match="vectors have width 3"):
        report_rows(None, tmp_path / "v.npz", model)
