"""Starts real processes with a time limit: ranks, launchers and the samecurve command."""

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

# `accelerate launch` in the Python that runs the tests.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]

# The smallest run: scikit-learn's digits, without trackers and figures.
SMALL = ["--config", "digits", "log.wandb=off", "log.tensorboard=false", "log.figures=false", "train.precision=fp32"]

# A run that a test interrupts. Its length must not end it earlier, and must not affect its learning rates.
ENDLESS = ["train.epochs=99999", "train.max_steps=99999"]

_PORTS = itertools.count(os.getpid())


@dataclass(frozen=True)
class CommandResult:
    """The exit code of a command, its stdout and its stderr."""

    code: int
    out: str
    err: str


class Ranks:
    """Starts the ranks of a run by forking a process that has already imported torch and the trainer.

    A new Python process would import for six seconds.
    """

    def __init__(self, folder: Path) -> None:
        """folder: working folder of the ranks and place of their logs."""
        self._folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["support.forked"])
        tests_folder = str(Path(__file__).parents[1])
        with pytest.MonkeyPatch.context() as monkeypatch:
            # Python 3.11's fork server finds the preloaded module only by PYTHONPATH, and ignores a failed import.
            monkeypatch.setenv("PYTHONPATH", tests_folder)
            multiprocessing.forkserver.ensure_running()
        self.processes: list[Any] = []
        self._num_launches = 0

    def start(self, size: int, *argv: str, fault: str = "tiny", **env: str) -> list[Any]:
        """Starts `size` ranks of trainer/main.py and returns their processes.

        argv: arguments of trainer/main.py.
        fault: a key of support.forked.FAULTS, applied to the trainer first; "tiny" only makes the network small.
        """
        from support import forked

        return self.call(size, forked.run_rank, list(argv), fault, **env)

    def call(self, size: int, work: Callable[..., object], *arguments: object, **env: str) -> list[Any]:
        """Starts `size` ranks of `work(environment, log, *arguments)`, a module-level function."""
        self._num_launches += 1
        self.log = self._folder / f"ranks-{self._num_launches}.log"
        group_env = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group_env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = []
        for rank in range(size):
            rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | group_env if size > 1 else {}
            work_arguments = (os.environ | {"OMP_NUM_THREADS": "1"} | rank_env | env, str(self.log), *arguments)
            processes.append(self._context.Process(target=work, args=work_arguments))
            processes[-1].start()
        self.processes += processes
        return processes

    def wait_until(self, event: str, condition: Callable[[], object], timeout_seconds: float = 150) -> None:
        """Waits until `condition()` is true. event: names it in the error message."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"timeout after {timeout_seconds} s: {event}\n{self.log.read_text()}")
            time.sleep(0.002)

    def wait_for_step(self, folder: Path, step: int, timeout_seconds: float = 150) -> None:
        """Waits until metrics.jsonl in the run folder has a row of this step or a later one."""
        self.wait_until(f"a row of step {step}", lambda: last_step(folder) >= step, timeout_seconds)

    def join(self, processes: list[Any], timeout_seconds: float = 180) -> list[int | None]:
        """Waits for the ranks and returns their exit codes; None for a rank that still runs after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in processes]

    def run(self, size: int, *argv: str, fault: str = "tiny", code: int = 0, **env: str) -> str:
        """Runs `size` ranks to their end, checks that all exit codes are `code`, and returns their output."""
        codes = self.join(self.start(size, *argv, fault=fault, **env))
        output = self.log.read_text()
        assert codes == [code] * size, f"{codes}\n{output}"
        return output


class Samecurve:
    """Runs samecurve commands in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        """Runs a command, checks its exit code, and returns its stdout and stderr."""
        self._capfd.readouterr()
        assert launcher.main(words) == code
        return self._capfd.readouterr()


def last_step(folder: Path) -> int:
    """Returns the last step that has a complete row in metrics.jsonl, or 0."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def signal_all(processes: list[Any], number: signal.Signals) -> None:
    """Sends a signal to several ranks.

    Halts all ranks first, so that no rank sees the end of another before it gets its own signal.
    """
    for sent_signal in (signal.SIGSTOP, number, *([] if number == signal.SIGKILL else [signal.SIGCONT])):
        for process in processes:
            os.kill(process.pid, sent_signal)


def finished_run(root: Path, *settings: str) -> Path:
    """Trains on the digits with one thread and returns the run folder; meant for all tests of a file."""
    command = [sys.executable, MAIN, *SMALL, "train.threads_per_rank=1", "run.name=x", f"run.root={root}", *settings]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return next(path.parent for path in root.rglob("summary.json"))


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Returns the command that starts `ranks` processes of a script on this machine, on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


def free_port() -> int:
    """Returns a free port from the share of this pytest worker in the ports 12000 to 31999.

    Linux gives ports from 32768 on to outgoing connections.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    ports_per_worker = 20_000 // max(worker + 1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    while True:
        port = 12_000 + worker * ports_per_worker + next(_PORTS) % ports_per_worker
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
