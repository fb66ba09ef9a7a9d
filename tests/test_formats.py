import logging
import pickle

import h5py
import numpy as np
import pytest
import torch
from folders import Bomb, refused

from dreslcl.common import StoreError, TableError
from dreslcl.formats import find_features, patient_of, read_corners, read_features, read_patients, read_reports


def bag(n=5, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def write(path, **datasets):
    """An HDF5 file; or, where the name says so, a plain tensor."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".pt":
        torch.save(torch.from_numpy(datasets["features"]).requires_grad_(), path)
        return path
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def test_layouts_of_trident_clam_and_stamp_read_alike(tmp_path):
    rows, xy = bag(), np.arange(10).reshape(5, 2)
    files = {
        write(tmp_path / "trident.h5", features=rows[None], coords=xy): xy,
        write(tmp_path / "clam.h5", features=rows, coords=xy.astype(np.int32)): xy,
        write(tmp_path / "clam.pt", features=rows): None,
        write(tmp_path / "stamp.h5", feats=rows.astype(np.float16), coords=xy.astype(np.float32)): None,  # places in µm
        write(tmp_path / "bare.h5", features=rows): None,
    }
    torch.save(torch.from_numpy(rows), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path, corners in (files | {tmp_path / "old.pt": None}).items():
        assert np.allclose(read_features(path), rows / np.linalg.norm(rows, axis=1, keepdims=True), atol=2e-3), path
        assert np.array_equal(read_corners(path), corners) if corners is not None else read_corners(path) is None
    assert {count for _, count in find_features(tmp_path).values()} == {5}


def test_folder_is_searched_also_in_clams_two_and_h5_wins(tmp_path):
    for name, tiles in (("h5_files/s.1.h5", 5), ("pt_files/s.1.pt", 5), ("pt_files/t.pt", 2), ("h5_files/empty.h5", 0)):
        write(tmp_path / name, features=bag(tiles))
    assert find_features(tmp_path) == {
        "s.1": (tmp_path / "h5_files" / "s.1.h5", 5), "t": (tmp_path / "pt_files" / "t.pt", 2),
        "empty": (tmp_path / "h5_files" / "empty.h5", 0),
    }  # fmt: skip


def test_the_shape_of_a_tensor_is_learnt_without_loading_it(tmp_path, monkeypatch):
    write(tmp_path / "a.pt", features=bag())
    load, asked = torch.load, []
    monkeypatch.setattr(torch, "load", lambda *a, **options: asked.append(options) or load(*a, **options))
    find_features(tmp_path)
    assert asked == [{"weights_only": True, "mmap": True}]


BROKEN = {
    "not HDF5": (lambda p: p.write_bytes(b"hello"), "not a readable file"),
    "truncated": (lambda p: p.write_bytes(write(p, features=bag(5000)).read_bytes()[:3000]), "not a readable file"),
    "no features": (lambda p: write(p, embeddings=bag()), "holds embeddings; tile features are"),
    "a group": (lambda p: write(p, **{"features/x": bag()}), "tile features are a dataset"),
    "words": (lambda p: write(p, features=np.array([[b"a", b"b"]])), "numbers .* are needed"),
    "one vector": (lambda p: write(p, features=bag()[0]), r"\(tiles, width\) is needed"),
    "not finite": (lambda p: write(p, features=np.array([[1.0, np.nan]])), "not finite; extract them anew"),
    "a dictionary.pt": (lambda p: torch.save({"features": torch.zeros(2, 2)}, p), "holds a dict; a plain"),
    "code.pt": (lambda p: torch.save(Bomb(p.parent / "ran"), p), "pickled objects are not read"),
    "bare code.pt": (lambda p: p.write_bytes(pickle.dumps(Bomb(p.parent / "ran"), protocol=2)), "pickled objects are not read"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_wrong_file_is_refused_in_one_line_and_its_code_is_never_run(tmp_path, how):
    make, message = BROKEN[how]
    path = tmp_path / (how if how.endswith(".pt") else "a.h5")
    make(path)
    with refused(StoreError, message):
        read_features(path)
    assert not (tmp_path / "ran").exists()
    if how not in ("words", "not finite"):  # what the shape does not tell
        unreadable = {}
        with pytest.raises(StoreError, match=message):
            find_features(tmp_path)
        assert not find_features(tmp_path, unreadable) and list(unreadable) == [path.stem]


def test_folders_without_features_or_of_several_widths_are_refused(tmp_path):
    with pytest.raises(TableError, match=r"no \.h5 or \.pt files"):
        find_features(tmp_path)
    write(tmp_path / "a.h5", features=bag(d=4))
    write(tmp_path / "b.h5", features=bag(d=5))
    with pytest.raises(TableError, match=r"several widths: 4 \(a\.h5\), 5 \(b\.h5\)"):
        find_features(tmp_path)


# tables


@pytest.mark.parametrize("word", ["", "'--", "[Not Available]", "#N/A", "not reported", "Unknown", "?", "missing", "<NA>"])
def test_words_for_nobody_knows_are_no_patient_no_slide_and_no_report_and_are_counted(tmp_path, word, caplog):
    caplog.set_level(logging.INFO, "dreslcl")
    rows = [("a.svs", word, "One."), ("b", "P1", word), (word, "P2", "Two."), (word, word, "Three."), ("c", "P3", "None seen.")]
    (tmp_path / "r.csv").write_text("slide_id;patient_id;report\n" + "\n".join(map(";".join, rows)))
    assert [tuple(row.values()) for row in read_reports(tmp_path / "r.csv")] == [
        ("a.svs", "", "One."), ("", "P2", "Two."), ("c", "P3", "None seen.")
    ]  # fmt: skip
    said = [record.message.split("rows; ")[1] for record in caplog.records]
    assert said == [f"taken as a missing {key}: {n} {word!r}" for key, n in (("slide_id", 2), ("patient_id", 2), ("report", 1))]
    assert read_patients(tmp_path / "r.csv") == {"b": "P1", "c": "P3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('slide_id,report\na.svs,One.\n\nb,"Two\n"\na,Three.', r"'a' has more than one report: 'One.' \(line 2\) and 'Three.' \(line 6\)"),
        ("patient_id,report\nP1,One.\nP1,Two.", r"patient_id 'P1' has more than one report: 'One.' \(line 2\)"),
        ("slide_id,patient_id,report\na,P1,One.\na,P2,One.", r"'a' has more than one patient_id: 'P1' \(line 2\) and 'P2' \(line 3\)"),
        ("patient_filename,text\nTCGA-05-4382.x,One.\nTCGA-05-4382.y,Two.", "patient_id 'TCGA-05-4382' has more than one report"),
        ('{"train": [{"id": "a", "report": "1"}], "test": [{"id": "a", "report": "2"}]}', r"'1' \(record 1\) and '2' \(record 2\)"),
        ("slide_id,text\na,One.", "needs columns report and slide_id or patient_id; there are slide_id, text"),
        ("slide_id,report\na,  ", "none of its 1 rows has a report"),
        *((text, "not HistGen's layout") for text in ("[1]", "{", '{"train": [{"id": 1}]}', '{"train": 3}')),
    ],
)  # fmt: skip
def test_contradictions_and_what_holds_no_reports_are_refused_and_both_rows_are_named(tmp_path, text, message):
    path = tmp_path / ("r.json" if text[0] in "{[" else "r.csv")
    path.write_text(text)
    with refused(TableError, message):
        read_reports(path)


def test_a_slide_and_its_patient_may_have_a_report_each_and_the_same_report_may_come_twice(tmp_path):
    (tmp_path / "r.csv").write_text("slide_id,patient_id,report\na,P1,One.\n,P1,Two.\nb,P1,Three.\na.svs,P1,One.\n")
    assert len(read_reports(tmp_path / "r.csv")) == 4
    (tmp_path / "p.csv").write_text("slide_id,patient_id\na,P1\na.tif,P2\n")
    with pytest.raises(TableError, match=r"'P1' \(line 2\) and 'P2' \(line 3\)"):
        read_patients(tmp_path / "p.csv")


def test_a_barcode_names_the_patient_wherever_it_stands():
    uuid = "0d2a5e8e-1d0c-4d4e-9c62-2b1a4f7f5c11"
    for slide in ("TCGA-05-4382", "TCGA-05-4382-01Z-00-DX1.76b4", f"{uuid}__TCGA-05-4382-01Z-00-DX1.{uuid}", "lung__TCGA-05-4382__slide 1"):
        assert patient_of(slide) == "TCGA-05-4382"
    assert patient_of("TCGA-05-4384__TCGA-05-4382-01Z") == "TCGA-05-4382"  # the file's own, not its folder's
    for slide in ("slide7", "XTCGA-05-4382", "TCGA-05-43821", "TCGA-05"):
        assert patient_of(slide) == slide
