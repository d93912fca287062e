"""What the launcher and the system give this process: rank, local rank, sizes, cores. No torch: errors are early.

torchrun and `accelerate launch` set RANK and its kin; a process started alone has none of them.
"""

import os
from dataclasses import dataclass

# A launcher that started several processes says how many in one of these; what it means if the group is smaller.
_ANNOUNCED_SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    rank: int
    local_rank: int
    local_world_size: int
    announced_world_size: int
    """The largest number of processes that any launcher says it started; 1 when none says anything."""
    lost_siblings: bool
    """MASTER_PORT without RANK: `accelerate launch --cpu --num_processes 2` sets one and starts one process."""
    keeps_store: bool
    """Whether the ranks meet in a store of the launcher's, which may hold what earlier ones left there."""
    restarts_left: int
    """How often the launcher will start the ranks again when one of them fails."""


def read_environment() -> RankEnvironment:
    """The calling process's place among its siblings, as its launcher tells it."""
    restart = _number("TORCHELASTIC_RESTART_COUNT", 0)
    return RankEnvironment(
        rank=_number("RANK", 0),
        local_rank=_number("LOCAL_RANK", 0),
        local_world_size=_number("LOCAL_WORLD_SIZE", 1),
        announced_world_size=max(_number(name, 1) for name in _ANNOUNCED_SIZES),
        lost_siblings="MASTER_PORT" in os.environ and "RANK" not in os.environ,
        keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts_left=max(0, _number("TORCHELASTIC_MAX_RESTARTS", 0) - restart),
    )


def store_address() -> tuple[str, int]:
    """Host and port of the store where the ranks met."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), _number("MASTER_PORT", 0)


def available_cores() -> int:
    """Cores this process may use, not those the machine has; in a SLURM job its share, enforced or not."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(mine, _number("SLURM_CPUS_ON_NODE", mine) or mine)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default
