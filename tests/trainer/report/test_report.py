"""report.html: what it shows is what the run's files and its network say; it needs nothing from elsewhere."""

import html.parser
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.processes import Samecurve, finished_run

from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.data.splits import TensorSplit
from trainer.errors import FolderError
from trainer.inference.evaluation import Predictions, compute_scores
from trainer.inference.predict import load_predictor
from trainer.report import examples
from trainer.report import html as report
from trainer.report.html import write_report
from trainer.report.media import NullMediaWriter
from trainer.report.svg import Series, line_chart, ticks
from trainer.report.writer import ReportWriter
from trainer.run.folder import RunFolder
from trainer.run.record import read_record


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=4", "run.name=a <b>&c")


class Page(html.parser.HTMLParser):
    """Text, and that every element that is opened is closed."""

    _EMPTY = ("meta", "img", "br", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self._EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        if tag not in self._EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_it_says_what_the_runs_files_say(run: Path) -> None:
    page = Page((run / "report.html").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert "a <b>&c finished" in page.text and f"test accuracy {summary['test']['accuracy']:.2%}" in page.text
    for row, counts in zip(summary["test"]["classes"], summary["test"]["confusion"], strict=True):
        assert f"{row['name']} {row['precision']:.1%} {row['recall']:.1%} {row['f1']:.1%} {row['support']}" in page.text
        assert f"{row['name']} {' '.join(map(str, counts))}" in page.text
    assert "model.name lenet resnet18" in page.text and "train.epochs 4 " in page.text  # here, and the default
    assert (
        "restarts 0" in page.text
        and "--config digits" in page.text
        and torch.__version__.partition("+")[0] in page.text
    )


def test_it_needs_nothing_from_elsewhere(run: Path) -> None:
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"<script|<link|@import|url\(|https?://", text)


def test_the_mistakes_are_those_that_the_network_makes_the_surest_first(run: Path) -> None:
    test, predictor = digits.load(DataSettings(name="digits")).test, load_predictor(run)
    guesses = [one.top[0] for one in predictor.predict(list(test.images), top=1)]
    wrong = [
        (guess.probability, predictor.classes[label], guess.name)
        for guess, label in zip(guesses, test.labels, strict=True)
        if guess.name != predictor.classes[label]
    ]
    shown = read_record(run).mistakes
    assert len(wrong) > 3 and len(shown) == min(24, len(wrong))
    wanted = sorted(wrong, reverse=True)[: len(shown)]
    assert [one.probability for one in shown] == pytest.approx([one[0] for one in wanted], abs=1e-5)
    assert {(one.label, one.predicted) for one in shown} == {one[1:] for one in wanted}


def test_some_of_each_class_from_all_over_the_split() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 20)
    places = examples.samples_of_each_class(labels, 3)
    assert labels[places].tolist() == [0] * 8 + [1] * 3 + [2] * 8 and int(places[7]) >= 84


def test_while_it_runs_and_when_nothing_is_there_yet(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((run / "config.yaml").read_text())
    write_report([begun], begun / "report.html")
    assert "no accuracy yet" in Page((begun / "report.html").read_text()).text
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (begun / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20]]))  # killed in the midst of a line
    (begun / "status.json").write_text('{"state": "running", "step": 40, "reason": ""}')
    write_report([begun], begun / "report.html")
    assert "running" in Page((begun / "report.html").read_text()).text
    with pytest.raises(FolderError, match="holds no run"):
        write_report([tmp_path], tmp_path / "report.html")


