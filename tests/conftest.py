"""Shapes in signatures are checked under pytest only; real test inputs come from DRESLCL_TEST_DATA."""

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("dreslcl", "beartype.beartype")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real test inputs; tests that need it skip, saying so, where DRESLCL_TEST_DATA is not set."""
    folder = os.environ.get("DRESLCL_TEST_DATA")
    if not folder:
        pytest.skip("DRESLCL_TEST_DATA is not set: no real test inputs")
    return Path(folder).resolve()
