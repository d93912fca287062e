"""Collects the facts of one node: versions, GPUs, clock, disk, limits, data set, run folder and W&B. Judges nothing.

Imports only the standard library and modules that need nothing else, so that it works in a broken installation. The one
exception is wandb, which knows its server: a broken one is a fact.
"""

import fcntl
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.doctor.node.reach import connection_problem
from launch.hardware import installed_gpus, visible_gpus
from trainer.data import cifar10_files
from trainer.distributed.environment import available_cores
from trainer.text.escape import one_line

PACKAGES = ("torch", "torchvision", "accelerate", "numpy", "omegaconf", "safetensors", "pillow", "scikit-learn")
_TOOL_SECONDS = 10.0
_LOOKUP_SECONDS = 5.0


def collect(request: Mapping[str, Any], is_first: bool) -> dict[str, Any]:
    """Returns the facts as values that JSON can represent.

    request: the run's needs from launch/doctor/command.py, with absolute paths. Sizes are in bytes, `clock` is in
    seconds since 1970. is_first: whether this is the node of rank 0, the only rank that connects to W&B.
    """
    run_folder = Path(request["run_folder"])
    facts: dict[str, Any] = {
        "name": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "versions": versions(),
        "torchvision_requires": exact_requirement("torchvision", "torch"),
        "gpus_installed": installed_gpus(),
        "gpus": visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), installed_gpus()),
        "cores": available_cores(),
        "limits": limits(),
        "shm": disk_space(Path("/dev/shm")),
        "disk": {
            "run folder": disk_space(nearest_folder(run_folder)),
            "temp": disk_space(Path(tempfile.gettempdir())),
        },
        "write_problem": write_problem(run_folder),
        "lock_problem": lock_problem(run_folder),
        "data": check_data(request["data"]),
        "own_name_problem": own_name_problem(),
        "wandb": wandb_access(request["wandb"]) if is_first and request["wandb"] in ("auto", "online") else None,
    }
    if facts["gpus_installed"]:
        facts["topology"] = topology()
    facts["clock"] = time.time()  # last, as the coordinator compares it with the time at which the reply arrives
    return facts


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and the packages, None for a missing one.

    Reads the metadata files: an import of torch takes seconds and may fail.
    """
    result: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result


def exact_requirement(package: str, dependency: str) -> str:
    """Returns the exact version of a dependency that a package requires, such as 2.15.0; empty if it pins none."""
    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        name, equals, version = requirement.partition("==")
        if equals and name.strip(" (") == dependency:
            return version.partition(";")[0].strip(" )")
    return ""


def limits() -> dict[str, int]:
    """Returns the soft resource limits of this process; -1: unlimited."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}
    return {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}


