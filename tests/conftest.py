"""Shapes in signatures are checked under pytest only; real test inputs come from DRESLCL_TEST_DATA."""

import logging
import os
import socket
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("dreslcl", "beartype.beartype")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real test inputs; tests that need it skip, saying so, where DRESLCL_TEST_DATA is not set."""
    folder = os.environ.get("DRESLCL_TEST_DATA")
    if not folder:
        pytest.skip("DRESLCL_TEST_DATA is not set: no real test inputs")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def openslide():
    """The package, as reference or as reader; tests that need it skip, saying so, without."""
    return pytest.importorskip("openslide", reason="needs the extra [openslide]", exc_type=ImportError)


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Eight scans of coloured noise on white glass, tiled, with reports; p0 has two slides."""
    import numpy as np

    from dreslcl.common import write_table
    from dreslcl.config import TileConfig
    from dreslcl.demo import write_scan
    from dreslcl.tiles import tile_slides

    folder, rng = tmp_path_factory.mktemp("cohort"), np.random.default_rng(0)
    (folder / "slides").mkdir()
    for i in range(8):
        image = np.full((640, 768, 3), 244, np.uint8)
        image[64:576, 64:704] = rng.integers(60, 160, (512, 640, 3)) // (1, 2, 1) + np.array([i * 8, 0, 90 - i * 9])
        write_scan(folder / "slides" / f"s{i}.svs", image, mpp=1.0)
    tile_slides(folder / "slides", folder / "work", TileConfig(size=64, mpp=2.0))
    patients = ["p0", "p0", *(f"p{i}" for i in range(2, 8))]
    rows = [
        (f"s{i}", p, f"Report of {p}. Finding number {i}. Margins are free.", "val" if i > 5 else "train") for i, p in enumerate(patients)
    ]
    write_table(folder / "work" / "reports.csv", ["slide_id", "patient_id", "report", "split"], rows)
    return folder / "work"


@pytest.fixture(scope="session")
def tiny():
    """The embedded encoder, with random weights."""
    from dreslcl.config import EncoderConfig
    from dreslcl.encoder import Encoder

    return Encoder.create(EncoderConfig()).eval()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model folder as `pretrain` writes it, with random weights."""
    import numpy as np
    import torch

    from dreslcl.config import EncoderConfig, ModelConfig
    from dreslcl.encoder import Encoder
    from dreslcl.model import DRESLCL
    from dreslcl.text import make_text

    config = EncoderConfig(text="tower:tune")
    encoder = Encoder.create(config)
    torch.manual_seed(0)
    text = make_text(config.text, encoder, ["a report", "another one"])
    about = {"tiles": "pixels", "seen": ["s0"], "tile": {"size": 64, "mpp": 2.0}}
    made = DRESLCL(encoder, text, ModelConfig(codewords=4, width=16), dim=encoder.dim, about=about)
    words = torch.from_numpy(np.random.default_rng(0).normal(size=(4, encoder.dim)).astype(np.float32))
    made.aggregator.codewords.copy_(words)
    made.aggregator.set_statistics(words)
    folder = tmp_path_factory.mktemp("run") / "model"
    made.save(folder)
    return folder


@pytest.fixture(autouse=True)
def loggers():
    """As a program that imports the package finds them: the command line, run in a test's process, sets their level."""
    logging.getLogger("dreslcl").setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)


@pytest.fixture
def spy(monkeypatch):
    """`spy(owner, name)` is the list of all calls' arguments of a function, which works as before."""

    def watch(owner, name: str) -> list[tuple]:
        calls, original = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(args) or original(*args, **options))
        return calls

    return watch


@pytest.fixture(scope="session")
def cohort(work):
    """Those scans with their reports."""
    from dreslcl.cohort import Cohort

    return Cohort.load(work).with_reports(work / "reports.csv")


@pytest.fixture
def features(tmp_path) -> Path:
    """Files of tile features of eight slides, and vectors of a report of each beside their folder, in vectors.npz."""
    import h5py
    import numpy as np

    rng, folder = np.random.default_rng(0), tmp_path / "features"
    folder.mkdir()
    for i in range(8):
        with h5py.File(folder / f"s{i}.h5", "w") as file:
            file["features"] = rng.normal(size=(40, 24)).astype(np.float32)
    np.savez(tmp_path / "vectors.npz", **{f"s{i}": rng.normal(size=(3, 32)).astype(np.float32) for i in range(8)})
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
