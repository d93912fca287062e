"""Runs the doctor in SLURM: as a step on the nodes of the current job, or in a job of its own that it waits for."""

import argparse
import os
import sys
import time
from pathlib import Path

from launch.slurm import client
from launch.slurm.client import Allocation, SlurmError
from launch.slurm.scripts import scripts_folder, site_environment
from trainer.errors import FolderError
from trainer.run.files import write_problem
from trainer.text.escape import escape

_POLL_SECONDS = 1.0
_SPARE_MINUTES = 2


def step_command(allocation: Allocation, command: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the srun command that runs one task per node, while other steps of the job may run.

    A task that dies does not end the other ones.
    """
    nodes = len(allocation.nodes)
    return (
        "srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={allocation.cpus_per_node}", "--kill-on-bad-exit=0", "--wait=0",
        *client.site_srun_arguments(), *command,
    )  # fmt: skip


def submit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Submits doctor.sh, prints its log and returns its exit code. Ctrl-C cancels the job.

    Raises SlurmError, and FolderError when the log's folder cannot be created.
    """
    from launch import forecast

    root = Path(forecast.load_settings(arguments.config, overrides).run.root).expanduser().absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"cannot create run.root {root} for the doctor's log ({error.strerror}); set run.root to another folder"
        ) from None
    if problem := write_problem(root):
        raise FolderError(
            f"cannot write the doctor's log into run.root {root} ({problem}); set run.root to another folder"
        )
    command = sbatch_command(arguments, overrides, root)
    job_id = client.submit(*command, env=site_environment(_job_environment()))
    log = root / f"doctor-{job_id}.log"
    print(f"samecurve: job {job_id} is in the queue; its log: {escape(log)}", file=sys.stderr, flush=True)
    try:
        _wait(job_id)
    except KeyboardInterrupt:
        client.call("scancel", job_id)
        print(f"samecurve: job {job_id} is cancelled", file=sys.stderr)
        return 130
    return _print_log(job_id, log)


def sbatch_command(arguments: argparse.Namespace, overrides: list[str], root: Path) -> list[str]:
    """Returns the sbatch command for doctor.sh. root: folder of the job's log."""
    options = [f"--nodes={arguments.nodes or 1}", f"--ntasks-per-node={arguments.ranks or 1}"]
    options += [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
    options += [f"--partition={arguments.partition}"] if arguments.partition else []
    minutes = int(arguments.timeout_seconds / 60) + _SPARE_MINUTES
    log = f"{str(root).replace('%', '%%')}/doctor-%j.log"
    options += ["--parsable", f"--time={minutes}", f"--output={log}", "--no-requeue"]
    doctor_arguments = [word for name in arguments.config for word in ("--config", name)]
    doctor_arguments += [f"--timeout-seconds={arguments.timeout_seconds:g}"]
    doctor_arguments += ["--short"] if arguments.short else []
    doctor_arguments += ["--json"] if arguments.json else []
    doctor_arguments += [f"--ranks={arguments.ranks}"] if arguments.ranks else []
    script = str(scripts_folder() / "doctor.sh")
    return ["sbatch", *options, script, *doctor_arguments, *overrides]


def _job_environment() -> dict[str, str]:
    """Returns an environment in which the job finds this Python and these scripts, unless the user set other ones."""
    return {"SAMECURVE_PYTHON": sys.executable, "SAMECURVE_SCRIPTS": str(scripts_folder())} | dict(os.environ)


def _wait(job_id: str) -> None:
    """Waits until the job leaves the queue, and prints each state that it waits in."""
    printed = ""
    while True:
        try:
            state = client.call_with_retry("squeue", "--noheader", f"--jobs={job_id}", "--format=%T %R").strip()
        except SlurmError as error:
            if "Invalid job id" in str(error):  # SLURM has forgotten the job, so it has ended
                return
            raise
        if not state:
            return
        if state != printed:
            print(f"samecurve: job {job_id}: {state}", file=sys.stderr, flush=True)
            printed = state
        time.sleep(_POLL_SECONDS)


def _print_log(job_id: str, log: Path) -> int:
    """Prints the job's log and returns the job's exit code. Raises SlurmError when there is no log."""
    details = client.call_with_retry("scontrol", "show", "job", "--oneliner", job_id)
    fields = dict(word.partition("=")[::2] for word in details.split())
    if not log.is_file():
        raise SlurmError(
            f"job {job_id} on {fields.get('NodeList')} ended as {fields.get('JobState')} ({fields.get('ExitCode')}) "
            f"without its log, {log}; make it writable on this node, or set run.root to a folder that all nodes share"
        )
    with log.open(encoding="utf-8", errors="backslashreplace") as file:
        for line in file:
            print(escape(line, keep="\n\t"), end="")
    code, _, signal_number = fields.get("ExitCode", "1:0").partition(":")
    return int(code) or (1 if signal_number != "0" else 0)
