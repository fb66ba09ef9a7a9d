"""What a folder of results holds, to compare with what another one does; errors of one line; several ranks; a file that does harm."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import dreslcl
from dreslcl.tiles import read_slides


def sums_of(bank: Any, slide: str) -> tuple[np.ndarray, np.ndarray]:
    """Residual sums and counts of all tiles of a slide in a bank."""
    found = bank._open(slide)
    return found.sums.sum(0), found.counts.sum(0)


@contextmanager
def refused(error: type[Exception], message: str | None = None) -> Iterator[None]:
    """What is done inside raises this error, whose message is one line and matches."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a folder but locks, by relative path: its bytes; of HDF5 files the data and attributes."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock")):
        name = str(path.relative_to(folder))
        found[name] = hdf5(path) if path.suffix == ".h5" else path.read_bytes()
    return found


def hdf5(path: Path) -> dict[str, Any]:
    """Datasets and attributes of a file, as bytes and texts; not the way from the file to its model."""
    with h5py.File(path) as file:
        data = {key: np.asarray(value[()]).tolist() for key, value in file.items()}
        return data | {
            f"{key}@": {k: str(v) for k, v in value.attrs.items() if k != "model_folder"} for key, value in [*file.items(), ("", file)]
        }


def tiled(work: Path) -> dict[str, Any]:
    """What `tile` wrote, without the seconds each slide took."""
    found = contents(work)
    for name in (name for name in found if name.startswith("rows/")):
        found[name] = json.loads(found[name])
        found[name]["row"]["seconds"] = 0
    return found | {"slides.csv": [row | {"seconds": 0} for row in read_slides(work)]}


def stamps(folder: Path, pattern: str) -> dict[str, int]:
    """When files were written, by their names without suffix."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def torchrun(ranks: int, program: str, *arguments: Path, gpus: str = "") -> None:
    """Run a Python program on so many ranks."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": str(Path(dreslcl.__file__).parents[1])}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(program)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            "--standalone",
            file.name,
            *map(str, arguments),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | variables)
    assert done.returncode == 0, done.stderr[-3000:]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
