"""Calls SLURM's commands and reads the allocation of a job. Every call of a SLURM command goes through this file."""

import datetime
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import ConfigError, UserError, WorldError
from trainer.text.escape import one_line

_TIMEOUT_SECONDS = 60.0  # a busy controller is slow; SLURM's own commands give up after about as long
_RETRY_FOR_SECONDS = 90.0
_RETRY_INTERVAL_SECONDS = 3.0
_NO_CLUSTER = "Could not establish a configuration source"  # every command prints this where no file names a controller
_UNREACHABLE = re.compile(
    "Unable to contact|timed out|no answer within|Connection refused|communication", re.IGNORECASE
)
_FAILED_STATES = (
    "BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT",
)  # fmt: skip
# These describe the tasks of the job. A job step with one task per node must not inherit them.
_TASK_VARIABLES = (
    "SLURM_NTASKS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_CPUS_PER_TASK", "SLURM_GPU_BIND",
    "SLURM_TRES_BIND",
)  # fmt: skip

_OUTPUT_VARIABLES = ("SQUEUE_", "SINFO_")
# Options of sbatch that would contradict what samecurve records of a job or checks before it, and what to do instead.
_REFUSED_OPTIONS = {
    "array": ("a", "give --array to samecurve submit"),
    "chdir": ("D", "call samecurve from the folder where the job is to run"),
    "error": ("e", "leave it out: samecurve logs shows the job's output"),
    "gpus-per-node": ("", "give --gpus-per-node to samecurve itself"),
    "nodes": ("N", "give --nodes to samecurve itself"),
    "ntasks-per-node": ("", "give --ntasks-per-node to samecurve itself"),
    "output": ("o", "leave it out: samecurve logs shows the job's output"),
    "test-only": ("", "use --dry-run of samecurve"),
    "wait": ("W", "leave it out: samecurve logs NAME --follow waits for the end"),
    "wrap": ("", "leave it out: the job runs samecurve's own script"),
}
# Others are overridden by the options that samecurve gives to sbatch.
_REFUSED_VARIABLES = {"SBATCH_ARRAY_INX": "array", "SBATCH_ERROR": "error", "SBATCH_WAIT": "wait"}
_FLAGS = "HIOQkshv"  # sbatch's short options without a value, which may stand before another one: -HW


class SlurmError(UserError):
    """SLURM is not installed, does not answer, or refuses a command."""


class NoAnswerError(SlurmError):
    """SLURM's controller did not answer in time."""

    output: str = ""
    """what the command had printed until then"""


def is_available() -> bool:
    """Returns whether SLURM's commands are installed on this machine."""
    return shutil.which("squeue") is not None


def call(*argv: str, env: Mapping[str, str] | None = None, timeout_seconds: float = _TIMEOUT_SECONDS) -> str:
    """Runs a SLURM command and returns its stdout. Raises SlurmError with the command's own message on one line.

    env: by default that of this process, without the variables by which the user shapes the output of these commands.
    """
    if env is None:
        env = {name: value for name, value in os.environ.items() if not name.startswith(_OUTPUT_VARIABLES)}
        env["SLURM_TIME_FORMAT"] = "standard"
    try:
        completed = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=timeout_seconds, check=False, env=env
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{argv[0]} is not installed on this machine; run this command on a login node of a SLURM cluster"
        ) from None
    except subprocess.TimeoutExpired as expired:
        error = NoAnswerError(
            f"{argv[0]} gave no answer within {timeout_seconds:.0f} s; check that its controller is up (scontrol ping)"
        )
        printed = expired.output or b""
        error.output = printed if isinstance(printed, str) else printed.decode(errors="replace")
        raise error from None
    if completed.returncode and _NO_CLUSTER in completed.stderr:
        raise SlurmError(
            f"{argv[0]} finds no cluster from this machine; run this command on a login node of a SLURM cluster"
        )
    if completed.returncode:
        raise SlurmError(f"{argv[0]}: {one_line(completed.stderr, None) or f'exit code {completed.returncode}'}")
    return completed.stdout


def submit(*argv: str, env: Mapping[str, str]) -> str:
    """Runs `sbatch --parsable` and returns the id of the job. Raises SlurmError."""
    try:
        output, problem = call(*argv, env=env), None
    except NoAnswerError as error:  # it may have printed the id before it hung
        output, problem = error.output, error
    ids = re.findall(r"^(\d+)(?:;\S+)?$", output, re.MULTILINE)  # a site's own sbatch may print more
    if not ids and problem:
        raise SlurmError(f"{problem}; squeue --me shows whether the job is in the queue all the same")
    if not ids:
        got = one_line(output, None)
        raise SlurmError(f"sbatch printed no job id (got '{got}'); squeue --me shows whether the job is in the queue")
    return str(ids[-1])


