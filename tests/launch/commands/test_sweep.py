"""A grid with seeds: every run once, means and deviations, and what failed is told."""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPOSITORY, SMALL, Done

from launch import forecast, main
from launch.commands import sweep
from launch.hardware import Machine
from launch.runs.results import Result, summary_of
from trainer.errors import ConfigError, FolderError

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]


def points(*words: str) -> list[sweep.Point]:
    parsed, overrides = main._parser("sweep").parse_known_args(["sweep", "--config", "digits", *words])
    return sweep.points_of(forecast.load_settings(parsed.config, overrides), parsed, overrides)


def test_every_combination_with_every_seed() -> None:
    found = points("--grid", "optim.lr=0.05,0.1", "--grid", "model.name=lenet,tudui", "--seeds", "2", "run.seed=5")
    assert len(found) == 8 and len({point.name for point in found}) == 8
    assert found[1].name == "optim.lr=0.05_model.name=lenet-seed-6" and found[1].config.run.seed == 6
    assert found[1].config.folder == Path("runs/digits/optim.lr=0.05_model.name=lenet-seed-6")
    assert {(point.config.optim.lr, point.config.model.name) for point in found} == {
        (0.05, "lenet"), (0.05, "tudui"), (0.1, "lenet"), (0.1, "tudui"),
    }  # fmt: skip


def test_a_comma_inside_of_brackets_is_no_end() -> None:
    assert sweep.values_of("data.augment=[flip,crop],[flip],[]") == [
        "data.augment=[flip,crop]", "data.augment=[flip]", "data.augment=[]",
    ]  # fmt: skip
    assert sweep.values_of("log.project='a,b',c") == ["log.project='a,b'", "log.project=c"]


def test_names_of_folders_are_safe_and_differ() -> None:
    hostile = ["log.project=../../x", "log.project=.. ..x", "log.project=$(id)\n", "log.project=" + "long" * 100]
    names = [sweep.folder_name(text) for text in hostile]
    assert len(set(names)) == 4 and all("/" not in name and "\n" not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--grid", "optim.lr"], "wanted SETTING=A,B"),
        (["--grid", "optim.lrr=1,2"], "no setting 'optim.lrr'"),
        (["--grid", "optim.lr=1,fast"], "optim.lr=fast"),
        (["--grid", "run.seed=1,2"], "use --seeds for seeds"),
        (["--seeds", "0"], "--seeds 0: wanted 1 or more"),
    ],
)
def test_a_mistake_is_told_before_the_first_run(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        points(*words)


def test_a_folder_of_a_run_is_no_place_for_a_sweep() -> None:
    folder = Path("runs/digits")
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    with pytest.raises(FolderError, match="already holds a run"):
        sweep.keep_plan(folder, points("--seeds", "2"), "")


def test_a_plan_that_a_job_reads_is_not_changed() -> None:
    folder = Path("runs/digits")
    sweep.keep_plan(folder, points("--seeds", "2"), "")
    sweep.keep_plan(folder, points("--seeds", "2"), "17")
    with pytest.raises(FolderError, match="job 17 has other points"):
        sweep.keep_plan(folder, points("--seeds", "3"), "17")
    assert len(json.loads((folder / "sweep.json").read_text())["points"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--nodes", "2", "--time", "1:00"], "--nodes, --time: only a SLURM job has that"),
        (["--grid", "optim.lr=0.1,0.1"], "twice"),
        (["--slurm", "train.device=cuda"], "the job asks for no GPU"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], told: str) -> None:
    parsed, _ = main._parser("sweep").parse_known_args(["sweep", "--config", "digits", *words])
    with pytest.raises(ConfigError, match=told):
        sweep.check(points(*words), parsed, Machine(8, 0))


def test_the_numbers_of_a_group() -> None:
    results = [Result("a", f"{number}", value, "finished", "") for number, value in enumerate((0.9, 0.94, 0.92))]
    results.append(Result("a", "3", None, "failed", "NaN"))
    numbers = summary_of(results)
    assert (numbers["runs"], numbers["finished"]) == (4, 3)
    assert numbers["mean_accuracy"] == pytest.approx(0.92) and numbers["standard_deviation"] == pytest.approx(0.02)
    assert summary_of(results[3:])["mean_accuracy"] is None and summary_of(results[:1])["standard_deviation"] is None


@pytest.mark.slow
def test_a_sweep_here_goes_on_where_it_was(launch: Callable[..., Done]) -> None:
    words = [*SAMECURVE, "sweep", *SMALL, "--grid", "optim.lr=0.05", "train.max_steps=30", "--seeds"]
    assert launch([*words, "1"]).code == 0
    again = launch([*words, "2"])
    assert again.code == 0 and again.out.count(" is finished\n") == 1, again.err
    (group,) = json.loads(Path("runs/digits/results.json").read_text())["groups"]
    assert (group["settings"], group["finished"], group["runs"]) == ("optim.lr=0.05", 2, 2)
    accuracies = list(group["accuracy"].values())
    assert group["mean_accuracy"] == statistics.mean(accuracies) > 0.1 and len(set(accuracies)) == 2
    assert f"{statistics.stdev(accuracies):.2%}" in again.out
