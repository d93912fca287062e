"""`samecurve train`: this machine, all its GPUs, or CPU ranks; settings and a machine in, a plan out, then a run."""

import argparse
import dataclasses
import sys

from launch import forecast
from launch.forecast import RankLayout
from launch.hardware import Machine, this_machine
from launch.plan import LaunchPlan
from launch.torchrun import choose_layout, config_arguments, plan_ranks, run_plan
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="processes; default: one a GPU, or one on the CPU")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="start the ranks again when one dies; default: 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be started, and leave")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plans, and runs unless it is a dry run; the exit code of trainer/main.py."""
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts {arguments.max_restarts}: wanted 0 or more")
    config = forecast.load_settings(arguments.config, overrides)
    machine = this_machine()
    layout = choose_layout(config, machine, arguments.ranks)
    forecast.check(config, layout.world_size)
    plan = make(config, machine, layout, [*config_arguments(arguments.config), *overrides], arguments.max_restarts)
    if arguments.dry_run:
        print(plan)
        return 0
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return run_plan(plan, config.folder)


def make(config: RunConfig, machine: Machine, layout: RankLayout, trained: list[str], max_restarts: int) -> LaunchPlan:
    """trained: the arguments of trainer/main.py."""
    bare = plan_ranks(
        f"samecurve train {config.run.name}", config, machine, layout, [machine.trainer, *trained], max_restarts
    )
    return dataclasses.replace(bare, facts=forecast.facts(config, layout))