def check_sbatch_options(options: Sequence[str]) -> None:
    """Raises ConfigError for an option of sbatch that would contradict samecurve's records and checks of the job."""
    for option in options:
        if option.startswith("--"):
            given = option[2:].partition("=")[0]  # sbatch accepts the start of a name too
            is_other = len(given) < 2 or given in ("gpus", "ntasks")
            names = [] if is_other else [name for name in _REFUSED_OPTIONS if name.startswith(given)]
        else:
            letter = option.removeprefix("-").lstrip(_FLAGS)[:1] if option.startswith("-") else ""
            names = [name for name, (short, _) in _REFUSED_OPTIONS.items() if letter and short == letter]
        if names:
            raise ConfigError(f"--sbatch={option}: samecurve cannot pass this on; {_REFUSED_OPTIONS[names[0]][1]}")


def check_sbatch_variables(environment: Mapping[str, str]) -> None:
    """Raises ConfigError for a variable that stands for an option which check_sbatch_options refuses."""
    for variable, option in _REFUSED_VARIABLES.items():
        if variable in environment:
            raise ConfigError(
                f"{variable} is set, which is sbatch's --{option}; unset it, also in the site file"
                f" ({_REFUSED_OPTIONS[option][1]})"
            )


def check_dependency(job: str) -> None:
    """Raises SlurmError for a job that no other job can follow: it is unknown, or it has ended without success.

    SLURM starts a job at once if it does not know the job that this one depends on.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise ConfigError(f"--after {job}: expected the number of a job, such as 4711 or 4711_3 for an array task")
    if not is_available():
        return
    try:
        details = call("scontrol", "show", "job", job)
    except NoAnswerError:
        raise
    except SlurmError as error:
        raise SlurmError(
            f"--after {job}: SLURM does not know this job ({error}); leave --after out if it ended well some time ago, "
            "or correct the number"
        ) from None
    for state in re.findall(r"\bJobState=(\S+)", details):
        if state in _FAILED_STATES:
            raise SlurmError(f"--after {job}: this job ended as {state}, so no job can start after its success")


def call_with_retry(*argv: str) -> str:
    """Runs a SLURM command like `call`, and retries for 90 s while the controller is unreachable.

    A running job must not fail because the controller restarts. Raises SlurmError.
    """
    deadline = time.monotonic() + _RETRY_FOR_SECONDS
    while True:
        try:
            return call(*argv, timeout_seconds=_TIMEOUT_SECONDS / 2)
        except SlurmError as error:
            if not _UNREACHABLE.search(str(error)) or time.monotonic() > deadline:
                raise
        time.sleep(_RETRY_INTERVAL_SECONDS)


def without_task_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for srun, without the job's variables that would change the tasks of a job step."""
    return {name: value for name, value in environment.items() if name not in _TASK_VARIABLES}


