"""What one node has: versions, GPUs, clock, room, limits, data, run folder, W&B. Measures, judges nothing; no torch.

Needs nothing but the standard library, so that it works where the rest of the installation is broken.
"""

import importlib.metadata
import netrc
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.doctor.node.reach import can_connect
from launch.hardware import installed_gpus, visible_gpus
from trainer.distributed.environment import available_cores

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "omegaconf", "safetensors", "pillow", "scikit-learn")
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta")
CIFAR10_SERVER = "www.cs.toronto.edu"
_TOOL_SECONDS = 10.0


def collect(request: Mapping[str, Any]) -> dict[str, Any]:
    """request: what launch/doctor/command.py asks; paths are absolute. Sizes in bytes, clock in seconds since 1970."""
    facts: dict[str, Any] = {
        "name": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "versions": versions(),
        "torchvision_wants": wants("torchvision", "torch"),
        "gpus_installed": installed_gpus(),
        "gpus": visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()),
        "cores": available_cores(),
        "limits": limits(),
        "shm": room(Path("/dev/shm")),
        "room": {"run folder": room(existing(Path(request["run_folder"]))), "temp": room(Path(tempfile.gettempdir()))},
        "writable": write_problem(Path(request["run_folder"])),
        "data": data_problem(request["data"]),
        "wandb": wandb(request["wandb_server"]) if request["wandb_server"] else None,
    }
    if facts["gpus_installed"]:
        facts["topology"] = topology()
    facts["clock"] = time.time()  # last: whoever reads this compares it with his own
    return facts


def versions() -> dict[str, str | None]:
    """Python's and the packages', read from their files: an import of torch may fail, and takes seconds."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def wants(package: str, other: str) -> str:
    """The exact version of another package that one was built for, such as 2.15.0; empty when it names none."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for line in lines:
        name, equals, version = line.partition("==")
        if equals and name.strip(" (") == other:
            return version.partition(";")[0].strip(" )")
    return ""


def limits() -> dict[str, int]:
    """The soft ones; -1: none."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
    return {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}


def room(path: Path) -> dict[str, Any] | None:
    """Size and free bytes of the file system; None where there is no such folder."""
    try:
        found = shutil.disk_usage(path)
    except OSError:
        return None
    return {"path": str(path), "total": found.total, "free": found.free}


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next((place for place in (path, *path.parents) if place.is_dir()), Path("/"))


def write_problem(folder: Path) -> str:
    """Why no file can be made where the run folder is or will be; empty when it can."""
    place = existing(folder)
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            file.write(b"samecurve doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


def data_problem(data: Mapping[str, Any]) -> dict[str, str]:
    """`problem` (empty: well), `found` in words, `server` that a download needs and does not reach."""
    root = Path(data["root"])
    if data["name"] == "digits":
        try:
            return {"problem": "", "found": f"digits of scikit-learn {importlib.metadata.version('scikit-learn')}"}
        except importlib.metadata.PackageNotFoundError:
            return {"problem": "scikit-learn, which holds the digits, is not installed", "found": ""}
    try:
        found = _cifar10(root) if data["name"] == "cifar10" else _image_folder(root)
    except OSError as error:
        problem = f"{error.filename or root}: {error.strerror}"
        if data["name"] == "cifar10" and data["download"] and isinstance(error, FileNotFoundError):
            return {
                "problem": problem,
                "found": "",
                "server": CIFAR10_SERVER,
                "closed": can_connect(CIFAR10_SERVER, 443),
            }
        return {"problem": problem, "found": ""}
    return {"problem": "", "found": found}


def _cifar10(root: Path) -> str:
    for name in CIFAR10_FILES:
        with (root / CIFAR10_FOLDER / name).open("rb") as file:
            file.read(1)
    return f"{len(CIFAR10_FILES)} files in {root / CIFAR10_FOLDER}"


def _image_folder(root: Path) -> str:
    """Looks at the names of the classes and opens the first image of each split: a whole walk may take minutes."""
    classes = {}
    for split in ("train", "test"):
        folders = sorted(entry for entry in (root / split).iterdir() if entry.is_dir() and entry.name[0] != ".")
        classes[split] = [entry.name for entry in folders]
        first = next((file for folder in folders for file in folder.rglob("*") if file.is_file()), None)
        if first is None:
            raise FileNotFoundError(2, "no class folders with images", str(root / split))
        with first.open("rb") as file:
            file.read(1)
    return f"{len(classes['train'])} classes in {root}/train, {len(classes['test'])} in test"


def wandb(server: str) -> dict[str, Any]:
    """Whether there is a key, never which; why the server, or the proxy before it, cannot be reached."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = urllib.parse.urlsplit(proxy or server)
    port = address.port or (443 if address.scheme == "https" else 80)
    host = urllib.parse.urlsplit(server).hostname or ""
    return {"key": _has_key(host), "closed": can_connect(address.hostname or "", port), "host": address.hostname or ""}


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def topology() -> list[list[str]]:
    """How each GPU is linked with each other one, as `nvidia-smi topo -m` names it: NV18, PIX, SYS; empty: unknown."""
    try:
        shown = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return read_topology(shown.stdout)


def read_topology(text: str) -> list[list[str]]:
    """The GPUs' part of that table."""
    rows = [line.split() for line in text.splitlines() if line.startswith("GPU") and len(line.split()) > 1]
    rows = [row for row in rows if row[1] == "X" or not row[1].startswith("GPU")]  # not the heading
    return [row[1 : len(rows) + 1] for row in rows]
