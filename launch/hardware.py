"""This machine in, its cores and GPUs out; no torch, so that it takes no time."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

INSTALL_ROOT = Path(__file__).resolve().parent.parent
_LOOK_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for."""

    cores: int
    """that this process may use"""
    gpus: int
    """that torch will see"""
    python: str = sys.executable
    repository: Path = INSTALL_ROOT

    @property
    def trainer(self) -> str:
        """The script that each rank runs."""
        return str(self.repository / "trainer" / "main.py")


def this_machine() -> Machine:
    """This machine."""
    from trainer.distributed.environment import available_cores

    return Machine(available_cores(), visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()))


def installed_gpus() -> int:
    """GPUs that the driver of this machine has."""
    known = Path("/proc/driver/nvidia/gpus")
    if known.is_dir():
        return sum(1 for _ in known.iterdir())
    tool = shutil.which("nvidia-smi")  # where the driver is another system's, as under WSL
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=_LOOK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def visible_gpus(asked: str | None, installed: int) -> int:
    """How many are left by CUDA_VISIBLE_DEVICES, which counts up to its first invalid entry."""
    if asked is None:
        return installed
    count = 0
    for entry in asked.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= installed):
            break
        count += 1
    return min(count, installed)
