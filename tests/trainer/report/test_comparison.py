"""The report page of several runs shows results, different settings and means over seeds."""

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from support.html_page import HtmlPage

from trainer.errors import FolderError
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
    assert f"a <b>&c, s1, s2 3 {mean:.2%} {deviation:.2f}" in text and "lr 1 10.00%" not in text


def test_curves_have_a_color_per_experiment_and_dashed_train_lines(finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished, tmp_path / "b")
    settings = (other / "config.yaml").read_text().replace("lr: 0.05", "lr: 0.5")
    (other / "config.yaml").write_text(re.sub(r"name: .*<b>.*", "name: b", settings))
    compare([finished, other], tmp_path / "out.html")
    _, loss_chart, _, lr_chart, *_ = (tmp_path / "out.html").read_text().split("<figcaption>")
    lines = re.findall('<(?:polyline|circle) class="(line.*?)"', loss_chart)
    assert lines == ["line c0 dashed", "line c0", "line c1 dashed", "line c1"] and "b: test" in loss_chart
    assert "dashed" not in lr_chart  # only train rows have a learning rate


def test_repeated_seed_counts_once(runs: list[Path], tmp_path: Path) -> None:
    config = (runs[2] / "config.yaml").read_text().replace("seed: 2", "seed: 1")
    (runs[2] / "config.yaml").write_text(config)
    assert "Mean over seeds" not in compare(runs[1:3], tmp_path / "out.html").text
    text = compare(runs[:3], tmp_path / "out.html").text
    own_accuracy = json.loads((runs[0] / "summary.json").read_text())["test"]["accuracy"]
    assert f"a <b>&c, s1, s2 2 {statistics.mean([own_accuracy, 0.8]):.2%}" in text


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
    assert "s1 unknown 90.00% 1.0000 90.00% 9 - - - -" in text
    assert text.index("s1 unknown") < text.index("s2 unknown") < text.index("lr unknown"), "best first"
    assert "ranked by test accuracy; the runs have no common validation part" in text


def add_validation(folder: Path, accuracy: float) -> None:
    row = {"split": "validation", "step": 9, "epoch": 4.0, "loss": 1.0, "accuracy": accuracy}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_runs_are_ranked_by_validation_accuracy_if_all_have_it(runs: list[Path], tmp_path: Path) -> None:
    for folder, accuracy in zip(runs[1:], (0.5, 0.6, 0.7), strict=True):
        add_validation(folder, accuracy)
    text = compare(runs[1:], tmp_path / "out.html").text
    assert "ranked by validation accuracy" in text
    assert text.index("lr unknown 70.00% 10.00%") < text.index("s2 unknown 60.00% 80.00%") < text.index("s1 unknown")
    assert "s1, s2 2 55.00% 7.07 85.00% 7.07" in text


def test_seeds_of_one_experiment_are_a_line_with_a_band_and_one_legend_entry(runs: list[Path], tmp_path: Path) -> None:
    for folder, values in zip(runs[1:3], ((0.5, 0.9), (0.7, 0.8)), strict=True):
        rows = [
            {"split": "test", "step": step, "epoch": float(step), "loss": 1.0, "accuracy": value}
            for step, value in enumerate(values)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare(runs[1:], tmp_path / "out.html")
    content = (tmp_path / "out.html").read_text()
    (legend,) = re.findall('<ul class="legend">(.*?)</ul>', content)
    assert re.findall("</span>(.*?)</li>", legend) == ["s1, s2, mean over 2 seeds", "lr"]
    accuracy_chart = content.split("<figcaption>accuracy</figcaption>")[1].split("</figure>")[0]
    assert accuracy_chart.count("<polygon") == 1 and "s1, s2: test 60.00%" in accuracy_chart
    assert "s1, s2: test 85.00%" in accuracy_chart


def test_damaged_run_is_left_out_and_named(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "status.json").write_text('{"state": "failed", "step": "x"}')
    (problem,) = write_report(runs, tmp_path / "out.html")
    assert problem.startswith(f"{runs[1]} is left out") and "expected a whole number as step, got 'x'" in problem
    text = HtmlPage((tmp_path / "out.html").read_text()).text
    assert "3 runs" in text and problem in text and "s2 unknown" in text and "s1 unknown" not in text
    with pytest.raises(FolderError, match=r"status\.json cannot be read"):
        write_report([runs[1], runs[1]], tmp_path / "out.html")
