"""Real processes with a time limit: ranks, launchers, the samecurve command."""

import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch import main as launcher

REPOSITORY = Path(__file__).resolve().parents[2]


MAIN = str(REPOSITORY / "trainer" / "main.py")


# What `accelerate launch` is, by the Python that runs the tests.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]


# A run as small as a run can be: real digits, no trackers of others.
SMALL = ["--config", "digits", "log.wandb=off", "log.tensorboard=false", "log.figures=false", "train.precision=fp32"]


# A run that is met in its middle has no end until then; its rates must not depend on its length.
ENDLESS = ["train.epochs=99999", "train.max_steps=99999"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Ranks:
    """Real ranks of one run, forked from a process that has imported everything: a start takes no six seconds."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["support.forked"])
        here = str(Path(__file__).parents[1])
        with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server looks nowhere else, and says nothing
            patch.setenv("PYTHONPATH", here)
            multiprocessing.forkserver.ensure_running()
        self.processes: list[Any] = []
        self._launches = 0

    def start(self, size: int, *argv: str, plant: str = "tiny", **env: str) -> list[Any]:
        """The ranks' processes, under way."""
        from support import forked

        return self.call(size, forked.run_rank, list(argv), plant, **env)

    def call(self, size: int, work: Callable[..., object], *arguments: object, **env: str) -> list[Any]:
        """The same for `work(environment, log, *arguments)`, a function of a module."""
        self._launches += 1
        self.log = self._place / f"ranks-{self._launches}.log"
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (group if size > 1 else {})
            own = {"OMP_NUM_THREADS": "1"} if size == 1 else own
            given = (os.environ | own | env, str(self.log), *arguments)
            started.append(self._context.Process(target=work, args=given))
            started[-1].start()
        self.processes += started
        return started

    def until(self, what: str, ready: Callable[[], object], timeout_seconds: float = 150) -> None:
        """Waits until something is so."""
        until = time.monotonic() + timeout_seconds
        while not ready():
            if time.monotonic() > until:
                raise AssertionError(f"{what} was not seen\n{self.log.read_text()}")
            time.sleep(0.002)

    def until_step(self, folder: Path, step: int, timeout_seconds: float = 150) -> None:
        """Waits until a run has written a line of metrics of that step, or of a later one."""
        self.until(f"step {step}", lambda: last_step(folder) >= step, timeout_seconds)

    def end(self, started: list[Any], timeout_seconds: float = 180) -> list[int | None]:
        """Their exit codes; None for one that is still there after the time."""
        until = time.monotonic() + timeout_seconds
        for process in started:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in started]

    def run(self, size: int, *argv: str, plant: str = "tiny", code: int = 0, **env: str) -> str:
        """All of them to their end, with the exit code that is expected; what they printed."""
        codes = self.end(self.start(size, *argv, plant=plant, **env))
        text = self.log.read_text()
        assert codes == [code] * size, f"{codes}\n{text}"
        return text


class Samecurve:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        """What the command printed: to whoever reads on, and to the person."""
        self._capfd.readouterr()
        assert launcher.main(words) == code
        return self._capfd.readouterr()


def last_step(folder: Path) -> int:
    """The last step that has a whole line of metrics, 0 if none has."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def tell(processes: list[Any], number: signal.Signals) -> None:
    """A signal for several ranks. All are halted first, so that none sees another's end before it has its own."""
    for sent in (signal.SIGSTOP, number, *([] if number == signal.SIGKILL else [signal.SIGCONT])):
        for process in processes:
            os.kill(process.pid, sent)


def finished_run(root: Path, *settings: str) -> Path:
    """A real run on real digits, by one thread, for all tests of a file."""
    command = [sys.executable, MAIN, *SMALL, "train.threads_per_rank=1", "run.name=x", f"run.root={root}", *settings]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return next(path.parent for path in root.rglob("summary.json"))


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command that starts `ranks` processes of a script on this machine, at a port of their own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


_PORTS = itertools.count(os.getpid())


def free_port() -> int:
    """One of this worker of pytest, and none of those from 32768 on, which any connection may be given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 12000 + worker % 4 * 4000 + next(_PORTS) % 4000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
