"""The part of slurm/train.sh that is in Python. It starts one srun task per node, restarts ranks and requeues the job.

SLURM sends SIGUSR1 shortly before the time limit. This process forwards it to the ranks, which save a checkpoint. Then
it requeues the job.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch import forecast
from launch.forecast import RankLayout
from launch.hardware import Machine, this_machine
from launch.plan import EnvironmentVariable, LaunchPlan
from launch.signals import SignalForwarder
from launch.slurm import array, client, retry
from launch.slurm.client import Allocation
from launch.slurm.retry import Attempt, Decision, JobRecord
from launch.torchrun import config_arguments, threads_variable, torchrun_variables
from trainer.config.schema import RunConfig
from trainer.distributed.environment import without_launchers
from trainer.errors import FolderError, WorldError
from trainer.run.exit import OUTCOME_VARIABLE, read_outcome
from trainer.run.folder import RunFolder
from trainer.text.escape import escape

_PORTS = range(20000, 30000)  # below the ports that Linux assigns to outgoing connections
_PORT_CANDIDATES = 100
_WAIT_FOR_KILL_SECONDS = 60.0
_FOLDER_IN_USE_SECONDS = 300.0
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A job, its allocation, and the run that it trains."""

    config: RunConfig
    machine: Machine
    allocation: Allocation
    layout: RankLayout
    trainer_arguments: tuple[str, ...]
    """arguments of trainer/main.py: config files and overrides"""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the batch script."""
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N",
        help="end the job after N attempts in a row without progress; default: 3",
    )  # fmt: skip
    parser.add_argument("--doctor", action="store_true", help="check the nodes with samecurve doctor before training")
    parser.add_argument(
        "--points", metavar="FILE", help="sweep.json of a sweep; the array task selects its settings from it"
    )


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the job until it ends or goes back into the queue. Returns an exit code as trainer/main.py does."""
    # slurm/prologue.sh has it ignored, so that it cannot end this process before, and what is ignored is not forwarded.
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    # Any signal becomes SIGUSR1: on SIGTERM srun kills its tasks.
    forwarder = SignalForwarder(lambda number: signal.SIGUSR1)
    if os.environ.pop("SAMECURVE_SIGNAL", ""):  # SLURM's warning came before Python started (slurm/prologue.sh)
        os.kill(os.getpid(), signal.SIGUSR1)
    allocation = client.read_allocation()
    overrides = array.settings_of_task(arguments.points, allocation.array_task, arguments.config, overrides)
    config = forecast.load_settings(arguments.config, overrides)
    layout = RankLayout(len(allocation.nodes), allocation.ranks_per_node, "gpu" if allocation.gpus_per_node else "cpu")
    forecast.check_run(config, layout)
    trainer_arguments = (*config_arguments(arguments.config), *overrides)
    job = TrainingJob(config, this_machine(), allocation, layout, trainer_arguments)
    wait_until_free(job.folder, forwarder)
    base_job_id = allocation.job_id.partition("_")[0]  # without the number of an array task
    record = JobRecord.load(job.folder, base_job_id, allocation.array_task, allocation.log)
    record.write(job.folder)
    if not allocation.gpus_per_node and _partition_has_gpus():
        print("note: this job requests no GPU and trains on the CPU; request one with --gpus-per-node=1", flush=True)
    if arguments.doctor and forwarder.received is None and (code := _run_doctor(job)):
        return code
    return _run_attempts(job, forwarder, record, arguments.max_restarts)


def _run_attempts(job: TrainingJob, forwarder: SignalForwarder, record: JobRecord, limit: int) -> int:
    """Starts the ranks, again and again, until the job is done or requeued.

    limit: attempts in a row without progress after which the job ends.
    """
    allocation = job.allocation
    outcome_path = job.folder.path / f".outcome-{allocation.job_id}.json"
    addresses = [node_address(node) for node in allocation.nodes[:2]]
    while True:
        wait_until_free(job.folder, forwarder)
        clock_offset, start = client.clock_offset(), time.monotonic()
        controller_time = time.time() - (clock_offset or 0.0)
        plan = plan_srun(job, addresses, free_port(allocation.job_number), controller_time)
        print(escape(plan, keep="\n"), flush=True)
        outcome_path.unlink(missing_ok=True)
        environment = without_launchers(os.environ) | plan.assignments
        environment[OUTCOME_VARIABLE] = str(outcome_path.resolve())
        code = forwarder.run(plan.argv, client.without_task_variables(environment))
        outcome = read_outcome(outcome_path)
        outcome_path.unlink(missing_ok=True)
        ended_early = outcome is None or outcome[0] == retry.STOPPED
        is_preempted = ended_early and forwarder.received is None and _is_preempted(allocation)
        step = retry.newest_checkpoint_step(job.folder)
        seconds_left = None if allocation.end_time is None else allocation.end_time - controller_time
        attempt = Attempt(time.monotonic() - start, seconds_left, clock_offset)
        decision = retry.decide(outcome, code, forwarder.received, record, step, limit, attempt, is_preempted)
        record = decision.record
        try:
            record.write(job.folder)
        except FolderError as error:  # a full disk must not keep the job from going back into the queue
            print(f"samecurve: {error}", file=sys.stderr, flush=True)
            if decision.action == "requeue" and record.without_progress and client.restart_count() >= limit:
                reason = (
                    f"{decision.reason}; giving up after {client.restart_count()} restarts, which cannot be counted"
                )
                decision = replace(decision, action="end", reason=reason)
        print(f"samecurve: job {allocation.job_id}: {escape(decision.reason)}", file=sys.stderr, flush=True)
        if decision.action != "restart":
            return _requeue(allocation, decision) if decision.action == "requeue" else decision.code


