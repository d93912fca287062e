"""`samecurve dashboard [RUN...]`: runs in, a W&B workspace and a report of their metrics on W&B's server out."""

import argparse
import os
import sys
from pathlib import Path

from launch.commands.arguments import add_root
from launch.runs import records
from launch.runs.run import NoRunError, find_run
from trainer.errors import DashboardError

_NAME = "dashboards.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "names of runs or of folders of runs under --root, or paths: a dashboard of them alone; default: all runs"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    add_root(parser)
    parser.add_argument("--project", metavar="NAME", help="where the runs are in W&B; default: their log.project")
    parser.add_argument("--entity", metavar="NAME", help="the W&B user or team; default: the key's own")
    parser.add_argument("--only", choices=["workspace", "report"], help="default: both")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """One dashboard for each project that the runs are in."""
    root = arguments.root
    paths = [path for name in arguments.runs for path in _locate(name, root)] or records.find(root)
    from launch.dashboard.workspace import KINDS, Dashboard
    from trainer.run.wandb_record import (
        read_wandb_record,
        sync_command,  # late: wandb
    )

    found = {path: read_wandb_record(path) for path in paths}
    unlogged = [str(path) for path, run in found.items() if run is None]
    if len(unlogged) == len(found) or (unlogged and arguments.runs):
        what = f"{unlogged[0]} was not" if arguments.runs else f"no run under {root} was"
        raise DashboardError(f"{what} logged to W&B: train with log.wandb=auto, or name runs that were")
    logged_runs = sorted((run for run in found.values() if run is not None), key=lambda run: run.name)
    if waiting := [path for run in logged_runs for path in run.to_sync]:
        print(f"note: not on the server yet: {sync_command(tuple(waiting))}", file=sys.stderr)
    kept_in = root if root.is_dir() else Path(os.path.commonpath([path.resolve().parent for path in paths]))
    made = Dashboard(arguments.entity, kept_in / _NAME)
    title = ": ".join(["samecurve", *([", ".join(sorted(arguments.runs))] if arguments.runs else [])])
    kinds = (arguments.only,) if arguments.only else KINDS
    for project in sorted({arguments.project or run.project for run in logged_runs}):
        of_it = [run for run in logged_runs if (arguments.project or run.project) == project]
        for kind, address in made.write(project, title, of_it, only=bool(arguments.runs), kinds=kinds):
            print(f"{kind}: {address}", flush=True)
    return 0


def _locate(name: str, root: Path) -> list[Path]:
    """One run, or those of a sweep."""
    try:
        return [find_run(name, root)]
    except NoRunError:
        group = records.find(root / name)
        if not group:
            raise
        return group
