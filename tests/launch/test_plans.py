"""Twelve layouts, each plan recorded as text: what would be started, every variable and why, what the run would be.

To record them anew after a change that is meant: RECORD=1 pytest tests/test_plans.py, then read the difference.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPOSITORY

from launch import forecast, main
from launch.commands import train
from launch.forecast import RankLayout
from launch.hardware import Machine
from launch.plan import LaunchPlan
from launch.slurm import batch, submit
from launch.slurm.client import Allocation
from launch.torchrun import choose_layout, config_arguments

RECORDED = REPOSITORY / "tests" / "plans"
LAPTOP = Machine(8, 0, "/venv/bin/python", Path("/project"))
BOX = Machine(96, 8, "/venv/bin/python", Path("/project"))
LOGIN = Machine(4, 0, "/venv/bin/python", Path("/project"))


def arguments(command: str, *words: str) -> tuple[argparse.Namespace, list[str]]:
    parsed, rest = main._parser(command).parse_known_args([command, *words])
    return parsed, rest


def trained(machine: Machine, *words: str) -> LaunchPlan:
    parsed, overrides = arguments("train", *words)
    config = forecast.load_settings(parsed.config, overrides)
    layout = choose_layout(config, machine, parsed.ranks)
    return train.make(config, machine, layout, [*config_arguments(parsed.config), *overrides], parsed.max_restarts)


def submitted(*words: str) -> LaunchPlan:
    parsed, overrides = arguments("submit", *words)
    return submit.make(parsed, overrides, submit.tasks_of(parsed, overrides), LOGIN)


def in_job(given: Allocation, *words: str) -> LaunchPlan:
    parsed, overrides = arguments("batch", *words)
    config = forecast.load_settings(parsed.config, overrides)
    layout = RankLayout(len(given.nodes), given.ranks_per_node, "gpu" if given.gpus_per_node else "cpu")
    settings = [*config_arguments(parsed.config), *overrides]
    addresses = [f"10.0.0.{number + 1}" for number in range(len(given.nodes))]
    return batch.make(config, LOGIN, given, layout, settings, addresses, batch.port_of(given.number))


def given(nodes: int, gpus: int, cpus: int, tasks: int = 1, end_time: int | None = None) -> Allocation:
    names = tuple(f"gpu-a{number}" for number in range(1, nodes + 1))
    return Allocation("4711", 4711, names, gpus, cpus, tasks, end_time)


LAYOUTS: dict[str, Callable[[], LaunchPlan]] = {
    "laptop": lambda: trained(LAPTOP, "--config", "digits"),
    "laptop_4_ranks": lambda: trained(LAPTOP, "--config", "digits", "--ranks", "4", "train.virtual_ranks=8"),
    "laptop_restarts": lambda: trained(LAPTOP, "--config", "digits", "--max-restarts", "2"),
    "one_gpu_of_a_box": lambda: trained(BOX, "--ranks", "1"),
    "box": lambda: trained(BOX, "--config", "cifar10", "optim.lr=0.2", "data.global_batch_size=1000"),
    "box_on_its_cpu": lambda: trained(BOX, "--ranks", "3", "train.device=cpu", "train.threads_per_rank=5"),
    "submit_cpu": lambda: submitted("--config", "digits", "--ntasks-per-node", "4", "--cpus-per-task", "2"),
    "submit_8_gpus": lambda: submitted(
        "--gpus-per-node", "8", "--cpus-per-task", "6", "--time", "2:00:00", "--partition", "gpu", "--doctor"
    ),
    "submit_4_nodes_hostile": lambda: submitted(
        "--nodes", "4", "--gpus-per-node", "8", "--after", "12", "run.name=it's $(here)\nor not", "log.project=a b"
    ),
    "submit_array": lambda: submitted("--gpus-per-node", "1", "--array", "0-4%2", "--config", "tudui"),
    "job_1_node_8_gpus": lambda: in_job(given(1, 8, 64, end_time=1800000000), "--config", "cifar10"),
    "job_4_nodes_cpu": lambda: in_job(given(4, 0, 16, tasks=2), "--config", "digits", "train.virtual_ranks=8"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_is_the_recorded_one(name: str) -> None:
    text = str(LAYOUTS[name]()) + "\n"
    path = RECORDED / f"{name}.txt"
    if os.environ.get("RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_recorded_plan_is_of_a_layout() -> None:
    assert {path.stem for path in RECORDED.glob("*.txt")} == set(LAYOUTS)


def test_a_secret_in_the_environment_is_in_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-show-me")
    assert all("do-not-show-me" not in str(plan()) for plan in LAYOUTS.values())