def plan_srun(job: TrainingJob, addresses: Sequence[str], port: int, controller_time: float) -> LaunchPlan:
    """Returns the srun command that starts one task per node.

    addresses: addresses of the first two nodes. port: rendezvous port on the first node. controller_time: now, by the
    clock of SLURM's controller, in seconds since 1970. torchrun's own restarts are
    off: _run_attempts restarts the ranks, even if torchrun was killed, and counts the attempts.
    """
    allocation, layout, machine = job.allocation, job.layout, job.machine
    argv = ["srun", f"--nodes={layout.nodes}", f"--ntasks={layout.nodes}", "--ntasks-per-node=1"]
    argv += [f"--cpus-per-task={allocation.cpus_per_node}", "--kill-on-bad-exit=1"]
    argv += [f"--gpus-per-node={allocation.gpus_per_node}"] if allocation.gpus_per_node else []
    argv += client.site_srun_arguments()
    argv += [machine.python, str(machine.install_root / "launch" / "main.py"), "node"]
    argv += [f"--nodes={layout.nodes}", f"--ranks={layout.ranks_per_node}", f"--endpoint={addresses[0]}:{port}"]
    argv += [f"--second={addresses[1]}"] if layout.nodes > 1 else []
    argv += [f"--controller-time={controller_time:.0f}", f"--id={allocation.job_id}", *job.trainer_arguments]
    variables = [threads_variable(job.config, allocation.cpus_per_node, layout.ranks_per_node), *torchrun_variables()]
    if allocation.end_time is not None:
        reason = "end of this job; the run saves and stops in time"
        variables.append(EnvironmentVariable("SLURM_JOB_END_TIME", str(allocation.end_time), reason))
    title = f"job {allocation.job_id}: {job.config.run.name} on {', '.join(allocation.nodes)}"
    return LaunchPlan(title, tuple(argv), tuple(variables), forecast.describe_run(job.config, layout))


def wait_until_free(folder: RunFolder, forwarder: SignalForwarder) -> None:
    """Waits until no process uses the run folder: ranks on a node that SLURM considers down may still run.

    Returns at once after a signal. Raises FolderError after five minutes.
    """
    deadline = time.monotonic() + _FOLDER_IN_USE_SECONDS
    while folder.is_in_use() and forwarder.received is None:
        if time.monotonic() > deadline:
            raise FolderError(
                f"another process still uses run folder {folder.path} after {_FOLDER_IN_USE_SECONDS / 60:.0f} minutes; "
                "wait until it exits, or choose another run.name"
            )
        time.sleep(_POLL_SECONDS)


def free_port(job_number: int) -> int:
    """Returns a free port on this node, the job's first, for the rendezvous of the ranks.

    The job's number selects the candidates, so that two jobs on one node try different ports. Raises WorldError.
    """
    for attempt in range(_PORT_CANDIDATES):
        port = candidate_port(job_number, attempt)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    first = candidate_port(job_number)
    raise WorldError(
        f"no free port among the {_PORT_CANDIDATES} from {first} on {socket.gethostname()}; "
        "end the programs that listen there (ss -tlnp), or exclude this node with --exclude"
    )


def candidate_port(job_number: int, attempt: int = 0) -> int:
    """Returns the port to try at an attempt, counted from 0. Consecutive job ids start seven ports apart."""
    return _PORTS[(job_number * 7 + attempt) % len(_PORTS)]


def node_address(node: str) -> str:
    """Returns the address by which SLURM itself reaches a node, or the node's name if SLURM has no other."""
    for field in client.call_with_retry("scontrol", "show", "node", node).split():
        if field.startswith("NodeAddr="):
            return field.partition("=")[2]
    return node


def _partition_has_gpus() -> bool:
    try:
        return "gpu" in client.call("sinfo", "-h", "-o", "%G", "-p", os.environ.get("SLURM_JOB_PARTITION", ""))
    except client.SlurmError:  # only a printed note depends on it
        return False


def _is_preempted(allocation: Allocation) -> bool:
    """Returns whether SLURM is preempting the job. False if the controller does not answer: the job continues."""
    try:
        return client.is_preempted(allocation.job_id)
    except client.SlurmError as error:
        print(
            f"samecurve: job {allocation.job_id}: cannot find out whether SLURM is preempting it ({error})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return False


def _run_doctor(job: TrainingJob) -> int:
    """Runs `samecurve doctor --short` in this job and returns its exit code."""
    main_script = str(job.machine.install_root / "launch" / "main.py")
    command = [job.machine.python, main_script, "doctor", "--short", *job.trainer_arguments]
    return subprocess.run(command, check=False).returncode


def _requeue(allocation: Allocation, decision: Decision) -> int:
    """Puts the job back into the queue. SLURM then kills this process. A return means that the requeue failed."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # do not forward the SIGTERM with which SLURM ends this process
        client.call_with_retry("scontrol", "requeue", allocation.job_id)
    except client.SlurmError as error:
        print(f"samecurve: job {allocation.job_id} cannot be requeued ({error})", file=sys.stderr, flush=True)
        return decision.code
    time.sleep(_WAIT_FOR_KILL_SECONDS)
    return decision.code
