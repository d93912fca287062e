"""Compares launch plans for twelve layouts with recorded texts: command, environment variables, forecast of the run.

After an intended change, record the plans again with RECORD=1 pytest tests/launch/test_plans.py and read the diff.
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

PLANS_FOLDER = REPOSITORY / "tests" / "plans"
LAPTOP = Machine(8, 0, "/venv/bin/python", Path("/project"))
SERVER = Machine(96, 8, "/venv/bin/python", Path("/project"))
LOGIN_NODE = Machine(4, 0, "/venv/bin/python", Path("/project"))


def parse(command: str, *words: str) -> tuple[argparse.Namespace, list[str]]:
    return main.build_parser(command).parse_known_args([command, *words])


def train_plan(machine: Machine, *words: str) -> LaunchPlan:
    arguments, overrides = parse("train", *words)
    config = forecast.load_settings(arguments.config, overrides)
    layout = choose_layout(config, machine, arguments.ranks)
    trainer_arguments = [*config_arguments(arguments.config), *overrides]
    return train.plan_training(config, machine, layout, trainer_arguments, arguments.max_restarts)


def submit_plan(*words: str) -> LaunchPlan:
    arguments, overrides = parse("submit", *words)
    return submit.plan_submission(arguments, overrides, submit.list_tasks(arguments, overrides), LOGIN_NODE)


def job_plan(allocation: Allocation, *words: str) -> LaunchPlan:
    arguments, overrides = parse("batch", *words)
    config = forecast.load_settings(arguments.config, overrides)
    device = "gpu" if allocation.gpus_per_node else "cpu"
    layout = RankLayout(len(allocation.nodes), allocation.ranks_per_node, device)
    trainer_arguments = (*config_arguments(arguments.config), *overrides)
    job = batch.TrainingJob(config, LOGIN_NODE, allocation, layout, trainer_arguments)
    addresses = [f"10.0.0.{number + 1}" for number in range(len(allocation.nodes))]
    return batch.plan_srun(job, addresses, batch.candidate_port(allocation.job_number), 1700000000.0)


def make_allocation(nodes: int, gpus: int, cpus: int, tasks: int = 1, end_time: int | None = None) -> Allocation:
    """gpus, cpus, tasks: per node."""
    names = tuple(f"gpu-a{number}" for number in range(1, nodes + 1))
    return Allocation("4711", 4711, names, gpus, cpus, tasks, end_time)


LAYOUTS: dict[str, Callable[[], LaunchPlan]] = {
    "laptop": lambda: train_plan(LAPTOP, "--config", "digits"),
    "laptop_4_ranks": lambda: train_plan(LAPTOP, "--config", "digits", "--ranks", "4", "train.virtual_ranks=8"),
    "laptop_restarts": lambda: train_plan(LAPTOP, "--config", "digits", "--max-restarts", "2"),
    "server_1_gpu": lambda: train_plan(SERVER, "--ranks", "1"),
    "server_8_gpus": lambda: train_plan(SERVER, "--config", "cifar10", "optim.lr=0.2", "data.global_batch_size=1000"),
    "server_3_cpu_ranks": lambda: train_plan(SERVER, "--ranks", "3", "train.device=cpu", "train.threads_per_rank=5"),
    "submit_cpu": lambda: submit_plan("--config", "digits", "--ntasks-per-node", "4", "--cpus-per-task", "2"),
    "submit_8_gpus": lambda: submit_plan(
        "--gpus-per-node", "8", "--cpus-per-task", "6", "--time", "2:00:00", "--partition", "gpu", "--doctor"
    ),
    "submit_4_nodes_hostile": lambda: submit_plan(
        "--nodes", "4", "--gpus-per-node", "8", "--after", "12", "run.name=it's $(here) or not", "log.project=a b"
    ),
    "submit_array": lambda: submit_plan("--gpus-per-node", "1", "--array", "0-4%2", "--config", "tudui"),
    "job_1_node_8_gpus": lambda: job_plan(make_allocation(1, 8, 64, end_time=1800000000), "--config", "cifar10"),
    "job_4_nodes_cpu": lambda: job_plan(
        make_allocation(4, 0, 16, tasks=2), "--config", "digits", "train.virtual_ranks=8"
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_matches_the_recorded_text(name: str) -> None:
    text = str(LAYOUTS[name]()) + "\n"
    path = PLANS_FOLDER / f"{name}.txt"
    if os.environ.get("RECORD"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_every_recorded_plan_has_a_layout() -> None:
    assert {path.stem for path in PLANS_FOLDER.glob("*.txt")} == set(LAYOUTS)


def test_environment_adds_the_variables_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    environment = LAYOUTS["laptop_4_ranks"]().environment
    assert (environment["OMP_NUM_THREADS"], environment["WANDB_API_KEY"]) == ("2", "key")


def test_secrets_in_the_environment_are_not_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-show-me")
    assert all("do-not-show-me" not in str(plan()) for plan in LAYOUTS.values())
