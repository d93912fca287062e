"""Fixtures for tests of the report."""

from pathlib import Path

import pytest
from support.processes import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on digits, with a name that needs escaping. Copy it to change it."""
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=4", "run.name=a <b>&c")