def others(run: Path, root: Path) -> list[Path]:
    """The run three times, with another seed and accuracy, then with another learning rate."""
    made = []
    for name, old, new, accuracy in (
        ("s1", "seed: 0", "seed: 1", 0.9), ("s2", "seed: 0", "seed: 2", 0.8), ("lr", "lr: 0.05", "lr: 0.5", 0.1),
    ):  # fmt: skip
        folder = root / name
        folder.mkdir(parents=True)
        settings = (run / "config.yaml").read_text().replace(old, new)
        (folder / "config.yaml").write_text(re.sub(r"name: .*<b>.*", f"name: {name}", settings))
        line = {"split": "test", "step": 9, "epoch": 4.0, "loss": 1.0, "accuracy": accuracy}
        (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return made


def test_several_side_by_side(run: Path, samecurve: Samecurve) -> None:
    others(run, run.parent)
    out, _ = samecurve("report", run.name, "s1", "s2", "lr", "--root", str(run.parent))
    page = Page(Path(out.strip()).read_text())
    assert Path(out.strip()) == run.parent / "report.html" and "4 runs" in page.text
    own = json.loads((run / "summary.json").read_text())["test"]["accuracy"]
    found = [own, 0.9, 0.8]
    mean, deviation = statistics.mean(found), 100 * statistics.stdev(found)
    assert f"{run.name}, s1, s2 3 {mean:.2%} {deviation:.2f}" in page.text and "lr 1 10.00% -" in page.text
    assert "run.seed 0 1 2 0" in page.text and "optim.lr 0.05 0.05 0.05 0.5" in page.text
    assert "optim.momentum" not in page.text


def test_one_is_made_again_and_a_bad_place_is_one_line(run: Path, samecurve: Samecurve, tmp_path: Path) -> None:
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    out, _ = samecurve("report", str(run))
    assert out.strip() == str(run / "report.html") and (run / "report.html").read_text() == before
    (tmp_path / "file").write_text("")
    _, err = samecurve("report", str(run), "--out", str(tmp_path / "file" / "x.html"), code=2)
    assert "cannot be written" in err and err.count("\n") == 1


def test_a_run_of_several_machines_is_repeated_by_a_job(run: Path, samecurve: Samecurve, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "x")
    about = json.loads((run / "environment.json").read_text())
    about |= {"world_size": 4, "hosts": ["a", "b"], "backend": "nccl"}
    (tmp_path / "x" / "environment.json").write_text(json.dumps(about))
    samecurve("report", str(tmp_path / "x"))
    page = (tmp_path / "x" / "report.html").read_text()
    assert f"samecurve submit --nodes 2 --gpus-per-node 2 --config {tmp_path / 'x' / 'config.yaml'}" in page


def reporter(folder: Path, log: Callable[[str], None]) -> ReportWriter:
    return ReportWriter(RunFolder(folder), ("a", "b"), log, NullMediaWriter())


class TestReporter:
    PART = TensorSplit(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))

    SCORES = compute_scores(1.0, torch.eye(2, dtype=torch.int64), ("a", "b"))

    def predictions(self, wrong: int) -> Predictions:
        labels = self.PART.labels.clone()
        labels[:wrong] = 1 - labels[:wrong]
        return Predictions(labels, torch.full((4,), 0.5), torch.full((4, 2), 0.5))

    def test_evaluations_that_come_fast_are_all_in_the_last_report(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("trainer.report.writer.time", SimpleNamespace(monotonic=lambda: 0.0))
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.yaml").write_text((run / "config.yaml").read_text())
        kept = reporter(tmp_path / "x", print)
        kept.evaluated(self.PART, self.SCORES, self.predictions(1), 1)
        first = (tmp_path / "x" / "report.html").stat().st_mtime_ns
        kept.evaluated(self.PART, self.SCORES, self.predictions(3), 2)
        assert (tmp_path / "x" / "report.html").stat().st_mtime_ns == first
        kept.write()
        assert len(read_record(tmp_path / "x").mistakes) == 3

    def test_a_run_that_is_stopped_leaves_its_last_evaluation(self, run: Path, tmp_path: Path) -> None:
        place = tmp_path / "x"
        place.mkdir()
        (place / "config.yaml").write_text((run / "config.yaml").read_text())
        kept = reporter(place, print)
        kept.evaluated(self.PART, self.SCORES, self.predictions(1), 1)
        kept.evaluated(self.PART, self.SCORES, self.predictions(3), 2)
        (place / "status.json").write_text('{"state": "stopped", "step": 2, "reason": "SIGTERM"}')
        kept.stops()
        assert json.loads((place / "evaluation.json").read_text())["step"] == 2
        assert len(read_record(place).mistakes) == 3 and "stopped" in (place / "report.html").read_text()

    def test_a_disk_in_trouble_costs_the_report_and_is_told_once(self, run: Path, tmp_path: Path) -> None:
        said: list[str] = []
        folder = tmp_path / "x"
        folder.mkdir()
        (folder / "config.yaml").write_text((run / "config.yaml").read_text())
        (folder / "report.html").mkdir()  # in its way
        kept = reporter(folder, said.append)
        kept.evaluated(self.PART, self.SCORES, self.predictions(1), 1)
        kept.write()
        assert len(said) == 1 and "samecurve report makes it" in said[0]

    def test_files_that_somebody_has_changed_and_a_run_that_never_began_cost_no_more(
        self, run: Path, tmp_path: Path
    ) -> None:
        said: list[str] = []
        reporter(tmp_path, said.append).evaluated(self.PART, self.SCORES, self.predictions(1), 1)
        assert not said and not (tmp_path / "report.html").exists()
        folder = shutil.copytree(run, tmp_path / "x")
        (folder / "status.json").write_text('{"state": "fin')
        reporter(folder, said.append).evaluated(self.PART, self.SCORES, self.predictions(1), 1)
        assert len(said) == 1 and "is not what a run writes" in said[0]

    def test_classes_are_shown_while_the_run_is_on(self, run: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(run, tmp_path / "x")
        (folder / "summary.json").unlink()
        (folder / "evaluation.json").unlink()
        write_report([folder], folder / "report.html")
        assert "class precision" not in Page((folder / "report.html").read_text()).text
        reporter(folder, print).evaluated(self.PART, self.SCORES, self.predictions(1), 7)
        text = Page((folder / "report.html").read_text()).text
        assert "of the test set, at step 7" in text and "a 100.0% 100.0% 100.0% 1" in text


class TestChart:
    def points(self, text: str) -> list[list[tuple[float, float]]]:
        found = re.findall(r'points="([^"]*)"', text)
        return [[tuple(map(float, pair.split(","))) for pair in one.split()] for one in found]  # type: ignore[misc]

    def test_a_line_goes_from_corner_to_corner(self) -> None:
        ((first, last),) = self.points(line_chart([Series("a", [(0, 0), (10, 5)], 0)], "x", "y"))
        assert first[0] < last[0] and first[1] > last[1]  # SVG's y grows downwards
        assert first == (56, 250 - 38) and last == (480 - 12, 14)

    def test_what_is_no_number_is_left_out_and_one_point_is_a_dot(self) -> None:
        text = line_chart([Series("a", [(0, float("nan")), (1, 2.0)], 0)], "x", "y")
        assert "<circle" in text and not self.points(text)
        assert "no y yet" in line_chart([Series("a", [(0, 1e308), (1, -1e308)], 0)], "x", "y")
        assert "no y yet" in line_chart([Series("a", [(0, float("inf"))], 0)], "x", "y")

    def test_a_single_burst_does_not_flatten_the_rest(self) -> None:
        values: list[tuple[float, float]] = [(x, 1 + x / 100) for x in range(100)]
        values[50] = (50, 1e6)
        ((*_, last),) = self.points(line_chart([Series("a", values, 0)], "x", "y"))
        assert last[1] < 150  # well above the axis, at 212

    def test_ticks_are_round(self) -> None:
        assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
        assert ticks(0.13, 0.97, 5) == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert ticks(3400, 5400, 5) == pytest.approx([3500, 4000, 4500, 5000])

    def test_many_points_are_thinned_to_the_end(self) -> None:
        values = [(float(x), float(np.sin(x / 500))) for x in range(5000)]
        ((*some, last),) = self.points(line_chart([Series("a", values, 0)], "x", "y"))
        assert len(some) < 700 and last[0] == 480 - 12


def test_a_summary_of_an_earlier_end_is_not_taken_for_this_ones(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "longer")
    (folder / "status.json").write_text('{"state": "stopped", "step": 99, "reason": ""}')
    assert read_record(run).summary and not read_record(folder).summary


def test_of_very_many_lines_some_are_read_and_all_evaluations(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "long")
    train = {
        "split": "train",
        "step": 1,
        "epoch": 1.0,
        "loss": 1.0,
        "accuracy": 0.5,
        "lr": 0.1,
        "samples_per_second": 9.0,
    }
    line, test = json.dumps(train), json.dumps({"split": "test", "step": 1, "epoch": 1.0, "loss": 1.0, "accuracy": 0.5})
    (folder / "metrics.jsonl").write_text("\n".join([line] * 60_000 + [test] * 5) + "\n")
    found = read_record(folder)
    assert len(found.points("test", "loss")) == 5 and 10_000 < len(found.points("train", "loss")) < 40_000


def test_many_classes_are_told_by_their_mistakes() -> None:
    names = [{"name": f"c{index}"} for index in range(40)]
    matrix = [[10 * (i == j) for j in range(40)] for i in range(40)]
    assert "no mistakes" in report._confusion({"classes": names, "confusion": matrix})
    matrix[3][5] = 7
    text = Page(report._confusion({"classes": names, "confusion": matrix})).text
    assert "c3 c5 7" in text and " 0" not in text


def test_lines_of_a_split_that_has_none(run: Path) -> None:
    found: Any = read_record(run)
    assert found.points("validation", "loss") == [] and found.last("validation") == {}
