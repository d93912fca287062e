"""Decides from the environment which launcher started this process, and which rank it is. Imports no torch.

A rank has torchrun's variables, which `accelerate launch` sets too: a complete and consistent set of RANK, WORLD_SIZE
and the others. A process that a user starts alone has none of them. A shell may also hold variables of other launchers
and schedulers (MPI, SLURM), left over from another program. Accelerate and torchrun would read them; we remove them.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer.errors import WorldError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MAX_PORT = 65535
# Rank and number of processes that these launchers give each process. None of them makes our ranks meet.
_OTHER_LAUNCHERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "mpirun": ("PMI_RANK", "PMI_SIZE"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
}
# Variables that torchrun gives its ranks, or reads in place of its options (PET_).
_TORCHRUN_NAMES = {
    *_RANK_VARIABLES, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "NODE_RANK",
    "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip
_TORCHRUN_PREFIXES = ("TORCHELASTIC_", "PET_")
# Variables of other launchers. Accelerate prefers its own to its arguments; some it cannot parse end in a traceback.
_FOREIGN_NAMES = {"SLURM_PROCID", "SLURM_LOCALID", "SLURM_TASK_PID", "FORK_LAUNCHED"}
_FOREIGN_PREFIXES = (
    "ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_", "SLURM_STEP_", "PMI_", "PMIX_", "OMPI_", "MPI_",
    "MV2_", "JSM_",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """A process's place among the ranks, according to its launcher."""

    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    """number of ranks; 1 without a launcher"""
    is_one_machine: bool
    """all ranks run on this machine, according to the launcher"""
    has_launcher_store: bool
    """the ranks meet in the launcher's store, which may hold entries of earlier attempts"""
    restarts_left: int
    """number of times that the launcher will still restart the ranks after a failure"""


def read_environment() -> RankEnvironment:
    """Returns the rank environment of the calling process.

    Raises WorldError if torchrun's variables are incomplete or inconsistent, or if another launcher started several
    processes, each of which would train alone.
    """
    rank, world_size, local_rank, local_world_size = _read_rank_variables()
    _check_other_launchers(world_size)
    restarts = _read_int("TORCHELASTIC_MAX_RESTARTS", 0) - _read_int("TORCHELASTIC_RESTART_COUNT", 0)
    return RankEnvironment(
        rank=rank,
        local_rank=local_rank,
        local_world_size=local_world_size,
        world_size=world_size,
        is_one_machine=world_size == 1 or ("LOCAL_WORLD_SIZE" in os.environ and local_world_size == world_size),
        has_launcher_store=world_size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts_left=max(0, restarts) if has_rank_variables() else 0,
    )


def has_rank_variables() -> bool:
    """Returns whether a launcher, or the user's shell, has set one of the variables of a rank."""
    return any(name in os.environ for name in _RANK_VARIABLES)


def _read_rank_variables() -> tuple[int, int, int, int]:
    """Returns rank, world size, local rank and local world size; 0, 1, 0, 1 without torchrun's variables.

    A launcher that starts one process per machine may leave out LOCAL_RANK and LOCAL_WORLD_SIZE. Raises WorldError.
    """
    values = {name: os.environ[name] for name in _RANK_VARIABLES if name in os.environ}
    if not values:
        return 0, 1, 0, 1
    numbers = {name: parse_int(value) for name, value in values.items()}
    for name, number in numbers.items():
        if number is None:
            raise _inconsistent(f"{name} is not a number", values)
    for name in ("RANK", "WORLD_SIZE"):
        if name not in values:
            raise _inconsistent(f"{name} is not set", values)
    rank, world_size = numbers["RANK"] or 0, numbers["WORLD_SIZE"] or 0
    local_rank = numbers.get("LOCAL_RANK") or 0
    local_world_size = numbers.get("LOCAL_WORLD_SIZE", local_rank + 1) or 0
    if rank >= world_size:
        raise _inconsistent("RANK is not below WORLD_SIZE", values)
    if local_rank >= local_world_size:
        raise _inconsistent("LOCAL_RANK is not below LOCAL_WORLD_SIZE", values)
    if local_world_size > world_size or local_rank > rank:
        raise _inconsistent("a machine has more ranks than there are in all", values)
    if world_size > 1:
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise _inconsistent("MASTER_ADDR is not set", values)
        if not 0 < (parse_int(os.environ.get("MASTER_PORT", "")) or 0) <= _MAX_PORT:
            raise _inconsistent("MASTER_PORT is not the number of a port", values)
    return rank, world_size, local_rank, local_world_size


