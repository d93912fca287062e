"""Counts the cores and GPUs of this machine without importing torch, which takes 2 s."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# The folder that contains trainer/ and launch/: a checkout, or site-packages.
INSTALL_ROOT = Path(__file__).resolve().parent.parent
_NVIDIA_SMI_TIMEOUT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware and the installation that a launch plan uses."""

    cores: int
    """cores that this process may use"""
    gpus: int
    """GPUs that torch will see"""
    python: str = sys.executable
    install_root: Path = INSTALL_ROOT

    @property
    def trainer(self) -> str:
        """Returns the path of the script that each rank runs."""
        return str(self.install_root / "trainer" / "main.py")

    @property
    def elastic(self) -> str:
        """Returns the path of the script that runs torchrun."""
        return str(self.install_root / "launch" / "elastic.py")

    @property
    def launcher(self) -> str:
        """Returns the path of the script that runs samecurve commands."""
        return str(self.install_root / "launch" / "main.py")


def this_machine() -> Machine:
    """Returns the cores and GPUs that this process may use."""
    from trainer.distributed.environment import available_cores

    return Machine(available_cores(), visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()))


def installed_gpus() -> int:
    """Returns the number of GPUs that the NVIDIA driver of this machine knows; 0 without a driver."""
    driver_folder = Path("/proc/driver/nvidia/gpus")
    if driver_folder.is_dir():
        return sum(1 for _ in driver_folder.iterdir())
    nvidia_smi = shutil.which("nvidia-smi")  # under WSL the driver belongs to Windows and has no such folder
    if nvidia_smi is None:
        return 0
    try:
        result = subprocess.run(
            [nvidia_smi, "-L"], capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in result.stdout.splitlines())


def visible_gpus(visible_devices: str | None, installed: int) -> int:
    """Returns the number of GPUs that CUDA_VISIBLE_DEVICES leaves visible; CUDA ignores all after an invalid entry.

    visible_devices: the value of CUDA_VISIBLE_DEVICES; None if it is not set.
    """
    if visible_devices is None:
        return installed
    count = 0
    for entry in visible_devices.split(","):
        entry = entry.strip()
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= installed):
            break
        count += 1
    return min(count, installed)
