"""`samecurve train`: trains on this machine, on all GPUs or on CPU ranks."""

import argparse
import dataclasses
import sys

from launch import forecast, preflight
from launch.forecast import RankLayout
from launch.hardware import Machine, this_machine
from launch.plan import LaunchPlan
from launch.torchrun import choose_layout, config_arguments, plan_ranks, run_plan
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.text.escape import escape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="number of processes; default: one for each GPU, or one on the CPU"
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="how many times to restart the ranks if one of them fails; default: 0",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan without starting it")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plans the run and starts it, unless --dry-run is set. Returns the exit code of the ranks.

    Raises UserError for problems that show before a rank starts.
    """
    if arguments.max_restarts < 0:
        raise ConfigError(f"--max-restarts {arguments.max_restarts}: expected 0 or more")
    config = forecast.load_settings(arguments.config, overrides)
    machine = this_machine()
    layout = choose_layout(config, machine, arguments.ranks)
    if arguments.dry_run:
        preflight.check_run(config, layout)
    else:  # the ranks check the rest in their first seconds
        forecast.check_run(config, layout)
    trainer_arguments = [*config_arguments(arguments.config), *overrides]
    plan = plan_training(config, machine, layout, trainer_arguments, arguments.max_restarts)
    if arguments.dry_run:
        print(escape(plan, keep="\n"))
        return 0
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return run_plan(plan, config.folder)


def plan_training(
    config: RunConfig, machine: Machine, layout: RankLayout, trainer_arguments: list[str], max_restarts: int
) -> LaunchPlan:
    """Returns the plan of a training run with its forecast. trainer_arguments: those of trainer/main.py."""
    title = f"samecurve train {config.run.name}"
    plan = plan_ranks(title, config, machine, layout, [machine.trainer, *trainer_arguments], max_restarts)
    return dataclasses.replace(plan, facts=forecast.describe_run(config, layout))