def disk_space(folder: Path) -> dict[str, Any] | None:
    """Returns path, total and free bytes of a folder's file system; None when the folder does not exist."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"path": str(folder), "total": usage.total, "free": usage.free}


def nearest_folder(path: Path) -> Path:
    """Returns the path itself if it is a folder, else its nearest parent that exists."""
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))


def write_problem(run_folder: Path) -> str:
    """Returns why no file can be created where the run folder is or will be; empty when it can."""
    folder = nearest_folder(run_folder)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"samecurve doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return ""


def lock_problem(run_folder: Path) -> str:
    """Returns why flock does not work where the run folder is or will be; empty when it works."""
    try:
        with tempfile.NamedTemporaryFile(dir=nearest_folder(run_folder), prefix=".doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def check_data(data: Mapping[str, Any]) -> dict[str, str]:
    """Looks for the data set on this node.

    Returns `problem` (empty: none) and `summary`. If a download can solve the problem, the result also has `server`,
    the host that it needs, and `server_problem`, why that host is unreachable (empty: reachable).
    """
    name, root = data["name"], Path(data["root"])
    if name not in ("digits", "cifar10", "image_folder"):  # only its own code knows where its files are
        return {"problem": "", "summary": f"not checked: the doctor does not know the files of {name}"}
    try:
        if name == "digits":
            return {"problem": "", "summary": f"digits of scikit-learn {importlib.metadata.version('scikit-learn')}"}
        return {"problem": "", "summary": _find_cifar10(root) if name == "cifar10" else _find_image_folder(root)}
    except importlib.metadata.PackageNotFoundError:
        return {"problem": "scikit-learn, which contains the digits, is not installed", "summary": ""}
    except OSError as error:
        result = {"problem": f"{error.filename or root}: {error.strerror}", "summary": ""}
        if name == "cifar10" and data["download"] and isinstance(error, FileNotFoundError):
            result |= {"server": cifar10_files.SERVER, "server_problem": connection_problem(cifar10_files.SERVER, 443)}
        return result


def _find_cifar10(root: Path) -> str:
    for name in cifar10_files.FILES:
        with (root / cifar10_files.FOLDER / name).open("rb") as file:
            file.read(1)
    return f"{len(cifar10_files.FILES)} files in {root / cifar10_files.FOLDER}"


def _find_image_folder(root: Path) -> str:
    """Lists the class folders and opens the first image of each split: a walk over all files may take minutes."""
    num_classes = {}
    for split in ("train", "test"):
        folders = sorted(entry for entry in (root / split).iterdir() if entry.is_dir() and entry.name[0] != ".")
        num_classes[split] = len(folders)
        first_file = next((file for folder in folders for file in folder.rglob("*") if file.is_file()), None)
        if first_file is None:
            raise FileNotFoundError(2, "no class folders with images", str(root / split))
        with first_file.open("rb") as file:
            file.read(1)
    return f"{num_classes['train']} classes in {root}/train, {num_classes['test']} in test"


def own_name_problem() -> str:
    """Returns which of this machine's own names cannot be resolved, and why; empty when both can."""
    problems: list[str] = []
    for name in dict.fromkeys((socket.gethostname(), "localhost")):
        thread = threading.Thread(target=_look_up, args=(name, problems), daemon=True)  # a lookup has no time limit
        thread.start()
        thread.join(_LOOKUP_SECONDS)
        if thread.is_alive():
            problems.append(f"{name}: no answer within {_LOOKUP_SECONDS:g} s")
    return ", ".join(problems)


def _look_up(name: str, problems: list[str]) -> None:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        problems.append(f"{name}: {getattr(error, 'strerror', None) or error}")


def wandb_access(mode: str) -> dict[str, Any]:
    """Returns `has_key` (never the key itself), the `server` that W&B's client uses, and `problem` if it is unusable.

    mode: auto or online.
    """
    from trainer.tracking import wandb_mode

    access = {"has_key": False, "server": "W&B"}
    try:
        if problem := wandb_mode.prepare_variables(mode):
            return access | {"has_key": True, "problem": problem}
        import wandb

        server = wandb_mode.server_url()
        wandb.teardown()
    except Exception as error:  # every error: a broken installation is a fact to report
        return access | {"has_key": True, "problem": f"wandb does not work ({type(error).__name__}: {one_line(error)})"}
    return {
        "has_key": wandb_mode.has_key(server),
        "server": server,
        "problem": wandb_mode.connection_problem(server),
    }


def topology() -> list[list[str]]:
    """Returns the link between each two GPUs as `nvidia-smi topo -m` names it (NV18, PIX, SYS); empty: unknown."""
    try:
        completed = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return parse_topology(completed.stdout)


def parse_topology(text: str) -> list[list[str]]:
    """Returns the GPU rows and columns of the table that `nvidia-smi topo -m` prints."""
    rows = [line.split() for line in text.splitlines() if line.startswith("GPU") and len(line.split()) > 1]
    rows = [row for row in rows if row[1] == "X" or not row[1].startswith("GPU")]  # not the heading
    return [row[1 : len(rows) + 1] for row in rows]
