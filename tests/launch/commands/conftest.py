"""Fixtures for tests of the commands."""

from pathlib import Path

import pytest
from support.processes import finished_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on digits, with report.html and without figures."""
    return finished_run(tmp_path_factory.mktemp("runs"), "train.max_steps=20", "data.validation_fraction=0.1")
