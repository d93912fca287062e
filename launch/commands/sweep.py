"""`samecurve sweep`: runs a grid of settings with several seeds and prints mean and deviation of each combination.

The run folders and sweep.json, which lists the settings of each run, are in <run.root>/<run.name>/. Running the command
again continues the sweep and skips finished runs.
"""

import argparse
import itertools
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from launch import forecast, preflight
from launch.commands.arguments import print_note
from launch.commands.sweep_points import SweepPoint, list_points
from launch.hardware import Machine, this_machine
from launch.plan import LaunchPlan
from launch.runs.results import Result, print_table, write_results
from launch.slurm import client, submit
from launch.slurm.retry import STOPPED
from launch.slurm.scripts import scripts_folder, site_environment
from launch.torchrun import choose_layout, config_arguments
from trainer.errors import ConfigError, FolderError
from trainer.run.folder import RunFolder
from trainer.run.reading import content
from trainer.run.record import read_json
from trainer.text.escape import escape

_POLL_SECONDS = 2.0
_PLAN_FILE = "sweep.json"
_JOB_FILE = "sweep-job.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SETTING=A,B",
        help="values of a setting to try; may be repeated, every combination is then run",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="runs of each combination, with run.seed, run.seed+1, ...; default: 1",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes of each run on this machine, as in samecurve train"
    )
    parser.add_argument(
        "--slurm", action="store_true", help="submit one SLURM array instead of running one after another here"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs without starting them")
    _add_slurm_options(parser)


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--at-once", type=int, metavar="N", help="SLURM: maximum number of runs at the same time")
    parser.add_argument(
        "--no-wait",
        action="store_true",
        help="SLURM: exit when the array is queued; run the command again for the table",
    )
    submit.add_resource_options(parser)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the unfinished runs and prints the table. Returns 0, 1 if a run failed, or 75 if the sweep was stopped.

    Raises UserError for problems that show before a run starts.
    """
    base = forecast.load_settings(arguments.config, overrides)
    points = list_points(base, arguments.grid, arguments.seeds, arguments.config, overrides)
    machine = this_machine()
    root = base.folder
    queued_job = _find_queued_job(root) if arguments.slurm else ""
    for point in points:
        if point.damage:
            print_note(f"run {point.name} is skipped: {point.damage}")
    if not queued_job:
        check_points([point for point in points if not point.damage], arguments, machine)
    if arguments.dry_run:
        if arguments.slurm:
            site_environment(os.environ, machine.install_root)  # raises UserError
        print(f"samecurve sweep {base.run.name}: {len(points)} runs in {root}")
        print("\n".join(escape(f"  {point.name}: {shlex.join(point.settings)}") for point in points))
        return 0
    save_plan(root, points, queued_job)
    if not arguments.slurm:
        if code := _run_here(arguments, overrides, points, machine):
            return code
    else:
        job_id = queued_job or _submit_array(arguments, overrides, points, machine)
        if arguments.no_wait or not _wait_for_job(job_id):
            return 0 if arguments.no_wait else STOPPED
    results = [Result.from_run(point.group, point.config) for point in points]
    write_results(root, results)
    print_table(base.run.name, results)
    return 0 if all(result.accuracy is not None for result in results) else 1


def check_points(points: list[SweepPoint], arguments: argparse.Namespace, machine: Machine) -> None:
    """Raises UserError for problems that show before the first run starts."""
    names = [point.name for point in points]
    if duplicate := next((name for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"--grid gives run {duplicate} twice; write each value once")
    if arguments.slurm:
        tasks = [submit.JobTask(None, point.config) for point in points if not point.is_finished]
        submit.check_tasks(arguments, tasks)
        return
    if options := _given_slurm_options(arguments):
        raise ConfigError(f"{', '.join(options)}: only a SLURM job supports this; add --slurm")
    configs = [point.config for point in points if not point.is_finished]
    for layout, group in itertools.groupby(configs, lambda config: choose_layout(config, machine, arguments.ranks)):
        preflight.check_runs(group, layout)


def _given_slurm_options(arguments: argparse.Namespace) -> list[str]:
    """Returns the options that need --slurm and do not have their default value."""
    parser = argparse.ArgumentParser()
    _add_slurm_options(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name in defaults if getattr(arguments, name) != defaults[name]]


def save_plan(root: Path, points: list[SweepPoint], queued_job: str) -> None:
    """Writes sweep.json with the settings of each run, which the tasks of a SLURM array read.

    queued_job: id of this sweep's job in the queue, or empty. Its tasks still read the file, so it must not change.

    Raises FolderError if the folder contains a run, if the queued job has another plan, or if writing fails.
    """
    if (root / "config.yaml").exists():
        raise FolderError(f"{root} already contains a run; set another run.name for the sweep, such as NAME-sweep")
    plan = {
        "points": [{"name": point.name, "group": point.group, "settings": list(point.settings)} for point in points]
    }
    if queued_job:
        if read_json(root / _PLAN_FILE) != plan:
            raise FolderError(
                f"job {queued_job} in the queue runs another grid in {root}; wait for its end, or set another run.name"
            )
        return
    write_file(root, _PLAN_FILE, plan)


def write_file(root: Path, name: str, content: Any) -> None:
    """Writes a JSON file into the sweep's folder. Raises FolderError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root).write_json(name, content)
    except OSError as error:
        raise FolderError(f"{root} cannot be written ({error.strerror}); set run.root to a writable folder") from None


def _run_here(arguments: argparse.Namespace, overrides: list[str], points: list[SweepPoint], machine: Machine) -> int:
    """Runs the unfinished points one after another. Returns 0, or STOPPED if a stop signal ended the sweep.

    A failed run does not end the sweep.
    """
    from launch.signals import SignalForwarder  # lazy import: psutil

    forwarder = SignalForwarder()
    own_ids = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_SWEEP_ID")  # each run of the sweep is a W&B run of its own
    environment = {name: value for name, value in os.environ.items() if name not in own_ids}
    command = [machine.python, machine.launcher, "train", *config_arguments(arguments.config)]
    command += [f"--ranks={arguments.ranks}"] if arguments.ranks else []
    for number, point in enumerate(points, start=1):
        if point.damage:
            continue
        is_finished = point.is_finished
        print(f"run {number} of {len(points)}: {point.name}{' is finished' if is_finished else ''}", flush=True)
        if is_finished:
            continue
        code = forwarder.run([*command, *overrides, *point.settings], environment)
        if forwarder.received or code == STOPPED:
            print(f"the sweep was stopped at run {point.name}; run the same command again to continue", file=sys.stderr)
            return STOPPED
    return 0


def _submit_array(
    arguments: argparse.Namespace, overrides: list[str], points: list[SweepPoint], machine: Machine
) -> str:
    """Submits one array of the unfinished points. Returns its job id, or an empty string if all are finished."""
    unfinished = [number for number, point in enumerate(points) if not point.is_finished and not point.damage]
    if not unfinished:
        return ""
    root = points[0].config.folder.parent
    limit = f"%{arguments.at_once}" if arguments.at_once else ""
    array_tasks = ",".join(map(str, unfinished)) + limit
    argv = submit.sbatch_arguments(arguments, machine, root.name, array_tasks)
    argv += [str(scripts_folder(machine.install_root) / "sweep.sh"), *config_arguments(arguments.config)]
    argv += [f"--points={(root / _PLAN_FILE).resolve()}", f"--max-restarts={arguments.max_restarts}", *overrides]
    argv += ["--doctor"] if arguments.doctor else []
    plan = LaunchPlan(f"samecurve sweep {root.name}", tuple(argv), submit.job_variables(machine))
    job_id = submit.call_sbatch(plan, site_environment(plan.environment, machine.install_root), machine)
    print(f"job {job_id}: {len(unfinished)} runs; to stop all runs: scancel {job_id}", flush=True)
    write_file(root, _JOB_FILE, {"job_id": job_id})
    tasks = [submit.JobTask(number, points[number].config) for number in unfinished]
    print(f"logs {submit.record_job(job_id, tasks, machine)}", flush=True)
    return job_id


def _find_queued_job(root: Path) -> str:
    """Returns the id of this sweep's job if it is in the queue, else an empty string."""
    record = read_json(root / _JOB_FILE, content.JOB)
    if not record or not _is_in_queue(record["job_id"]):
        return ""
    print(f"job {record['job_id']} of this sweep is in the queue")
    return str(record["job_id"])


def _is_in_queue(job_id: str) -> bool:
    """Returns whether any task of a job waits or runs."""
    return job_id in client.call("squeue", "--me", "-h", "-o", "%F").split()


def _wait_for_job(job_id: str) -> bool:
    """Waits until the job has left the queue. Returns False if Ctrl-C ends the wait; the job then continues."""
    try:
        while job_id and _is_in_queue(job_id):
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        print(f"\njob {job_id} continues; run the same command again to wait for it", file=sys.stderr)
        return False
    return True
