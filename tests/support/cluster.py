"""Starts a real SLURM cluster of several nodes on this machine, submits jobs to it and disturbs them."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import REPOSITORY

CLUSTER_SCRIPT = REPOSITORY / "tests" / "support" / "cluster.sh"
TRAIN_SCRIPT = str(REPOSITORY / "slurm" / "train.sh")
QUICK = ("log.wandb=off", "log.tensorboard=false", "train.threads_per_rank=1", "log.every_steps=1")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")


def missing_requirement() -> str:
    """Returns what this machine lacks for a cluster, or an empty string."""
    if os.geteuid():
        return "needs root, for network and process namespaces"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge iproute2 util-linux"
        return f"no {', '.join(missing)} here; on Debian: apt-get install -y --no-install-recommends {packages}"
    return ""


class Cluster:
    """A running cluster with the nodes n1, n2, ..."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A job inherits only these variables: none of the user's keys, and this Python.
        self.env = {
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin",
            "SLURM_CONF": str(folder / "slurm.conf"),
            "HOME": str(folder),
        }

    def control(self, command: str, *arguments: str, timeout_seconds: float = 60) -> str:
        """Runs a command of cluster.sh, such as kill-node, and returns its stdout."""
        completed = subprocess.run(
            ["bash", str(CLUSTER_SCRIPT), command, str(self.folder), *arguments],
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
        assert completed.returncode == 0, completed.stdout + completed.stderr
        return completed.stdout

    def call(self, *argv: str, code: int | None = 0, timeout_seconds: float = 60, **env: str) -> str:
        """Runs a command like a user on the login node, and returns its stdout and stderr.

        code: the expected exit code; None: any.
        """
        completed = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_seconds, env=self.env | env, check=False
        )
        assert code in (None, completed.returncode), (
            f"{argv}: {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
        )
        return completed.stdout + completed.stderr

    def train(self, *options: str, settings: tuple[str, ...], **env: str) -> str:
        """Submits slurm/train.sh from the current folder with options of sbatch, and returns the job id."""
        output = f"--output={self.folder}/out-%j.log"
        return self.call("sbatch", "--parsable", output, *options, TRAIN_SCRIPT, *settings, **env).strip()

    def state(self, job: str) -> str:
        """Returns RUNNING, PENDING, COMPLETED, FAILED, TIMEOUT, CANCELLED, ..."""
        match = re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def wait_for(self, event: str, has_happened: Callable[[], object], timeout_seconds: float = 240) -> None:
        """Waits for an event and fails with the logs of all jobs when it does not happen in time."""
        deadline = time.monotonic() + timeout_seconds
        while not has_happened():
            assert time.monotonic() < deadline, f"{event} did not happen\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_end(self, job: str, timeout_seconds: float = 360) -> str:
        """Waits until a job has left the queue, and returns its last state."""
        end_states = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        self.wait_for(f"the end of job {job}", lambda: self.state(job) in end_states, timeout_seconds)
        return self.state(job)

    def log(self, job: str) -> str:
        """Returns the output of a job."""
        return (self.folder / f"out-{job}.log").read_text()

    def logs(self) -> str:
        """Returns the end of each job's output, for the message of a failed assertion."""
        return "\n".join(f"== {path}\n{path.read_text()[-6000:]}" for path in sorted(self.folder.glob("out-*.log")))


@contextlib.contextmanager
def running_cluster(nodes: int, *options: str) -> Iterator[Cluster]:
    """Starts a cluster and stops it afterwards with all its jobs. options: of cluster.sh."""
    if problem := missing_requirement():
        pytest.skip(f"a real SLURM cluster: {problem}")
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short, as the paths of its sockets have a limit
    cluster = Cluster(folder)
    try:
        cluster.control("start", "--nodes", str(nodes), *options)
        yield cluster
    finally:
        subprocess.run(["bash", str(CLUSTER_SCRIPT), "stop", str(folder)], capture_output=True, timeout=60, check=False)
        shutil.rmtree(folder, ignore_errors=True)
