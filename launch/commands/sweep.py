"""`samecurve sweep`: a grid of settings and a number of seeds in, one run each, then a table of means and deviations.

The runs lie in <run.root>/<run.name>/, with sweep.json, which says what each is. The same command goes on where the
last one was: finished runs are left alone.
"""

import argparse
import hashlib
import itertools
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import forecast
from launch.hardware import Machine, this_machine
from launch.plan import LaunchPlan
from launch.runs.results import Result, table, write_results
from launch.slurm import client, submit
from launch.slurm.retry import STOPPED
from launch.torchrun import choose_layout, config_arguments
from trainer.config.schema import RunConfig, settings_by_name
from trainer.errors import ConfigError, FolderError
from trainer.run.folder import RunFolder

_POLL_SECONDS = 2.0
_JOB = "sweep-job.json"
_OF_SLURM = {"nodes": 1, "gpus_per_node": 0, "ntasks_per_node": 1, "cpus_per_task": None, "time": None,
             "partition": None, "at_once": None, "no_wait": False}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep."""

    name: str
    """of its folder"""
    group: str
    """what all seeds of it have in common: its settings of the grid, as text"""
    settings: tuple[str, ...]
    config: RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--grid", action="append", default=[], metavar="SETTING=A,B", help="values to try; several: every combination"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each, with run.seed, run.seed+1, ..."
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="here: processes of each run, as samecurve train has it")
    parser.add_argument("--slurm", action="store_true", help="as one SLURM array, not here one after another")
    parser.add_argument("--at-once", type=int, metavar="N", help="SLURM: runs at the same time, at most")
    parser.add_argument(
        "--no-wait", action="store_true", help="SLURM: leave when it is queued; call again for the table"
    )
    parser.add_argument("--dry-run", action="store_true", help="show every run, and leave")
    submit.add_resources(parser)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs what is not finished yet; exit code 1 when a run failed."""
    base = forecast.load_settings(arguments.config, overrides)
    points = points_of(base, arguments, overrides)
    machine = this_machine()
    root = base.folder
    waiting = job_of(root) if arguments.slurm else ""
    if not waiting:
        check(points, arguments, machine)
    if arguments.dry_run:
        print(f"samecurve sweep {base.run.name}: {len(points)} runs in {root}")
        print("\n".join(f"  {point.name}: {shlex.join(point.settings)}" for point in points))
        return 0
    keep_plan(root, points, waiting)
    if not arguments.slurm:
        if code := run_here(arguments, overrides, points, machine):
            return code
    else:
        job_id = waiting or queue(arguments, overrides, points, machine)
        if arguments.no_wait or not until_over(job_id):
            return 0 if arguments.no_wait else STOPPED
    results = [Result.of(point.group, point.config) for point in points]
    write_results(root, results)
    table(base.run.name, results)
    return 0 if all(result.accuracy is not None for result in results) else 1


def points_of(base: RunConfig, arguments: argparse.Namespace, overrides: list[str]) -> list[Point]:
    """Every combination with every seed; all settings checked. Raises ConfigError."""
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds {arguments.seeds}: wanted 1 or more")
    choices = [values_of(text) for text in arguments.grid]
    points = []
    for chosen in itertools.product(*choices):
        for seed in range(base.run.seed, base.run.seed + arguments.seeds):
            group = " ".join(chosen) or "(as it is)"
            name = f"{folder_name(group) if chosen else 'run'}-seed-{seed}"
            settings = (*chosen, f"run.seed={seed}", f"run.name={base.run.name}/{name}")
            config = forecast.load_settings(arguments.config, [*overrides, *settings])
            points.append(Point(name, group, settings, config))
    return points


def values_of(text: str) -> list[str]:
    """`optim.lr=0.05,0.1` as [optim.lr=0.05, optim.lr=0.1]; commas inside brackets or quotes belong to a value."""
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise ConfigError(f"--grid {text}: wanted SETTING=A,B with the values to try, such as optim.lr=0.05,0.1")
    if name not in settings_by_name():
        forecast.load_settings([], [f"{name}={values}"])  # raises with the nearest name
    if name in ("run.name", "run.seed", "run.root"):
        raise ConfigError(f"--grid {text}: each run has a {name} of its own already; use --seeds for seeds")
    found, depth, quote, start = [], 0, "", 0
    for at, letter in enumerate(values):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            found.append(values[start:at])
            start = at + 1
    return [f"{name}={value}" for value in [*found, values[start:]]]


def folder_name(group: str) -> str:
    """A group's settings as a file name that people can read; a hash where letters had to go."""
    safe = "".join(letter if letter.isalnum() or letter in ".=-_" else "_" for letter in group)[:100]
    return safe if safe == group.replace(" ", "_") else f"{safe}-{hashlib.sha256(group.encode()).hexdigest()[:8]}"


