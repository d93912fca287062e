"""Reads the rank, the world size and the usable cores from the environment. Imports no torch, so errors come early.

torchrun and `accelerate launch` set RANK and related variables; a process that a user starts alone has none of them.
"""

import os
from dataclasses import dataclass

# Launchers announce the number of processes in these variables. A smaller process group means that it did not form.
_WORLD_SIZE_VARIABLES = (
    "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """A process's place among the ranks, according to its launcher."""

    rank: int
    local_rank: int
    local_world_size: int
    announced_world_size: int
    """largest number of processes that any launcher's variable announces; 1 without a launcher"""
    is_launch_incomplete: bool
    """MASTER_PORT without RANK: `accelerate launch --cpu --num_processes 2` sets this and starts one process"""
    has_launcher_store: bool
    """the ranks meet in the launcher's store, which may hold entries of earlier attempts"""
    restarts_left: int
    """number of times that the launcher will still restart the ranks after a failure"""


def read_environment() -> RankEnvironment:
    """Returns the rank environment of the calling process."""
    restart_count = _read_int("TORCHELASTIC_RESTART_COUNT", 0)
    return RankEnvironment(
        rank=_read_int("RANK", 0),
        local_rank=_read_int("LOCAL_RANK", 0),
        local_world_size=_read_int("LOCAL_WORLD_SIZE", 1),
        announced_world_size=max(_read_int(name, 1) for name in _WORLD_SIZE_VARIABLES),
        is_launch_incomplete="MASTER_PORT" in os.environ and "RANK" not in os.environ,
        has_launcher_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts_left=max(0, _read_int("TORCHELASTIC_MAX_RESTARTS", 0) - restart_count),
    )


def store_address() -> tuple[str, int]:
    """Returns host and port of the store in which the ranks meet."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _read_int("MASTER_PORT", 0)


def available_cores() -> int:
    """Returns the number of cores that this process may use, at most the SLURM job's share of the node."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, _read_int("SLURM_CPUS_ON_NODE", usable) or usable)  # SLURM need not enforce its share


def _read_int(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else default
