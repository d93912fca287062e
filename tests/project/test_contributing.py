"""CONTRIBUTING.md is true: each kind of part, added as it says, trains in a copy of the project."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPOSITORY, SMALL, CommandResult

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()

NETWORK = '''"""A network of one layer."""

from torch import nn

from trainer.config.schema import ModelSettings


def mynet(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))
'''
LOSS = """

def squared_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return cross_entropy(logits, labels, label_smoothing).square()
"""
OPTIMIZER = """

def rmsprop(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, optim.lr)
"""
SCHEDULE = """

def quadratic(progress: float) -> float:
    return (1 - progress) ** 2
"""
DATA_SET = '''"""Random images of three classes."""

import numpy as np

from trainer.config.schema import DataSettings
from trainer.data.dataset import ArrayDataset, ArraySplit


def load(data: DataSettings) -> ArrayDataset:
    rng = np.random.default_rng(0)
    shape = (30, data.side_pixels, data.side_pixels, 1)
    train, test = (
        ArraySplit(rng.integers(0, 256, shape, dtype=np.uint8), np.arange(30, dtype=np.int64) % 3) for _ in range(2)
    )
    return ArrayDataset(train, test, ("a", "b", "c"))


def count_per_class(data: DataSettings) -> list[int]:
    return [10, 10, 10]
'''
TRACKER = '''"""Counts the rows."""

from pathlib import Path

from trainer.tracking.tracker import Tracker


class RowCounter(Tracker):
    def __init__(self, path: Path) -> None:
        self._path, self._rows = path, 0

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        self._rows += 1
        self._path.write_text(str(self._rows))
'''


def insert(path: Path, before: str, text: str) -> None:
    content = path.read_text()
    assert content.count(before) == 1, f"{path.name}: {before}"
    path.write_text(content.replace(before, text + before))


def add_plugin(project: Path, table: str, line: str) -> None:
    path = project / "trainer" / "config" / "plugins.py"
    assert path.read_text().count(f"{table} = {{\n") == 1
    path.write_text(path.read_text().replace(f"{table} = {{\n", f"{table} = {{\n    {line},\n"))


def add_parts(project: Path) -> None:
    """Every addition of CONTRIBUTING.md, in the files that it names."""
    trainer = project / "trainer"
    (trainer / "models" / "mynet.py").write_text(NETWORK)
    (line,) = re.findall(r'`("mynet": "[\w.:]+")`', TEXT)
    add_plugin(project, "MODELS", line)

    with (trainer / "optim" / "losses.py").open("a") as file:
        file.write(LOSS)
    add_plugin(project, "LOSSES", '"squared": "trainer.optim.losses:squared_cross_entropy"')

    with (trainer / "optim" / "optimizers.py").open("a") as file:
        file.write(OPTIMIZER)
    add_plugin(project, "OPTIMIZERS", '"rmsprop": "trainer.optim.optimizers:rmsprop"')

    with (trainer / "optim" / "schedule.py").open("a") as file:
        file.write(SCHEDULE)
    add_plugin(project, "SCHEDULES", '"quadratic": "trainer.optim.schedule:quadratic"')

    insert(trainer / "tracking" / "meter.py", '            "samples_per_second": self', '            "answer": 42.0,\n')

    (trainer / "data" / "noise.py").write_text(DATA_SET)
    add_plugin(project, "DATASETS", '"noise": "trainer.data.noise"')

    schema = trainer / "config" / "schema.py"
    insert(schema, '"flip", "alternating_flip"', '"invert", ')
    insert(
        trainer / "data" / "augment.py",
        '        if "cutout" in self._names:\n',
        '        if "invert" in self._names:\n'
        '            inverts = self._draw("invert", ids, epoch, 2).view(-1, 1, 1, 1) == 1\n'
        "            images = torch.where(inverts, 255 - images, images)\n",
    )

    (trainer / "tracking" / "row_counter.py").write_text(TRACKER)
    insert(
        trainer / "config" / "output_settings.py",
        "    tensorboard: bool",
        '    row_counter: bool = setting(False, "count the rows")\n',
    )
    trackers = trainer / "tracking" / "trackers.py"
    build = "    if config.log.row_counter:\n        add('rows', lambda: RowCounter(folder.path / 'rows'))\n"
    insert(trackers, "    return trackers\n", build)
    insert(trackers, "from trainer.tracking.tensorboard", "from trainer.tracking.row_counter import RowCounter\n")


@pytest.mark.slow
def test_parts_added_as_contributing_says_train(
    launch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    for folder in ("trainer", "launch", "configs"):
        shutil.copytree(REPOSITORY / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    add_parts(project)
    monkeypatch.setenv("PYTHONPATH", str(project))
    settings = ["model.name=mynet", "loss.name=squared", "optim.name=rmsprop", "optim.lr=0.001", "data.name=noise"]
    settings += ["data.augment=[invert]", "data.global_batch_size=10", "train.epochs=2", "log.row_counter=true"]
    settings += ["schedule.name=quadratic"]
    settings += ["log.every_steps=2", "run.name=added"]
    result = launch([sys.executable, str(project / "launch" / "main.py"), "train", *SMALL, *settings])
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "runs" / "added" / "summary.json").read_text())
    assert summary["steps"] == 6 and [row["name"] for row in summary["test"]["classes"]] == ["a", "b", "c"]
    rows = [json.loads(line) for line in (tmp_path / "runs" / "added" / "metrics.jsonl").read_text().splitlines()]
    last_row = [row for row in rows if row["split"] == "train"][-1]  # step 6: two thirds of the steps after the warmup
    assert last_row["answer"] == 42.0 and last_row["lr"] == pytest.approx(0.001 / 9)
    assert (tmp_path / "runs" / "added" / "rows").read_text() == "5"  # rows at steps 2, 4 and 6, evaluations at 3 and 6
    wrong = launch([sys.executable, str(project / "trainer" / "main.py"), "--print-config", "model.name=mynets"])
    assert wrong.code == 2 and "did you mean 'mynet'?" in wrong.err
    shown = launch([sys.executable, str(project / "trainer" / "main.py"), "--help"])
    assert "mynet" in shown.out and "rmsprop" in shown.out and "invert" in shown.out


def test_files_that_contributing_names_exist() -> None:
    for name in re.findall(r"`((?:trainer|launch|tests|docs)/[\w/.]+)`", TEXT):
        assert (REPOSITORY / name).exists() or name == "trainer/models/mynet.py", name
