"""A real SLURM cluster of several nodes on this machine, for tests: jobs submitted, watched, disturbed."""

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

SCRIPT = REPOSITORY / "tests" / "slurm" / "cluster.sh"
TRAIN = str(REPOSITORY / "slurm" / "train.sh")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")


def why_not() -> str:
    """What is missing here for a cluster, or nothing."""
    if os.geteuid():
        return "needs root, for network and process namespaces"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None]
    if missing:
        packages = "slurmctld slurmd slurm-client munge iproute2 util-linux"
        return f"no {', '.join(missing)} here; on Debian: apt-get install -y --no-install-recommends {packages}"
    return ""


class Cluster:
    def __init__(self, place: Path) -> None:
        self.place = place
        # Inside a job only what is given here is known: no user's keys, and the same Python.
        self.env = {
            "PATH": f"{place}/bin:{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin",
            "SLURM_CONF": str(place / "slurm.conf"),
            "HOME": str(place),
            "SAMECURVE_HOME": str(REPOSITORY),
        }

    def script(self, *words: str, timeout_seconds: float = 60) -> str:
        done = subprocess.run(
            ["bash", str(SCRIPT), words[0], str(self.place), *words[1:]],
            capture_output=True, text=True, timeout=timeout_seconds, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def call(self, *argv: str, code: int | None = 0, timeout_seconds: float = 60, **env: str) -> str:
        """Runs a command as a user on the login node would; what it printed. code: None if any will do."""
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout_seconds, env=self.env | env, check=False
        )
        assert code in (None, done.returncode), f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def train(self, *options: str, settings: tuple[str, ...], **env: str) -> str:
        """Submits slurm/train.sh, as one would in the folder where the test is; its job id."""
        output = f"--output={self.place}/out-%j.log"
        return self.call("sbatch", "--parsable", output, *options, TRAIN, *settings, **env).strip()

    def state(self, job: str) -> str:
        """RUNNING, PENDING, COMPLETED, FAILED, TIMEOUT, CANCELLED and so on."""
        match = re.search(r"JobState=(\S+)", self.call("scontrol", "show", "job", job))
        assert match is not None
        return match[1]

    def until(self, what: str, ready: Callable[[], object], timeout_seconds: float = 240) -> None:
        until = time.monotonic() + timeout_seconds
        while not ready():
            assert time.monotonic() < until, f"{what} was not seen\n{self.logs()}"
            time.sleep(0.2)

    def until_over(self, job: str, timeout_seconds: float = 360) -> str:
        """Waits until a job has left the queue; its last state."""
        over = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED")
        self.until(f"the end of job {job}", lambda: self.state(job) in over, timeout_seconds)
        return self.state(job)

    def log(self, job: str) -> str:
        """What a job has said."""
        return (self.place / f"out-{job}.log").read_text()

    def logs(self) -> str:
        """The same of all jobs, for an assertion that fails."""
        return "\n".join(f"== {path}\n{path.read_text()[-6000:]}" for path in sorted(self.place.glob("out-*.log")))


@contextlib.contextmanager
def started(nodes: int, *options: str) -> Iterator[Cluster]:
    """A cluster that is up; it and all its jobs are gone afterwards."""
    if problem := why_not():
        pytest.skip(f"a real SLURM cluster: {problem}")
    place = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))  # short: its sockets' paths have a limit
    cluster = Cluster(place)
    try:
        cluster.script("start", "--nodes", str(nodes), *options)
        yield cluster
    finally:
        subprocess.run(["bash", str(SCRIPT), "stop", str(place)], capture_output=True, timeout=60, check=False)
        shutil.rmtree(place, ignore_errors=True)


QUICK = ("log.wandb=off", "log.tensorboard=false", "train.threads_per_rank=1", "log.every_steps=1")
