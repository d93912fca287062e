"""SLURM's commands and variables in, plain values out. The only file that calls sbatch, squeue, scontrol or scancel."""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError, WorldError

_ANSWER_SECONDS = 60.0  # a busy controller; a client gives up by itself after about as long
_PATIENCE_SECONDS = 90.0
_RETRY_SECONDS = 3.0
_NO_CLUSTER = "Could not establish a configuration source"  # any command's, where no file names a controller
_AWAY = re.compile("Unable to contact|timed out|no answer within|Connection refused|communication", re.IGNORECASE)
# Of a job's tasks, where a step of ours has one a node.
_OF_TASKS = (
    "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_CPUS_PER_TASK", "SLURM_GPU_BIND",
    "SLURM_TRES_BIND",
)  # fmt: skip


class SlurmError(UserError):
    """SLURM is not there, or does not do what it was asked."""


def is_here() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("squeue") is not None


def call(*argv: str, env: Mapping[str, str] | None = None, timeout_seconds: float = _ANSWER_SECONDS) -> str:
    """Runs one of SLURM's commands and returns what it printed. Raises SlurmError with its own words."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=timeout_seconds, check=False, env=env
        )
    except FileNotFoundError:
        raise SlurmError(f"{argv[0]} is not on this machine; run this on a SLURM cluster's login node") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{argv[0]} gave no answer within {timeout_seconds:.0f} s; is SLURM's controller up?"
        ) from None
    if done.returncode and _NO_CLUSTER in done.stderr:
        raise SlurmError(f"{argv[0]} knows of no cluster from this machine; run this on a SLURM cluster's login node")
    if done.returncode:
        raise SlurmError(f"{argv[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout


def call_with_retry(*argv: str) -> str:
    """The same, again and again while the controller is away: a job must not be lost for that."""
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return call(*argv, timeout_seconds=_ANSWER_SECONDS / 2)
        except SlurmError as error:
            if not _AWAY.search(str(error)) or time.monotonic() > until:
                raise
        time.sleep(_RETRY_SECONDS)


def for_srun(environment: Mapping[str, str]) -> dict[str, str]:
    """What the job's own tasks were to be is not what the step's are."""
    return {name: value for name, value in environment.items() if name not in _OF_TASKS}


def site_srun_arguments() -> list[str]:
    """What the site's file wants srun to be told."""
    return shlex.split(os.environ.get("SAMECURVE_SRUN_ARGS", ""))


def with_site_file(argv: Sequence[str], repository: Path) -> list[str]:
    """sbatch's call after the site's file, where there is one: it may say what sbatch needs, such as SBATCH_ACCOUNT.

    What was typed is never read by the shell.
    """
    site = Path(os.environ.get("SAMECURVE_SITE") or repository / "slurm" / "site.sh")
    return ["bash", "-c", 'source "$1"; shift; exec "$@"', "samecurve", str(site), *argv] if site.is_file() else [*argv]


@dataclass(frozen=True, slots=True)
class Allocation:
    """What a job has been given. Every node has the same."""

    job_id: str
    """as scontrol and scancel want it: 12, or 12_3 for a task of an array"""
    number: int
    """of the job, another one for each task of an array"""
    nodes: tuple[str, ...]
    gpus_per_node: int
    cpus_per_node: int
    tasks_per_node: int
    """as asked for with --ntasks-per-node: ranks a node where there are no GPUs"""
    end_time: int | None
    """when the job will be ended, in seconds since 1970; None: it has no limit, or SLURM does not say"""
    array_task: int | None = None
    log: str = ""
    """where the job's output goes"""

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.tasks_per_node


def allocation(env: Mapping[str, str] = os.environ) -> Allocation:
    """That of the job this process runs in. Raises SlurmError outside a job, WorldError when its nodes differ."""
    if "SLURM_JOB_ID" not in env:
        raise SlurmError("this is not a SLURM job (no SLURM_JOB_ID); start it with sbatch slurm/train.sh")
    if int(env.get("SLURM_HET_SIZE", "0") or 0) > 1:
        raise WorldError("this is a heterogeneous job (--het-group, or ':' in sbatch's line); ask for one kind of node")
    # An array's last task has the array's own number, by which SLURM would mean all of them.
    task, array = env.get("SLURM_ARRAY_TASK_ID", ""), env.get("SLURM_ARRAY_JOB_ID", "")
    job_id = f"{array}_{task}" if task.isdigit() else env["SLURM_JOB_ID"]
    text = call_with_retry("scontrol", "show", "job", "--details", job_id)
    nodes = tuple(call_with_retry("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split())
    gpus = _gpus_of_nodes(text, len(nodes), env)
    cpus = counts(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    _refuse_unequal("GPUs", gpus, nodes, "--gpus-per-node")
    _refuse_unequal("CPU cores", cpus, nodes, "--cpus-per-task")
    return Allocation(
        job_id=job_id,
        number=int(env["SLURM_JOB_ID"]),
        nodes=nodes,
        gpus_per_node=gpus[0],
        cpus_per_node=cpus[0],
        tasks_per_node=counts(env.get("SLURM_NTASKS_PER_NODE") or "1")[0],
        end_time=_end_time(text),
        array_task=int(task) if task.isdigit() else None,
        log=_field(text, "StdOut"),
    )


def is_preempted(job_id: str) -> bool:
    """Whether SLURM wants a running job's nodes for another one, and has told its tasks."""
    return re.search(r"\bPreemptTime=\d", call_with_retry("scontrol", "show", "job", job_id)) is not None


def counts(text: str) -> list[int]:
    """`16(x2),8` as SLURM writes a number for each node: [16, 16, 8]."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise SlurmError(f"'{text}' is not a list of counts as SLURM writes them, such as 16(x2),8")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _gpus_of_nodes(text: str, num_nodes: int, env: Mapping[str, str]) -> list[int]:
    """GPUs of each node: the details have them for all nodes, the variables for this one alone."""
    found: list[int] = []
    for line in re.findall(r"^\s+Nodes=(.*)$", text, re.MULTILINE):
        names, _, rest = line.partition(" ")
        gres = re.search(r"GRES=(\S*)", rest)
        gpus = sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)\(", gres[1] if gres else ""))
        found += [gpus] * len(call_with_retry("scontrol", "show", "hostnames", names).split())
    return found if len(found) == num_nodes else [int(env.get("SLURM_GPUS_ON_NODE", "0") or 0)] * num_nodes


def _refuse_unequal(what: str, numbers: Sequence[int], nodes: Sequence[str], option: str) -> None:
    if len(set(numbers)) > 1:
        shown = ", ".join(f"{node}: {number}" for node, number in zip(nodes, numbers, strict=False))
        raise WorldError(f"the nodes have different numbers of {what} ({shown}): wanted the same on each; use {option}")


def _field(text: str, name: str) -> str:
    """A field that has a line of its own in what scontrol shows."""
    match = re.search(rf"^ +{name}=(.*)$", text, re.MULTILINE)
    return match[1] if match else ""


def _end_time(text: str) -> int | None:
    match = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", text)
    limited = re.search(r"\bTimeLimit=(\S+)", text)
    if match is None or limited is None or limited[1] == "UNLIMITED":
        return None
    return int(datetime.datetime.fromisoformat(match[1]).timestamp())
