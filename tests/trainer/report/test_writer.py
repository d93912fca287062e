"""ReportWriter writes evaluations and the page while a run trains, stops or fails."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.html_page import HtmlPage

from trainer.data.splits import TensorSplit
from trainer.inference.evaluation import Predictions, compute_scores
from trainer.report.examples import read_examples
from trainer.report.html import write_report
from trainer.report.media import NullMediaWriter
from trainer.report.writer import ReportWriter
from trainer.run.folder import RunFolder

SPLIT = TensorSplit(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
SCORES = compute_scores(1.0, torch.eye(2, dtype=torch.int64), ("a", "b"))


class RecordingMediaWriter(NullMediaWriter):
    """Records the steps of its evaluations."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_evaluation(self, split: TensorSplit, predictions: Predictions, step: int) -> None:
        self.steps.append(step)


def predictions(num_wrong: int) -> Predictions:
    """Returns predictions for SPLIT, of which the first ones are wrong."""
    labels = SPLIT.labels.clone()
    labels[:num_wrong] = 1 - labels[:num_wrong]
    return Predictions(labels, torch.full((4,), 0.5), torch.full((4, 2), 0.5))


def report_writer(
    folder: Path, log: Callable[[str], None] = print, media: NullMediaWriter | None = None, writes_page: bool = True
) -> ReportWriter:
    return ReportWriter(RunFolder(folder), ("a", "b"), log, media or NullMediaWriter(), writes_page)


@pytest.fixture
def begun(finished: Path, tmp_path: Path) -> Path:
    """A run folder with nothing but config.yaml."""
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    return folder


def test_evaluations_in_quick_succession_are_written_once_and_the_last_one_at_the_end(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.report.writer.time", SimpleNamespace(monotonic=lambda: 0.0))
    writer = report_writer(begun)
    writer.on_evaluation(SPLIT, SCORES, predictions(1), 1)
    first_write_time = (begun / "report.html").stat().st_mtime_ns
    writer.on_evaluation(SPLIT, SCORES, predictions(3), 2)
    assert (begun / "report.html").stat().st_mtime_ns == first_write_time
    writer.write()
    assert len(read_examples(begun).mistakes) == 3


def test_slow_reports_are_written_less_often(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 0.0, 1.0, 50.9, 51.1, 51.1, 51.2])  # the first report takes 1 s: the next after 50 s
    monkeypatch.setattr("trainer.report.writer.time", SimpleNamespace(monotonic=lambda: next(clock)))
    media = RecordingMediaWriter()
    writer = report_writer(begun, media=media, writes_page=False)
    for step in (1, 2, 3):
        writer.on_evaluation(SPLIT, SCORES, predictions(1), step)
    assert media.steps == [1, 3]


def test_stop_writes_the_last_evaluation_without_figures(begun: Path) -> None:
    media = RecordingMediaWriter()
    writer = report_writer(begun, media=media)
    writer.on_evaluation(SPLIT, SCORES, predictions(1), 1)
    writer.on_evaluation(SPLIT, SCORES, predictions(3), 2)
    (begun / "status.json").write_text('{"state": "stopped", "step": 2, "reason": "SIGTERM"}')
    writer.on_stop()
    assert json.loads((begun / "evaluation.json").read_text())["step"] == 2 and media.steps == [1]
    assert len(read_examples(begun).mistakes) == 3 and "stopped" in (begun / "report.html").read_text()


@pytest.mark.parametrize(("is_on_gpu", "written_step"), [(False, 2), (True, 1)])
def test_failure_writes_the_page_but_does_not_read_from_a_gpu(is_on_gpu: bool, written_step: int, begun: Path) -> None:
    media = RecordingMediaWriter()
    writer = report_writer(begun, media=media)
    writer.on_evaluation(SPLIT, SCORES, predictions(1), 1)
    writer.on_evaluation(SPLIT, SCORES, predictions(3), 2)
    writer._images_on_gpu = is_on_gpu
    (begun / "status.json").write_text('{"state": "failed", "step": 2, "reason": "lost"}')
    writer.on_failure()
    assert json.loads((begun / "evaluation.json").read_text())["step"] == written_step and media.steps == [1]
    assert "failed" in (begun / "report.html").read_text()


def test_unwritable_report_warns_once(begun: Path) -> None:
    messages: list[str] = []
    (begun / "report.html").mkdir()  # a folder blocks the file
    writer = report_writer(begun, messages.append)
    writer.on_evaluation(SPLIT, SCORES, predictions(1), 1)
    writer.write()
    (message,) = messages
    assert message.startswith(f"the report in {begun} cannot be written (")
    assert message.endswith(f"Write it later with: samecurve report {begun}")


def test_damaged_file_in_run_folder_warns(finished: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    folder = shutil.copytree(finished, tmp_path / "x")
    (folder / "status.json").write_text('{"state": "fin')
    report_writer(folder, messages.append).on_evaluation(SPLIT, SCORES, predictions(1), 1)
    (message,) = messages
    assert "status.json cannot be read" in message


def test_run_that_has_not_begun_gets_no_report(tmp_path: Path) -> None:
    messages: list[str] = []
    report_writer(tmp_path, messages.append).on_evaluation(SPLIT, SCORES, predictions(1), 1)
    assert not messages and not (tmp_path / "report.html").exists() and not (tmp_path / "evaluation.json").exists()


def test_running_run_shows_class_scores_of_its_last_evaluation(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "x")
    (folder / "summary.json").unlink()
    (folder / "evaluation.json").unlink()
    write_report([folder], folder / "report.html")
    assert "class precision" not in HtmlPage((folder / "report.html").read_text()).text
    report_writer(folder).on_evaluation(SPLIT, SCORES, predictions(1), 7)
    text = HtmlPage((folder / "report.html").read_text()).text
    assert "test set at step 7" in text and "a 100.0% 100.0% 100.0% 1" in text
