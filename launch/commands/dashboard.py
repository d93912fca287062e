"""`samecurve dashboard [RUN...]`: creates a W&B workspace and a W&B report of runs."""

import argparse
import os
import sys
from pathlib import Path

from launch.commands.arguments import add_root_option
from launch.runs.find import NoRunError, find_run, find_runs
from trainer.errors import DashboardError
from trainer.run.record import RunRecord

_URLS_FILE = "dashboards.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `samecurve dashboard`."""
    text = "names of runs or of folders of runs under --root, or paths: show only these runs; default: all runs"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=text)
    add_root_option(parser)
    parser.add_argument("--project", metavar="NAME", help="W&B project of the runs; default: their log.project")
    parser.add_argument("--entity", metavar="NAME", help="W&B user or team; default: the default of the API key")
    parser.add_argument("--only", choices=["workspace", "report"], help="create only one of them; default: both")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Creates or replaces a dashboard for each W&B project of the runs, and prints the URLs. Raises DashboardError."""
    root = arguments.root
    paths = [path for name in arguments.runs for path in _find(name, root)] or find_runs(root)
    from launch.dashboard.workspace import KINDS, Dashboard, sync_command  # lazy import: numpy and Pillow

    runs = _logged_runs(paths, root, are_named=bool(arguments.runs))
    if sessions := [folder for run in runs for folder in run.offline_wandb_sessions]:
        print(f"note: not on the server yet: {sync_command(tuple(sessions))}", file=sys.stderr)
    folder = root if root.is_dir() else Path(os.path.commonpath([path.resolve().parent for path in paths]))
    dashboard = Dashboard(arguments.entity, folder / _URLS_FILE)
    title = "samecurve" + (": " + ", ".join(sorted(arguments.runs)) if arguments.runs else "")
    kinds = (arguments.only,) if arguments.only else KINDS
    for project in sorted({arguments.project or run.wandb_project for run in runs}):
        project_runs = [run for run in runs if (arguments.project or run.wandb_project) == project]
        for kind, url in dashboard.write(project, title, project_runs, only=bool(arguments.runs), kinds=kinds):
            print(f"{kind}: {url}", flush=True)
    return 0


def _find(name: str, root: Path) -> list[Path]:
    """Returns the folder of a run, or the folders of all runs in a group such as a sweep. Raises NoRunError."""
    try:
        return [find_run(name, root)]
    except NoRunError:
        paths = find_runs(root / name)
        if not paths:
            raise
        return paths


def _logged_runs(paths: list[Path], root: Path, are_named: bool) -> list[RunRecord]:
    """Returns the runs that were logged to W&B, sorted by name.

    Raises DashboardError if there is none, or if the user named the runs and one of them was not logged.
    """
    runs = [RunRecord(path) for path in paths]
    unlogged = [run.path for run in runs if not run.wandb_id]
    if len(unlogged) == len(runs) or (unlogged and are_named):
        problem = f"{unlogged[0]} was not" if are_named else f"no run under {root} was"
        raise DashboardError(f"{problem} logged to W&B: train with log.wandb=auto, or name runs that were logged")
    return sorted((run for run in runs if run.wandb_id), key=lambda run: run.name)
