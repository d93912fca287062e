"""Tests which runs `samecurve dashboard` shows."""

from pathlib import Path

import pytest

from launch.commands.dashboard import _logged_runs
from trainer.errors import DashboardError


def write_run(path: Path, is_logged: bool) -> Path:
    (path / "wandb").mkdir(parents=True)
    (path / "config.yaml").write_text(f"run: {{name: {path.name}}}\nlog: {{project: p}}\n")
    if is_logged:
        (path / "wandb" / "run-id").write_text("abcd1234")
    return path


def test_unlogged_run_is_skipped_unless_the_user_names_it(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "b", True), write_run(tmp_path / "a", True), write_run(tmp_path / "c", False)]
    assert [run.name for run in _logged_runs(paths, tmp_path, are_named=False)] == ["a", "b"]
    with pytest.raises(DashboardError, match=r"/c was not logged to W&B: train with log\.wandb=auto"):
        _logged_runs(paths, tmp_path, are_named=True)
    with pytest.raises(DashboardError, match=r"no run under .* was logged to W&B"):
        _logged_runs(paths[2:], tmp_path, are_named=False)
