import pickle

import h5py
import numpy as np
import pytest
import torch

from dreslcl.common import StoreError, TableError
from dreslcl.formats import find_features, read_corners, read_features


def bag(n=5, d=4, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def write_h5(path, **datasets):
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_layouts_of_trident_clam_and_stamp_read_alike(tmp_path):
    rows, xy = bag(), np.arange(10).reshape(5, 2)
    trident = write_h5(tmp_path / "a.h5", features=rows[None], coords=xy)
    clam = write_h5(tmp_path / "b.h5", features=rows, coords=xy.astype(np.int32))
    stamp = write_h5(tmp_path / "c.h5", feats=rows.astype(np.float16), coords=xy.astype(np.float32))
    bare = write_h5(tmp_path / "d.h5", features=rows)
    torch.save(torch.from_numpy(rows).requires_grad_(), tmp_path / "e.pt")
    for path in (trident, clam, stamp, bare, tmp_path / "e.pt"):
        assert np.allclose(read_features(path), unit(rows), atol=2e-3), path
    assert np.array_equal(read_corners(trident), xy) and np.array_equal(read_corners(clam), xy)
    assert read_corners(stamp) is None and read_corners(bare) is None and read_corners(tmp_path / "e.pt") is None


def test_folder_is_searched_also_in_clams_two_and_h5_wins(tmp_path):
    write_h5(tmp_path / "h5_files" / "s.1.h5", features=bag())
    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(bag()), tmp_path / "pt_files" / "s.1.pt")
    torch.save(torch.from_numpy(bag(2)), tmp_path / "pt_files" / "t.pt")
    assert find_features(tmp_path) == {"s.1": (tmp_path / "h5_files" / "s.1.h5", 5), "t": (tmp_path / "pt_files" / "t.pt", 2)}


def test_empty_slide_is_found_with_no_tiles(tmp_path):
    write_h5(tmp_path / "a.h5", features=np.zeros((0, 4), np.float32))
    assert find_features(tmp_path)["a"][1] == 0


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_is_never_run(tmp_path):
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(StoreError, match="pickled objects are not read") as caught:
            read_features(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def broken(folder, how):
    path = folder / "a.h5"
    if how == "not HDF5":
        path.write_bytes(b"hello")
    elif how == "truncated":
        write_h5(path, features=bag(5000))
        path.write_bytes(path.read_bytes()[:3000])
    elif how == "no features":
        write_h5(path, embeddings=bag())
    elif how == "a group":
        with h5py.File(path, "w") as file:
            file.create_group("features")
    elif how == "words":
        write_h5(path, features=np.array([[b"a", b"b"]]))
    elif how == "one vector":
        write_h5(path, features=bag()[0])
    elif how == "not finite":
        write_h5(path, features=np.array([[1.0, np.nan]]))
    elif how == "a dictionary":
        path = folder / "a.pt"
        torch.save({"features": torch.zeros(2, 2)}, path)
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not HDF5", "not a readable file"), ("truncated", "not a readable file"), ("no features", "holds embeddings; tile features are"),
        ("a group", "tile features are a dataset"), ("words", "numbers .* are needed"), ("one vector", r"\(tiles, width\) are needed"),
        ("not finite", "not finite; extract them anew"), ("a dictionary", "holds a dict; a plain"),
    ],
)  # fmt: skip
def test_wrong_file_is_refused_in_one_line(tmp_path, how, message):
    with pytest.raises(StoreError, match=message) as caught:
        read_features(broken(tmp_path, how))
    assert "\n" not in str(caught.value)


def test_folders_without_features_or_of_several_widths_are_refused(tmp_path):
    with pytest.raises(TableError, match=r"no \.h5 or \.pt files"):
        find_features(tmp_path)
    write_h5(tmp_path / "a.h5", features=bag(d=4))
    write_h5(tmp_path / "b.h5", features=bag(d=5))
    with pytest.raises(TableError, match=r"several widths: 4 \(a\.h5\), 5 \(b\.h5\)"):
        find_features(tmp_path)
