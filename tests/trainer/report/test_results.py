"""Headline numbers and curve charts of a run."""

import json
import re
import shutil
from pathlib import Path

from trainer.report.results import curve_charts, last_row, read_results
from trainer.run.record import RunRecord


def test_results_of_finished_run_come_from_summary(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    results = read_results(RunRecord(finished))
    assert results.state == "finished" and results.reason == "" and results.epochs == "4"
    assert results.test_accuracy == f"{summary['test']['accuracy']:.2%}"
    assert results.images_per_second == f"{summary['train']['samples_per_second']:,.0f}"
    assert (results.tta_accuracy, results.world_size, results.restarts) == ("-", "1", "0")


def test_results_ignore_summary_of_earlier_step(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "longer")
    (folder / "status.json").write_text('{"state": "stopped", "step": 99, "reason": ""}')
    summary = json.loads((folder / "summary.json").read_text())
    summary["train"]["samples_per_second"] = 123456789.0
    (folder / "summary.json").write_text(json.dumps(summary))
    results = read_results(RunRecord(folder))
    assert results.steps == "99" and results.images_per_second not in ("-", "123,456,789")


def test_results_of_run_without_files_are_dashes(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    results = read_results(RunRecord(tmp_path))
    assert results.state == "unknown" and results.epochs == "0"
    assert {results.test_accuracy, results.test_loss, results.time, results.steps, results.images_per_second} == {"-"}


def test_last_row_is_found_far_from_the_end(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    test_row = {"split": "test", "step": 1, "epoch": 1.0, "loss": 1.0, "accuracy": 0.5}
    train_row = {"split": "train", "step": 1, "epoch": 1.0, "loss": 1.0, "padding": "x" * 500}
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, [test_row, *[train_row] * 10_000])) + "\n")
    assert (tmp_path / "metrics.jsonl").stat().st_size > 5_000_000
    assert last_row(RunRecord(tmp_path), "test") == test_row


def test_curves_of_one_run_have_a_color_per_split(finished: Path) -> None:
    loss_chart = curve_charts(RunRecord(finished)).split("</figure>")[0]
    assert re.findall('<(?:polyline|circle) class="(line.*?)"', loss_chart) == ["line c0", "line c1"]


def test_curves_of_long_run_have_all_test_points_and_some_train_points(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "config.yaml", tmp_path)
    train_row = {"split": "train", "step": 1, "epoch": 1.0, "loss": 1.0, "accuracy": 0.5, "lr": 0.1, "seconds": 123.456}
    test_row = {"split": "test", "step": 1, "epoch": 1.0, "loss": 1.0, "accuracy": 0.5}
    rows = [train_row] * 60_000 + [test_row] * 5
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    record = RunRecord(tmp_path)
    assert len(record.points("test", "loss")) == 5 and 10_000 < len(record.points("train", "loss")) < 40_000
    assert record.points("validation", "loss") == []
