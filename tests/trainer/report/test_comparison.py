"""The report page of several runs shows results, different settings and means over seeds."""

import json
import re
import statistics
from pathlib import Path

import pytest
from support.html_page import HtmlPage

from trainer.report.html import write_report


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> list[Path]:
    """The finished run, two runs with other seeds, and one with another learning rate."""
    folders = [finished]
    for name, old, new, accuracy in (
        ("s1", "seed: 0", "seed: 1", 0.9), ("s2", "seed: 0", "seed: 2", 0.8), ("lr", "lr: 0.05", "lr: 0.5", 0.1),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        settings = (finished / "config.yaml").read_text().replace(old, new)
        (folder / "config.yaml").write_text(re.sub(r"name: .*<b>.*", f"name: {name}", settings))
        row = {"split": "test", "step": 9, "epoch": 4.0, "loss": 1.0, "accuracy": accuracy}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        folders.append(folder)
    return folders


def compare(folders: list[Path], out: Path) -> HtmlPage:
    write_report(folders, out)
    return HtmlPage(out.read_text())


def test_mean_over_seeds_groups_runs_that_differ_only_in_seed(runs: list[Path], tmp_path: Path) -> None:
    text = compare(runs, tmp_path / "out.html").text
    own_accuracy = json.loads((runs[0] / "summary.json").read_text())["test"]["accuracy"]
    accuracies = [own_accuracy, 0.9, 0.8]
    mean, deviation = statistics.mean(accuracies), 100 * statistics.stdev(accuracies)
    assert f"a <b>&c, s1, s2 3 {mean:.2%} {deviation:.2f}" in text and "lr 1 10.00% -" in text


def test_repeated_seed_counts_once(runs: list[Path], tmp_path: Path) -> None:
    config = (runs[2] / "config.yaml").read_text().replace("seed: 2", "seed: 1")
    (runs[2] / "config.yaml").write_text(config)
    text = compare(runs[1:3], tmp_path / "out.html").text
    assert "s1, s2 1 80.00% -" in text


def test_only_different_settings_are_listed(runs: list[Path], tmp_path: Path) -> None:
    text = compare(runs, tmp_path / "out.html").text
    assert "run.seed 0 1 2 0" in text and "optim.lr 0.05 0.05 0.05 0.5" in text
    assert "optim.momentum" not in text and "run.root" not in text


def test_runs_with_equal_settings(finished: Path, tmp_path: Path) -> None:
    text = compare([finished, finished], tmp_path / "out.html").text
    assert "2 runs" in text and "The runs differ only in their names." in text


def test_runs_with_equal_names_are_shown_by_folder(finished: Path, tmp_path: Path) -> None:
    assert f"{finished} finished" in compare([finished, finished], tmp_path / "out.html").text


def test_results_table_has_a_row_per_run(runs: list[Path], tmp_path: Path) -> None:
    text = compare(runs, tmp_path / "out.html").text
    assert "s1 unknown 90.00% 1.0000 - - - -" in text
