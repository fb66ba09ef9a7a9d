"""Results of an undisturbed run of all four commands, to compare with."""

from pathlib import Path

import pytest
from attack import command, dreslcl, in_child

from dreslcl.common import write_table


@pytest.fixture(scope="session")
def whole(work, tmp_path_factory) -> Path:
    """A folder with undisturbed results of all four commands."""
    folder = tmp_path_factory.mktemp("whole")
    labels = [(f"s{i}", f"p{i}", "ab"[i % 2], "train" if i < 4 else "test") for i in range(8)]
    write_table(folder / "labels.csv", ["slide_id", "patient_id", "subtype", "split"], labels)
    for name in ("tile", "pretrain", "embed", "eval"):
        done = in_child(dreslcl, *command(name, work, folder), folder / name)
        assert done.code == 0, done
    return folder
