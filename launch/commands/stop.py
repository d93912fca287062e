"""`samecurve stop RUN`: asks a training run to save and exit, or cancels the SLURM job of a waiting run."""

import argparse
import time
from pathlib import Path

from launch.commands.arguments import add_run_argument
from launch.commands.status import print_queue_problem
from launch.runs.find import find_run
from launch.runs.run import Run, RunPoller, read_runs
from launch.slurm import client
from trainer.errors import UserError
from trainer.text.escape import escape

_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--wait", action="store_true", help="wait until the run is over")
    timeout_help = "seconds that --wait waits at most; default: 600"
    parser.add_argument("--timeout-seconds", type=float, default=600.0, metavar="S", help=timeout_help)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run(arguments.run, arguments.root)
    (run,), queue = read_runs([path], arguments.root)
    print_queue_problem(queue.problem)
    if run.is_over:
        print(f"{run}; nothing to stop")
        if (path / "stop").exists():
            left = escape(path / "stop")
            print(f"{left} is left from an earlier request; remove it, or it stops the next session at once")
        return 0
    if run.state in ("running", "suspended") or run.is_held:
        _request_stop(run)
    else:
        _cancel_job(run)
    return _wait(run, arguments.root, arguments.timeout_seconds) if arguments.wait else 0


def _request_stop(run: Run) -> None:
    """Creates the file that trainer/run/stop.py looks for. Raises UserError if it cannot."""
    try:
        (run.path / "stop").touch()
    except OSError as error:
        raise UserError(
            f"{run.path / 'stop'} cannot be written ({error.strerror}); call this as the user who started the run"
        ) from None
    times = {"running": "after the current step", "suspended": f"when job {run.job} continues"}
    when = times.get(run.state, "after its first step")
    print(f"{escape(run.name)} saves {when}, then exits with code 75; run the same command again to continue")


def _cancel_job(run: Run) -> None:
    """Cancels the SLURM job of a run without a process. Raises UserError if this machine does not see the job."""
    if not run.in_queue:
        raise UserError(f"{run}; call this on a machine with SLURM, or call scancel {run.job} there")
    assert run.job is not None
    client.call("scancel", run.job)
    progress = f"it has {run.step:,} steps and continues" if run.step else "it has not been trained and starts"
    print(f"{escape(run.name)}: job {escape(run.job)} is cancelled; {progress} when it is submitted again")


def _wait(run: Run, root: Path, timeout_seconds: float) -> int:
    """Waits until the run is over and returns the exit code. Raises UserError after the timeout."""
    deadline, poll_run = time.monotonic() + timeout_seconds, RunPoller(run.path, root)
    while not (run := poll_run()).is_over:
        if time.monotonic() > deadline:
            raise UserError(
                f"{run}, after {timeout_seconds:g} s; samecurve logs {run.name} shows what it does; "
                "--timeout-seconds waits longer"
            )
        time.sleep(_POLL_SECONDS)
    (run.path / "stop").unlink(missing_ok=True)  # the run ended for another reason and did not see the file
    print(f"{run}{f' at step {run.step:,}' if run.step else ''}")
    return 0
