"""Tests samecurve sweep: the points of a grid, errors before the first run, results, and continuing a sweep."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPOSITORY, SMALL, CommandResult

from launch import forecast, main
from launch.commands import sweep
from launch.commands.sweep_points import SweepPoint, folder_name, list_points, parse_grid
from launch.hardware import Machine
from launch.runs.results import Result, print_table, summarize, write_results
from trainer.errors import ConfigError, FolderError

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]


def parse(*words: str) -> tuple[argparse.Namespace, list[str]]:
    return main.build_parser("sweep").parse_known_args(["sweep", "--config", "digits", *words])


def points_for(*words: str) -> list[SweepPoint]:
    arguments, overrides = parse(*words)
    base = forecast.load_settings(arguments.config, overrides)
    return list_points(base, arguments.grid, arguments.seeds, arguments.config, overrides)


def test_grid_and_seeds_give_every_combination() -> None:
    points = points_for("--grid", "optim.lr=0.05,0.1", "--grid", "model.name=lenet,tudui", "--seeds", "2", "run.seed=5")
    assert len(points) == 8 and len({point.name for point in points}) == 8
    assert points[1].name == "optim.lr=0.05_model.name=lenet-seed-6" and points[1].config.run.seed == 6
    assert points[1].config.folder == Path("runs/digits/optim.lr=0.05_model.name=lenet-seed-6")
    assert {(point.config.optim.lr, point.config.model.name) for point in points} == {
        (0.05, "lenet"), (0.05, "tudui"), (0.1, "lenet"), (0.1, "tudui"),
    }  # fmt: skip


def test_comma_inside_brackets_or_quotes_does_not_split_a_value() -> None:
    assert parse_grid("data.augment=[flip,crop],[flip],[]") == [
        "data.augment=[flip,crop]", "data.augment=[flip]", "data.augment=[]",
    ]  # fmt: skip
    assert parse_grid("log.project='a,b',c") == ["log.project='a,b'", "log.project=c"]


def test_folder_names_are_safe_and_distinct() -> None:
    hostile = ["log.project=../../x", "log.project=.. ..x", "log.project=$(id)\n", "log.project=" + "long" * 100]
    names = [folder_name(text) for text in hostile]
    assert len(set(names)) == 4 and all("/" not in name and "\n" not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "optim.lr"], "expected SETTING=A,B"),
        (["--grid", "optim.lrr=1,2"], "no setting 'optim.lrr'"),
        (["--grid", "optim.lr=1,fast"], "optim.lr=fast"),
        (["--grid", "run.seed=1,2"], "use --seeds for seeds"),
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
    ],
)
def test_invalid_grid_or_seeds_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        points_for(*words)


def test_sweep_in_the_folder_of_a_run_is_refused() -> None:
    folder = Path("runs/digits")
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    with pytest.raises(FolderError, match="already contains a run"):
        sweep.save_plan(folder, points_for("--seeds", "2"), "")


def test_plan_of_a_queued_job_is_not_overwritten() -> None:
    folder = Path("runs/digits")
    sweep.save_plan(folder, points_for("--seeds", "2"), "")
    sweep.save_plan(folder, points_for("--seeds", "2"), "17")
    with pytest.raises(FolderError, match="job 17 in the queue runs another grid"):
        sweep.save_plan(folder, points_for("--seeds", "3"), "17")
    assert len(json.loads((folder / "sweep.json").read_text())["points"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", "--time", "1:00"], "--nodes, --time: only a SLURM job supports this"),
        (["--account", "lab", "--doctor"], "--account, --doctor: only a SLURM job supports this"),
        (["--grid", "optim.lr=0.1,0.1"], "twice"),
        (["--slurm", "train.device=cuda"], "the job requests no GPU"),
    ],
)
def test_contradicting_options_are_refused(words: list[str], message: str) -> None:
    arguments, _ = parse(*words)
    with pytest.raises(ConfigError, match=message):
        sweep.check_points(points_for(*words), arguments, Machine(8, 0))


def test_mean_and_deviation_use_finished_runs_only() -> None:
    results = [Result("a", f"{number}", value, "finished", "") for number, value in enumerate((0.9, 0.94, 0.92))]
    results.append(Result("a", "3", None, "failed", "NaN"))
    numbers = summarize(results)
    assert (numbers["runs"], numbers["finished"]) == (4, 3)
    assert numbers["mean_accuracy"] == pytest.approx(0.92) and numbers["standard_deviation"] == pytest.approx(0.02)
    assert summarize(results[3:])["mean_accuracy"] is None and summarize(results[:1])["standard_deviation"] is None


@pytest.mark.slow
def test_repeated_sweep_skips_finished_runs(launch: Callable[..., CommandResult]) -> None:
    words = [*SAMECURVE, "sweep", *SMALL, "--grid", "optim.lr=0.05", "train.max_steps=30", "--seeds"]
    assert launch([*words, "1"]).code == 0
    second = launch([*words, "2"])
    assert second.code == 0 and second.out.count(" is finished\n") == 1, second.err
    (group,) = json.loads(Path("runs/digits/results.json").read_text())["groups"]
    assert (group["settings"], group["finished"], group["runs"]) == ("optim.lr=0.05", 2, 2)
    accuracies = list(group["accuracy"].values())
    assert group["mean_accuracy"] == statistics.mean(accuracies) > 0.1 and len(set(accuracies)) == 2
    assert f"{statistics.stdev(accuracies):.2%}" in second.out


def test_groups_are_ranked_by_validation_accuracy_if_all_runs_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result("low", "0", 0.9, "finished", "", 0.5),
        Result("high", "1", 0.8, "finished", "", 0.7),
        Result("none", "2", None, "failed", "NaN"),
    ]
    write_results(Path(), results)
    content = json.loads(Path("results.json").read_text())
    assert content["ranked_by"] == "validation accuracy"
    assert [group["settings"] for group in content["groups"]] == ["high", "low", "none"]
    assert content["groups"][0]["mean_validation_accuracy"] == 0.7 and content["groups"][0]["mean_accuracy"] == 0.8
    assert content["groups"][0]["validation_accuracy"] == {"1": 0.7}
    print_table("x", results)
    out = capsys.readouterr().out
    assert "sweep x, by validation accuracy" in out and out.index("high") < out.index("low")
    results.append(Result("test only", "3", 0.85, "finished", ""))
    write_results(Path(), results)
    content = json.loads(Path("results.json").read_text())
    assert content["ranked_by"] == "test accuracy"
    assert [group["settings"] for group in content["groups"]] == ["low", "test only", "high", "none"]


def test_damaged_run_of_a_sweep_is_skipped_and_the_others_count(launch: Callable[..., CommandResult]) -> None:
    words = [*SAMECURVE, "sweep", *SMALL, "--grid", "optim.lr=0.05,0.02", "train.max_steps=2"]
    for name, status in (("optim.lr=0.05-seed-0", '{"state": "failed", "step": "x"}'), ("optim.lr=0.02-seed-0", "")):
        folder = Path("runs/digits") / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("run: {name: x}")
        (folder / "status.json").write_text(status)
    done = launch(words)
    assert done.code == 1 and "Traceback" not in done.err
    assert (
        "run optim.lr=0.05-seed-0 is skipped: runs/digits/optim.lr=0.05-seed-0/status.json cannot be read" in done.err
    )
    assert "optim.lr=0.05-seed-0: unreadable: " in done.out and "run 1 of 2" not in done.out
