"""`samecurve dashboard [RUN...]`: creates a W&B workspace and a W&B report of runs."""

import argparse
import os
import sys
from pathlib import Path

from launch.commands.arguments import add_root_option, print_note
from launch.runs.find import find_runs, find_runs_of
from trainer.errors import DashboardError, FolderError
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
    paths = find_runs_of(arguments.runs, root, print_note) if arguments.runs else find_runs(root, print_note)
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


def _logged_runs(paths: list[Path], root: Path, are_named: bool) -> list[RunRecord]:
    """Returns the runs that were logged to W&B, sorted by name.

    Names the runs that cannot be read, and leaves them out.
    Raises DashboardError if there is none, or if the user named the runs and one of them was not logged.
    """
    runs = [run for path in paths if (run := _read(path)) is not None]
    if paths and not runs:
        raise DashboardError("none of these runs can be read; repair the files that are named above")
    unlogged = [run.path for run in runs if not run.wandb_id]
    if len(unlogged) == len(runs) or (unlogged and are_named):
        problem = f"{unlogged[0]} was not" if are_named else f"no run under {root} was"
        raise DashboardError(f"{problem} logged to W&B: train with log.wandb=auto, or name runs that were logged")
    return sorted((run for run in runs if run.wandb_id), key=lambda run: run.name)


def _read(path: Path) -> RunRecord | None:
    """Returns a run if all files that a dashboard needs can be read; else names the file and returns None."""
    run = RunRecord(path)
    try:
        # A folder without config.yaml belongs to a job that has not started.
        _ = run.wandb_id and (run.name, run.wandb_project, run.metric_names)
    except FolderError as error:
        print_note(f"{path} is left out: {error}")
        return None
    for problem in run.problems:
        print_note(problem)
    return run