def check(points: list[Point], arguments: argparse.Namespace, machine: Machine) -> None:
    """Raises UserError before the first run is started."""
    names = [point.name for point in points]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"--grid gives run {twice} twice; name each value once")
    if arguments.slurm:
        submit.check(arguments, [submit.Task(None, point.config) for point in points if not is_finished(point)])
        return
    if alone := [f"--{name.replace('_', '-')}" for name in _OF_SLURM if getattr(arguments, name) != _OF_SLURM[name]]:
        raise ConfigError(f"{', '.join(alone)}: only a SLURM job has that; add --slurm")
    for point in points:
        forecast.check(point.config, choose_layout(point.config, machine, arguments.ranks).world_size)


def keep_plan(root: Path, points: list[Point], waiting: str) -> None:
    """sweep.json: which run is what; tasks that wait or run read it. waiting: their job.

    Raises FolderError when the folder has a run, or a job with another plan, or cannot be written.
    """
    if (root / "config.yaml").exists():
        raise FolderError(f"{root} already holds a run; give the sweep a name of its own, as run.name=NAME-sweep")
    plan = {
        "points": [{"name": point.name, "group": point.group, "settings": list(point.settings)} for point in points]
    }
    if waiting:
        if RunFolder(root).read_json("sweep.json") != plan:
            raise FolderError(f"job {waiting} has other points of {root} in the queue; wait, or take another run.name")
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root).write_json("sweep.json", plan)
    except OSError as error:
        raise FolderError(f"{root} cannot be written ({error.strerror}); set run.root to a folder that can") from None


def is_finished(point: Point) -> bool:
    status: Any = RunFolder(point.config.folder).read_json("status.json")
    return bool(status) and status["state"] == "finished"


def run_here(arguments: argparse.Namespace, overrides: list[str], points: list[Point], machine: Machine) -> int:
    """One after another; a signal ends the sweep with the run that is on, which saves: then STOPPED, else 0."""
    from launch.signals import SignalForwarder  # late: psutil

    relay = SignalForwarder()
    for number, point in enumerate(points, start=1):
        print(
            f"run {number} of {len(points)}: {point.name}" + (" is finished" if is_finished(point) else ""), flush=True
        )
        if is_finished(point):
            continue
        argv = [
            machine.python,
            str(machine.repository / "launch" / "main.py"),
            "train",
            *config_arguments(arguments.config),
        ]
        argv += [f"--ranks={arguments.ranks}"] if arguments.ranks else []
        code = relay.run([*argv, *overrides, *point.settings], os.environ)
        if relay.received or code == STOPPED:
            print(f"the sweep ends with run {point.name}, which was stopped; the same command goes on", file=sys.stderr)
            return STOPPED
    return 0


def queue(arguments: argparse.Namespace, overrides: list[str], points: list[Point], machine: Machine) -> str:
    """One array of the runs that are not finished; its job id, or nothing when all are."""
    open_points = [number for number, point in enumerate(points) if not is_finished(point)]
    root = points[0].config.folder.parent
    if not open_points:
        return ""
    limit = f"%{arguments.at_once}" if arguments.at_once else ""
    array = ",".join(map(str, open_points)) + limit
    argv = submit.sbatch(arguments, machine, root.name, ["--array", array])
    argv += [str(machine.repository / "slurm" / "sweep.sh"), *config_arguments(arguments.config)]
    argv += [f"--points={(root / 'sweep.json').resolve()}", f"--max-restarts={arguments.max_restarts}", *overrides]
    argv += ["--doctor"] if arguments.doctor else []
    plan = LaunchPlan(f"samecurve sweep {root.name}", tuple(argv), submit.variables(machine))
    job_id, log = submit.submit(plan, [submit.Task(number, points[number].config) for number in open_points])
    RunFolder(root).write_json(_JOB, {"job_id": job_id})
    print(f"job {job_id}: {len(open_points)} runs; logs {log}; to stop all: scancel {job_id}", flush=True)
    return job_id


def job_of(root: Path) -> str:
    """The job of this sweep that is in the queue, or nothing."""
    record: Any = RunFolder(root).read_json(_JOB)
    if not record or not in_queue(record["job_id"]):
        return ""
    print(f"job {record['job_id']} of this sweep is in the queue")
    return str(record["job_id"])


def in_queue(job_id: str) -> bool:
    """Whether any task of a job waits or runs."""
    return job_id in client.call("squeue", "--me", "-h", "-o", "%F").split()


def until_over(job_id: str) -> bool:
    """Waits for the array; whether to the end. Ctrl-C leaves it in the queue."""
    try:
        while job_id and in_queue(job_id):
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\njob {job_id} goes on; the same command waits for it again", file=sys.stderr)
        return False
    return True
