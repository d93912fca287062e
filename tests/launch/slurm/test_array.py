"""Settings of array tasks: seeds and the points of a sweep."""

import json
from pathlib import Path

import pytest

from launch.slurm import array
from trainer.errors import ConfigError


def test_parse_seeds_reads_slurm_array_notation() -> None:
    assert array.parse_seeds("0-4") == [0, 1, 2, 3, 4] and array.parse_seeds("1,3,7%2") == [1, 3, 7]
    assert array.parse_seeds("0-8:4,11") == [0, 4, 8, 11] and array.parse_seeds("5") == [5]


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1;2", "$(id)", "0-4:0", "5-3", "²", "0-99999999"])
def test_parse_seeds_refuses_invalid_notation(text: str) -> None:
    with pytest.raises(ConfigError, match="expected seeds such as 0-4"):
        array.parse_seeds(text)


def test_array_task_sets_seed_and_run_name() -> None:
    settings = ["optim.lr=0.1"]
    assert array.settings_of_task(None, None, ["digits"], settings) == settings
    assert array.settings_of_task(None, 3, ["digits"], settings) == [*settings, "run.seed=3", "run.name=digits-seed-3"]
    assert array.settings_of_task(None, 3, ["digits"], ["run.name=mine"])[1:] == ["run.seed=3", "run.name=mine-seed-3"]


def test_array_task_with_run_seed_is_refused() -> None:
    with pytest.raises(ConfigError, match="task numbers of --array are the seeds"):
        array.settings_of_task(None, 3, ["digits"], ["run.seed=1"])


def test_array_task_of_sweep_reads_its_point(tmp_path: Path) -> None:
    plan = tmp_path / "sweep.json"
    plan.write_text(json.dumps({"points": [{"settings": ["optim.lr=1"]}, {"settings": ["optim.lr=2"]}]}))
    assert array.settings_of_task(str(plan), 1, [], ["train.epochs=1"]) == ["train.epochs=1", "optim.lr=2"]
    for task in (2, None):
        with pytest.raises(ConfigError, match=f"array task {task} is not among the 2 points"):
            array.settings_of_task(str(plan), task, [], [])