def site_srun_arguments(env: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the extra srun arguments that the site file sets in SAMECURVE_SRUN_ARGS. Raises ConfigError."""
    text = env.get("SAMECURVE_SRUN_ARGS", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(
            f"SAMECURVE_SRUN_ARGS={text}: not readable as arguments of srun ({error}); close the quote in the site file"
        ) from None


@dataclass(frozen=True, slots=True)
class Allocation:
    """The nodes and resources of a job. All nodes have the same resources."""

    job_id: str
    """the id for scontrol and scancel: 12, or 12_3 for an array task"""
    job_number: int
    """SLURM_JOB_ID, which differs between the tasks of an array"""
    nodes: tuple[str, ...]
    gpus_per_node: int
    cpus_per_node: int
    tasks_per_node: int
    """the value of --ntasks-per-node: the ranks per node of a job without GPUs"""
    end_time: int | None
    """when SLURM ends the job, in seconds since 1970; None: the job has no time limit, or SLURM does not report it"""
    array_task: int | None = None
    log: str = ""
    """path of the file that receives the job's output"""

    @property
    def ranks_per_node(self) -> int:
        """One rank per GPU, or one per task without GPUs."""
        return self.gpus_per_node or self.tasks_per_node


def read_allocation(env: Mapping[str, str] = os.environ) -> Allocation:
    """Returns the allocation of the current job. Raises SlurmError outside a job, WorldError when its nodes differ."""
    if "SLURM_JOB_ID" not in env:
        raise SlurmError(
            "this process is not part of a SLURM job (SLURM_JOB_ID is not set); "
            "submit one from the project's folder with sbatch slurm/train.sh, or from anywhere with samecurve submit"
        )
    if int(env.get("SLURM_HET_SIZE", "0") or 0) > 1:
        raise WorldError(
            "this is a heterogeneous job (--het-group, or ':' in the sbatch command), and all nodes must be alike; "
            "request one kind of node"
        )
    # The last task of an array has the array's own id as SLURM_JOB_ID, and scontrol would take it for the whole array.
    task, array = env.get("SLURM_ARRAY_TASK_ID", ""), env.get("SLURM_ARRAY_JOB_ID", "")
    job_id = f"{array}_{task}" if task.isdigit() else env["SLURM_JOB_ID"]
    details = call_with_retry("scontrol", "show", "job", "--details", job_id)
    nodes = tuple(call_with_retry("scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]).split())
    gpus = _gpus_of_nodes(details, len(nodes), env)
    cpus = parse_counts(env.get("SLURM_JOB_CPUS_PER_NODE", "1"))
    _check_equal("GPUs", gpus, nodes, "--gpus-per-node")
    _check_equal("CPU cores", cpus, nodes, "--cpus-per-task")
    return Allocation(
        job_id=job_id,
        job_number=int(env["SLURM_JOB_ID"]),
        nodes=nodes,
        gpus_per_node=gpus[0],
        cpus_per_node=cpus[0],
        tasks_per_node=parse_counts(env.get("SLURM_NTASKS_PER_NODE") or "1")[0],
        end_time=_end_time(details),
        array_task=int(task) if task.isdigit() else None,
        log=_field(details, "StdOut"),
    )


def clock_offset() -> float | None:
    """Returns by how many seconds the clock of this machine is ahead of the controller's; None if it does not say."""
    try:
        before = time.time()
        output = call("sdiag", timeout_seconds=_TIMEOUT_SECONDS / 2)
    except SlurmError:  # not every site allows sdiag
        return None
    match = re.search(r"sdiag output at .*\((\d+)\)", output)
    return None if match is None else before - int(match[1])


def restart_count(env: Mapping[str, str] = os.environ) -> int:
    """Returns how many times SLURM has started the current job again."""
    return int(env.get("SLURM_RESTART_COUNT", "0") or 0)


def is_preempted(job_id: str) -> bool:
    """Returns whether SLURM has warned the tasks of a running job that another job gets its nodes."""
    return re.search(r"\bPreemptTime=\d", call_with_retry("scontrol", "show", "job", job_id)) is not None


def parse_counts(text: str) -> list[int]:
    """Parses SLURM's notation for one number per node: `16(x2),8` is [16, 16, 8]. Raises SlurmError."""
    counts: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry.strip())
        if match is None:
            raise SlurmError(
                f"cannot read '{text}' as a list of counts such as 16(x2),8; check SLURM_JOB_CPUS_PER_NODE and "
                "SLURM_NTASKS_PER_NODE"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _gpus_of_nodes(details: str, num_nodes: int, env: Mapping[str, str]) -> list[int]:
    """Returns the GPUs of each node. Only the job's details cover all nodes; the variables describe this node alone."""
    gpus: list[int] = []
    for line in re.findall(r"^\s+Nodes=(.*)$", details, re.MULTILINE):
        names, _, resources = line.partition(" ")
        gres = re.search(r"GRES=(\S*)", resources)
        count = sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)\(", gres[1] if gres else ""))
        gpus += [count] * len(call_with_retry("scontrol", "show", "hostnames", names).split())
    return gpus if len(gpus) == num_nodes else [int(env.get("SLURM_GPUS_ON_NODE", "0") or 0)] * num_nodes


def _check_equal(resource: str, counts: Sequence[int], nodes: Sequence[str], option: str) -> None:
    if len(set(counts)) > 1:
        listed = ", ".join(f"{node}: {count}" for node, count in zip(nodes, counts, strict=False))
        raise WorldError(f"all nodes must have the same number of {resource}, got {listed}; request them with {option}")


def _field(details: str, name: str) -> str:
    """Returns a field that fills a whole line of scontrol's output, or an empty string."""
    match = re.search(rf"^ +{name}=(.*)$", details, re.MULTILINE)
    return match[1] if match else ""


def _end_time(details: str) -> int | None:
    match = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", details)
    limit = re.search(r"\bTimeLimit=(\S+)", details)
    if match is None or limit is None or limit[1] == "UNLIMITED":
        return None
    return int(datetime.datetime.fromisoformat(match[1]).timestamp())
