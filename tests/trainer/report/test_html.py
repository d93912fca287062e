"""The report page of one run shows what the run's files contain and needs no other files."""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.html_page import HtmlPage

from trainer.errors import FolderError
from trainer.report.html import write_report


def report_of(folder: Path) -> HtmlPage:
    """Writes and parses the report of a run folder."""
    write_report([folder], folder / "report.html")
    return HtmlPage((folder / "report.html").read_text())


def test_report_shows_results_settings_and_environment(finished: Path) -> None:
    text = HtmlPage((finished / "report.html").read_text()).text
    summary = json.loads((finished / "summary.json").read_text())
    assert "a <b>&c finished" in text and f"test accuracy {summary['test']['accuracy']:.2%}" in text
    for row, counts in zip(summary["test"]["classes"], summary["test"]["confusion"], strict=True):
        assert f"{row['name']} {row['precision']:.1%} {row['recall']:.1%} {row['f1']:.1%} {row['support']}" in text
        assert f"{row['name']} {' '.join(map(str, counts))}" in text
    assert "model.name lenet resnet18" in text and "train.epochs 4 " in text  # value, default
    assert "restarts 0" in text and "--config digits" in text and torch.__version__.partition("+")[0] in text
    assert "with test-time augmentation" not in text


def test_report_needs_no_other_files(finished: Path) -> None:
    content = (finished / "report.html").read_text()
    page = HtmlPage(content)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", content)


def test_report_has_all_sections_with_content_and_no_others(finished: Path) -> None:
    titles = re.findall("<h2>(.*?)</h2>", (finished / "report.html").read_text())
    assert titles == [
        "Curves",
        "Classes",
        "Most confident mistakes",
        "Samples of each class",
        "Settings that differ from the defaults",
        "Environment",
        "How to repeat this run",
    ]  # log.figures=false: no first batch, no feature maps


def test_report_of_run_without_metrics(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    assert "no accuracy yet" in report_of(folder).text


def test_report_of_running_run_ignores_cut_off_row(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "running"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))
    (folder / "status.json").write_text('{"state": "running", "step": 40, "reason": ""}')
    assert "a <b>&c running" in report_of(folder).text


def test_report_of_other_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"has no config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")


def test_report_shows_tta_accuracy_and_stop_reason(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    row = {"split": "test", "step": 9, "epoch": 4.0, "loss": 1.0, "accuracy": 0.5, "tta_accuracy": 0.625}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "status.json").write_text('{"state": "stopped", "step": 9, "reason": "SIGTERM"}')
    text = report_of(folder).text
    assert "with test-time augmentation 62.50%" in text and "test images) - SIGTERM" in text


def test_gallery_captions_wrong_predictions_with_true_class(finished: Path) -> None:
    content = (finished / "report.html").read_text()
    mistakes, samples = content.split("<h2>Samples of each class</h2>")
    assert '<figure class="wrong">' in mistakes and '<figure class="right">' not in mistakes
    assert re.search(r"<b>\w+ \d+%</b><br>true: \w+", mistakes) and '<figure class="right">' in samples


