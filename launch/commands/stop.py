"""`samecurve stop RUN`: a run that trains saves and ends; one that waits for SLURM is taken out of its queue."""

import argparse
import time
from pathlib import Path

from launch.commands.arguments import add_run
from launch.commands.status import tell_trouble
from launch.runs.run import Run, RunPoller, find_run, read_runs
from launch.slurm import client
from trainer.errors import UserError

_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--wait", action="store_true", help="until it is over")
    parser.add_argument("--timeout-seconds", type=float, default=600.0, metavar="S", help="of --wait; default: 600")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run(arguments.run, arguments.root)
    (run,), queue = read_runs([path], arguments.root)
    tell_trouble(queue.trouble)
    if run.is_over:
        print(f"{run}; nothing to stop")
        if (path / "stop").exists():
            print(f"{path / 'stop'} is left from an earlier request; remove it, or it stops the next start at once")
        return 0
    if run.state == "running" or run.is_held:
        _ask(run)
    else:
        _take_out(run)
    return _wait(run, arguments.root, arguments.timeout_seconds) if arguments.wait else 0


def _ask(run: Run) -> None:
    """Leaves the file that trainer/stop.py looks for. Raises UserError when it cannot."""
    try:
        (run.path / "stop").touch()
    except OSError as error:
        raise UserError(f"{run.path / 'stop'} cannot be written ({error.strerror})") from None
    when = "after the step in hand" if run.state == "running" else "after its first step"
    print(f"{run.name} saves {when}, then ends with exit code 75; the same command goes on from there")


def _take_out(run: Run) -> None:
    """Cancels the job of a run that has no process now."""
    if not run.in_queue:
        raise UserError(f"{run}; ask again where SLURM is, or scancel {run.job} there")
    assert run.job is not None
    client.call("scancel", run.job)
    begun = f"it has {run.step:,} steps, and goes on" if run.step else "nothing was trained; it begins"
    print(f"{run.name}: job {run.job} is cancelled; {begun} when it is submitted again")


def _wait(run: Run, root: Path, timeout_seconds: float) -> int:
    """Until the run is over; 1 when that takes too long."""
    until, look = time.monotonic() + timeout_seconds, RunPoller(run.path, root)
    while not (run := look()).is_over:
        if time.monotonic() > until:
            raise UserError(f"{run}, after {timeout_seconds:g} s; look at it with samecurve logs {run.name}")
        time.sleep(_POLL_SECONDS)
    (run.path / "stop").unlink(missing_ok=True)  # it was at its end already, or died
    print(f"{run}{f' at step {run.step:,}' if run.step else ''}")
    return 0
