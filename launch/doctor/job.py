"""The doctor in a SLURM job: srun's command that serves each node; and from outside, a job of its own, waited for."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from launch.hardware import INSTALL_ROOT
from launch.slurm import client
from launch.slurm.client import Allocation, SlurmError

_POLL_SECONDS = 1.0
_SPARE_MINUTES = 2


def srun(given: Allocation, command: tuple[str, ...]) -> tuple[str, ...]:
    """One task a node, beside whatever else runs in the job; one that dies leaves the others alone."""
    nodes = len(given.nodes)
    return (
        "srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
        f"--cpus-per-task={given.cpus_per_node}", "--kill-on-bad-exit=0", "--wait=0",
        *client.site_srun_arguments(), *command,
    )  # fmt: skip


def environment() -> dict[str, str]:
    """What the job's own tasks were to be is not what the step's are."""
    return client.for_srun(os.environ)


def submit(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs slurm/doctor.sh as a job, shows its log, returns its exit code. Ctrl-C cancels it."""
    from launch import forecast

    root = Path(forecast.load_settings(arguments.config, overrides).run.root).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    job = client.call(*command(arguments, overrides, root), env=_environment()).strip().partition(";")[0]
    log = root / f"doctor-{job}.log"
    try:
        _wait(job)
    except KeyboardInterrupt:
        client.call("scancel", job)
        print(f"samecurve: job {job} is cancelled", file=sys.stderr)
        return 130
    return _tell(job, log)


def command(arguments: argparse.Namespace, overrides: list[str], root: Path) -> list[str]:
    """What submits it."""
    asked = [f"--nodes={arguments.nodes or 1}", f"--ntasks-per-node={arguments.ranks or 1}"]
    asked += [f"--gpus-per-node={arguments.gpus_per_node}"] if arguments.gpus_per_node else []
    asked += [f"--partition={arguments.partition}"] if arguments.partition else []
    minutes = int(arguments.timeout_seconds / 60) + _SPARE_MINUTES
    asked += [
        "--parsable",
        f"--time={minutes}",
        f"--output={str(root).replace('%', '%%')}/doctor-%j.log",
        "--no-requeue",
    ]
    passed = [word for name in arguments.config for word in ("--config", name)]
    passed += [f"--timeout-seconds={arguments.timeout_seconds:g}"]
    passed += ["--short"] if arguments.short else []
    passed += ["--json"] if arguments.json else []
    passed += [f"--ranks={arguments.ranks}"] if arguments.ranks else []
    script = str(INSTALL_ROOT / "slurm" / "doctor.sh")
    return client.with_site_file(["sbatch", *asked, script, *passed, *overrides], INSTALL_ROOT)


def _environment() -> dict[str, str]:
    """The same Python there as here, unless a site says otherwise."""
    return {"SAMECURVE_PYTHON": sys.executable} | dict(os.environ)


def _wait(job: str) -> None:
    """Until it has left the queue; says what it waits for."""
    told = ""
    while True:
        try:
            state = client.call("squeue", "--noheader", f"--jobs={job}", "--format=%T %R").strip()
        except SlurmError as error:
            if "Invalid job id" in str(error):  # it has left long since
                return
            raise
        if not state:
            return
        if state != told:
            print(f"samecurve: job {job}: {state}", file=sys.stderr, flush=True)
            told = state
        time.sleep(_POLL_SECONDS)


def _tell(job: str, log: Path) -> int:
    """Its log, and its exit code. Raises SlurmError when it left none."""
    shown = client.call("scontrol", "show", "job", "--oneliner", job)
    fields = dict(word.partition("=")[::2] for word in shown.split())
    if not log.is_file():
        raise SlurmError(
            f"job {job} on {fields.get('NodeList')} ended as {fields.get('JobState')} ({fields.get('ExitCode')}) "
            f"without a log: wanted {log}; can that node write there? set run.root to a folder that all nodes share"
        )
    with log.open() as file:
        shutil.copyfileobj(file, sys.stdout)
    code, _, number = fields.get("ExitCode", "1:0").partition(":")
    return int(code) or (1 if number != "0" else 0)