@pytest.mark.parametrize(("backend", "option"), [("nccl", "--gpus-per-node"), ("gloo", "--ntasks-per-node")])
def test_command_to_repeat_run_on_several_hosts_submits_job(
    backend: str, option: str, finished: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    environment = json.loads((finished / "environment.json").read_text())
    environment |= {"world_size": 4, "hosts": ["a", "b"], "backend": backend}
    (folder / "environment.json").write_text(json.dumps(environment))
    config_file = tmp_path / "x" / "config.yaml"
    assert f"samecurve submit --nodes 2 {option} 2 --config {config_file}" in report_of(folder).text


def test_command_to_repeat_run_on_one_host_trains(finished: Path) -> None:
    text = HtmlPage((finished / "report.html").read_text()).text
    assert f"samecurve train --ranks 1 --config '{finished / 'config.yaml'}' 'run.name=a <b>&c-again'" in text


def test_evaluation_with_many_classes_has_a_picture_and_hides_their_scores(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    classes = [{"name": f"c{i}", "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1} for i in range(31)]
    confusion = [[int(i == j) for j in range(31)] for i in range(31)]
    (folder / "evaluation.json").write_text(json.dumps({"step": 1, "classes": classes, "confusion": confusion}))
    page = report_of(folder)
    assert "scores of 31 classes class precision" in page.text and "Most frequent mistakes no mistakes" in page.text
    assert '<img class="map"' in (folder / "report.html").read_text()


def test_header_shows_data_parameters_and_the_best_step(finished: Path) -> None:
    text = HtmlPage((finished / "report.html").read_text()).text
    assert "lenet on digits of scikit-learn (1,433 train, 364 test images)" in text
    assert "parameters 61,706 " in text and re.search(r"test loss 0\.\d{4} ", text)
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if row["split"] == "test"), key=lambda row: row["accuracy"])
    assert f"best test accuracy {best['accuracy']:.2%} step {best['step']}" in text
    assert f"best test accuracy {best['accuracy']:.2%}, step {best['step']}" in text  # the mark in the charts


def test_header_shows_the_folder_of_the_data(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    settings = (folder / "config.yaml").read_text().replace("name: digits", "name: image_folder")
    (folder / "config.yaml").write_text(re.sub("  root: .*", "  root: my/photos", settings))
    environment = json.loads((folder / "environment.json").read_text()) | {"directory": "/there"}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert "lenet on image_folder in /there/my/photos (1,433 train, 364 test images)" in report_of(folder).text


def test_validation_accuracy_comes_first_and_selects_the_best_step(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    with (folder / "metrics.jsonl").open("a") as file:
        for step, accuracy in ((50, 0.75), (60, 0.5)):
            row = {"split": "validation", "step": step, "epoch": step / 23, "loss": 1.0, "accuracy": accuracy}
            file.write(json.dumps(row) + "\n")
    text = report_of(folder).text
    assert "validation accuracy 50.00% test accuracy" in text and "best validation accuracy 75.00% step 50" in text


def test_settings_of_another_version_are_shown(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    settings = (folder / "config.yaml").read_text().replace("  name: lenet\n", "  kind: lenet\n")
    (folder / "config.yaml").write_text(settings)
    text = report_of(folder).text
    assert "a network on digits" in text and "model.kind lenet not a setting of this version" in text


def test_lines_of_metrics_that_are_no_rows_are_skipped_and_named(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[1:1] = ['{"split": "train", "step": "x"}', "<<<<<<< HEAD"]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (problem,) = write_report([folder], folder / "report.html")
    assert "metrics.jsonl: 2 lines are skipped (expected a whole number as step, got 'x')" in problem
    assert problem in HtmlPage((folder / "report.html").read_text()).text


HOSTILE = [
    "</svg><script>alert(1)</script>",
    '"><img src=http://x/y onerror=a>',
    "'><b>",
    "</style><p>",
    "&lt;i&gt;",
    "]]>",
]


def test_text_of_a_run_never_becomes_elements(finished: Path, tmp_path: Path) -> None:
    sane = report_of(shutil.copytree(finished, tmp_path / "sane"))
    folder = shutil.copytree(finished, tmp_path / "hostile")
    hostile = itertools.cycle(HOSTILE)
    settings = re.sub("name: .*<b>.*", f"name: {json.dumps(next(hostile))}", (folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(re.sub("project: .*", f"project: {json.dumps(next(hostile))}", settings))
    (folder / "status.json").write_text(json.dumps({"state": next(hostile), "step": 92, "reason": next(hostile)}))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for row in evaluation["classes"]:
        row["name"] = next(hostile)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    environment = json.loads((folder / "environment.json").read_text())
    environment |= {"command": next(hostile), "directory": next(hostile), "platform": next(hostile)}
    (folder / "environment.json").write_text(json.dumps(environment | {"hosts": [next(hostile)]}))
    page = report_of(folder)
    assert page.elements - sane.elements == Counter({"tr": 1, "td": 3})  # log.project differs from its default
    assert not sane.elements - page.elements and all(source.startswith("data:image/png") for source in page.sources)
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text
    write_report([folder, finished], tmp_path / "both.html")
    page = HtmlPage((tmp_path / "both.html").read_text())
    assert not page.sources and not {"script", "img onerror src", "b", "i"} & set(page.elements)