def _inconsistent(problem: str, values: Mapping[str, str]) -> WorldError:
    shown = " ".join(f"{name}={value[:20]!r}" for name, value in values.items())
    return WorldError(
        f"the environment has {shown}, but {problem}: expected all variables that torchrun sets for a rank. Start the "
        f"ranks with torchrun, or, to train in one process, run: unset {' '.join(values)}"
    )


def _check_other_launchers(world_size: int) -> None:
    """Raises WorldError if another launcher started more processes than torchrun's variables announce.

    Each of them would train the whole run alone. Variables that announce a number but no rank are left over.
    """
    for launcher, (rank_variable, size_variable) in _OTHER_LAUNCHERS.items():
        rank, size = (parse_int(os.environ.get(name, "")) for name in (rank_variable, size_variable))
        if rank is not None and size is not None and rank < size and size > world_size:
            raise WorldError(
                f"{launcher} started {size} processes ({rank_variable}={rank}, {size_variable}={size}), but the world "
                f"size of this run is {world_size}, so each process would train alone. Start them with torchrun, or "
                f"under SLURM with slurm/train.sh; if the variables are left over from another program: "
                f"unset {rank_variable}"
            )
    # accelerate launch --cpu --num_processes 2 sets MASTER_PORT and starts one process.
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ and not has_rank_variables():
        raise WorldError(
            "accelerate launch was asked for several processes (MASTER_PORT is set), but started one, as it does with "
            "--cpu. Use torchrun --nproc_per_node N, or accelerate launch --config_file "
            "launch/accelerate/multi_cpu.yaml --num_processes N; if MASTER_PORT is left over from another "
            "program: unset MASTER_PORT"
        )


def without_launchers(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment without the variables that tell a process of torchrun, Accelerate, MPI or srun its rank.

    Variables of a SLURM job that say nothing about a rank, such as SLURM_JOB_END_TIME, stay.
    """
    return {
        name: value
        for name, value in environment.items()
        if not (_is_foreign(name) or name in _TORCHRUN_NAMES or name.startswith(_TORCHRUN_PREFIXES))
    }


def remove_other_launchers() -> None:
    """Removes all variables from this process that Accelerate would read in place of our settings and torchrun's."""
    for name in [name for name in os.environ if _is_foreign(name)]:
        del os.environ[name]
    if read_environment().world_size == 1:  # Accelerate would form a group of one, and look for its MASTER_ADDR
        for name in _RANK_VARIABLES:
            os.environ.pop(name, None)


def _is_foreign(name: str) -> bool:
    return name in _FOREIGN_NAMES or name.startswith(_FOREIGN_PREFIXES)


def store_address() -> tuple[str, int]:
    """Returns host and port of the store in which the ranks meet."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _read_int("MASTER_PORT", 0)


def available_cores() -> int:
    """Returns the number of cores that this process may use, at most the SLURM job's share of the node."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _read_int("SLURM_CPUS_ON_NODE", usable) or usable)  # SLURM need not enforce its share


def _read_int(variable: str, default: int) -> int:
    number = parse_int(os.environ.get(variable, ""))
    return default if number is None else number


def parse_int(text: str) -> int | None:
    """Returns the number that a launcher would write; None for any other text."""
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None
