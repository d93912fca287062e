"""What `sbatch slurm/train.sh` runs on the job's first node: one srun task a node, torchrun inside, until it is over.

SLURM's warning before the time limit (SIGUSR1) is passed on; the ranks save, and the job is queued again.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence

from launch import forecast
from launch.forecast import RankLayout
from launch.hardware import Machine, this_machine
from launch.plan import LaunchPlan, Variable
from launch.signals import SignalForwarder
from launch.slurm import array, client, retry
from launch.slurm.client import Allocation
from launch.slurm.retry import Decision, JobRecord
from launch.torchrun import config_arguments, threads_variable, torchrun_variables
from trainer.config.schema import RunConfig
from trainer.errors import FolderError, WorldError
from trainer.run.exit import OUTCOME_VARIABLE, read_outcome
from trainer.run.folder import RunFolder

_PORTS = range(20000, 30000)  # below those that Linux gives to clients
_REQUEUE_SECONDS = 60.0
_FREE_SECONDS = 300.0
_POLL_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-restarts", type=int, default=3, metavar="N",
        help="starts without a newer checkpoint before the job gives up; default: 3",
    )  # fmt: skip
    parser.add_argument("--doctor", action="store_true", help="look for what would go wrong first")
    parser.add_argument("--points", metavar="FILE", help="the plan of a sweep: this array task's settings are in it")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """The job, to its end or until it is queued again; the exit code of trainer/main.py."""
    relay = SignalForwarder(lambda number: signal.SIGUSR1)  # srun kills its tasks at once for a SIGTERM of its own
    given = client.allocation()
    overrides = array.settings_of_task(arguments.points, given.array_task, arguments.config, overrides)
    config = forecast.load_settings(arguments.config, overrides)
    machine = this_machine()
    layout = RankLayout(len(given.nodes), given.ranks_per_node, "gpu" if given.gpus_per_node else "cpu")
    forecast.check(config, layout.world_size)
    folder = RunFolder(config.folder)
    wait_until_free(folder)
    record = JobRecord.of(folder, given.job_id.partition("_")[0], given.array_task, given.log)
    record.write(folder)
    if not given.gpus_per_node and _gpus_of_partition():
        print("note: this job asked for no GPU and trains on the CPU; --gpus-per-node=1 asks for one", flush=True)
    trained = [*config_arguments(arguments.config), *overrides]
    if arguments.doctor and (code := _doctor(machine, trained)):
        return code
    return _attempts(relay, config, machine, given, layout, trained, record, arguments.max_restarts)


def _attempts(
    relay: SignalForwarder,
    config: RunConfig,
    machine: Machine,
    given: Allocation,
    layout: RankLayout,
    trained: list[str],
    record: JobRecord,
    limit: int,
) -> int:
    folder = RunFolder(config.folder)
    path = folder.path / f".outcome-{given.job_id}.json"
    addresses = [node_address(node) for node in given.nodes[:2]]
    while True:
        wait_until_free(folder)
        plan = make(config, machine, given, layout, trained, addresses, free_port(given.number))
        print(plan, flush=True)
        path.unlink(missing_ok=True)
        code = relay.run(plan.argv, client.for_srun(plan.environment | {OUTCOME_VARIABLE: str(path.resolve())}))
        found = read_outcome(path)
        path.unlink(missing_ok=True)
        is_early = found is None or found[0] == retry.STOPPED
        is_preempted = is_early and relay.received is None and _is_preempted(given)
        step = retry.newest_checkpoint_step(folder)
        then = retry.decide(found, code, relay.received, record, step, limit, is_preempted)
        record = then.record
        try:
            record.write(folder)
        except FolderError as error:  # a full disk must not keep the job from being queued again
            print(f"samecurve: {error}", file=sys.stderr, flush=True)
        print(f"samecurve: job {given.job_id}: {then.why}", file=sys.stderr, flush=True)
        if then.action != "again":
            return _requeue(given, then) if then.action == "requeue" else then.code


def make(
    config: RunConfig,
    machine: Machine,
    given: Allocation,
    layout: RankLayout,
    trained: list[str],
    addresses: Sequence[str],
    port: int,
) -> LaunchPlan:
    """The srun that starts one task a node.

    addresses: of the first two nodes; trained: arguments of trainer/main.py. torchrun starts no rank again: this job
    does, for a torchrun that died as well, and counts.
    """
    nodes = layout.nodes
    argv = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    argv += [f"--cpus-per-task={given.cpus_per_node}", "--kill-on-bad-exit=1"]
    argv += [f"--gpus-per-node={given.gpus_per_node}"] if given.gpus_per_node else []
    argv += client.site_srun_arguments()
    argv += [machine.python, str(machine.repository / "launch" / "main.py"), "node"]
    argv += [f"--nodes={nodes}", f"--ranks={layout.ranks_per_node}", f"--endpoint={addresses[0]}:{port}"]
    argv += [f"--second={addresses[1]}"] if nodes > 1 else []
    argv += [f"--id={given.job_id}", *trained]
    variables = [threads_variable(config, given.cpus_per_node, layout.ranks_per_node), *torchrun_variables()]
    if given.end_time is not None:
        why = "when SLURM ends this job: the run saves and stops before"
        variables.append(Variable("SLURM_JOB_END_TIME", str(given.end_time), why))
    title = f"job {given.job_id}: {config.run.name} on {', '.join(given.nodes)}"
    return LaunchPlan(title, tuple(argv), tuple(variables), forecast.facts(config, layout))


def wait_until_free(folder: RunFolder) -> None:
    """The ranks of an attempt whose node was given up may live on for a while. Raises FolderError."""
    until = time.monotonic() + _FREE_SECONDS
    while folder.in_use():
        if time.monotonic() > until:
            raise FolderError(f"a run is on in {folder.path}; wait for it, or choose another run.name")
        time.sleep(_POLL_SECONDS)


def free_port(job_number: int) -> int:
    """A port for the ranks to meet at: derived from the job, so that two jobs on a node differ; the next that is free.

    Asked on the first node, where the ranks meet.
    """
    for attempt in range(100):
        port = port_of(job_number, attempt)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise WorldError(f"no free port near {port} on {socket.gethostname()}; is something wrong with this node?")


def port_of(job_number: int, attempt: int = 0) -> int:
    """The port that is tried first, and the next ones. Neighbouring jobs are seven apart."""
    return _PORTS[(job_number * 7 + attempt) % len(_PORTS)]


def node_address(node: str) -> str:
    """How SLURM itself reaches a node; its name where SLURM has nothing better."""
    for word in client.call_with_retry("scontrol", "show", "node", node).split():
        if word.startswith("NodeAddr="):
            return word.partition("=")[2]
    return node


def _gpus_of_partition() -> bool:
    try:
        return "gpu" in client.call("sinfo", "-h", "-o", "%G", "-p", os.environ.get("SLURM_JOB_PARTITION", ""))
    except client.SlurmError:  # it is only for a note
        return False


def _is_preempted(given: Allocation) -> bool:
    """A controller that does not answer must not end the job."""
    try:
        return client.is_preempted(given.job_id)
    except client.SlurmError as error:
        print(f"samecurve: job {given.job_id} may be preempted or not ({error})", file=sys.stderr, flush=True)
        return False


def _doctor(machine: Machine, trained: list[str]) -> int:
    """The short form, in this job; its exit code."""
    import subprocess

    command = [machine.python, str(machine.repository / "launch" / "main.py"), "doctor", "--short", *trained]
    return subprocess.run(command, check=False).returncode


def _requeue(given: Allocation, then: Decision) -> int:
    """SLURM ends this script as soon as it has queued the job again."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which SLURM ends this script
        client.call_with_retry("scontrol", "requeue", given.job_id)
    except client.SlurmError as error:
        print(f"samecurve: job {given.job_id} is not queued again ({error})", file=sys.stderr, flush=True)
        return then.code
    time.sleep(_REQUEUE_SECONDS)
    return then.code
