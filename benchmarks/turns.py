"""Times training loops that take turns on one machine, so that other load on it slows all of them alike.

Each contestant is a process. One contestant at a time takes some steps, then blocks until its next turn; each measures
its own steps with its own clock. The ratio of two contestants is computed in each round, and its median is reported.
"""

import contextlib
import json
import os
import select
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

_START_VARIABLE, _DONE_VARIABLE = "SAMECURVE_TURNS_GO", "SAMECURVE_TURNS_DONE"  # file descriptors of two pipes
_TURN_TIMEOUT_SECONDS = 1200.0
_EXIT_TIMEOUT_SECONDS = 10.0
_LONGEST_OUTPUT = 4000  # characters of a failed contestant's output that are quoted


class Turn:
    """The contestant's side: call it after each step; at the end of a turn it blocks until the next turn."""

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        """synchronize: waits until the device has finished the steps."""
        self._synchronize = synchronize
        self._start_pipe, self._done_pipe = int(os.environ[_START_VARIABLE]), int(os.environ[_DONE_VARIABLE])
        self._steps_left, self._start = 0, 0.0

    def begin(self) -> None:
        """Blocks until the first turn. Call it once, immediately before the first step."""
        self._wait()

    def __call__(self) -> None:
        self._steps_left -= 1
        if self._steps_left == 0:
            self._synchronize()
            os.write(self._done_pipe, f"{perf_counter() - self._start}\n".encode())
            self._wait()

    def _wait(self) -> None:
        num_steps = os.read(self._start_pipe, 16)
        if not num_steps:  # the benchmark has closed the pipe: the race is over
            os._exit(0)
        self._steps_left, self._start = int(num_steps), perf_counter()


@dataclass
class Contestant:
    """A program that uses Turn in its training loop."""

    name: str
    argv: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    """seconds for one step, for each round"""

    def start(self) -> None:
        """Starts the process."""
        start_read, self._start_pipe = os.pipe()
        self._done_pipe, done_write = os.pipe()
        pipes = {_START_VARIABLE: str(start_read), _DONE_VARIABLE: str(done_write)}
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (end() closes it)
        # The contestant leaves by os._exit and does not remove its temporary files: end() does.
        self._temporary_folder = tempfile.TemporaryDirectory(prefix="samecurve-turns-")
        self._process = subprocess.Popen(
            self.argv,
            env=os.environ | self.environment | {"TMPDIR": self._temporary_folder.name} | pipes,
            pass_fds=(start_read, done_write),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(start_read)
        os.close(done_write)

    def take_turn(self, steps: int, timeout_seconds: float = _TURN_TIMEOUT_SECONDS) -> float:
        """Lets the process take `steps` steps. Returns the seconds for one step.

        Raises RuntimeError, with the end of the process's output, if it has ended or does not finish in time.
        """
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which select() reports below
            os.write(self._start_pipe, str(steps).encode())
        ready, _, _ = select.select([self._done_pipe], [], [], timeout_seconds)
        seconds = os.read(self._done_pipe, 64) if ready else b""
        if not seconds:
            self._output.seek(0)
            output = self._output.read().decode(errors="replace")[-_LONGEST_OUTPUT:]
            raise RuntimeError(f"{self.name}: the contestant did not finish its turn; its output ends with\n{output}")
        return float(seconds) / steps

    def end(self) -> None:
        """Ends the process and removes its temporary files."""
        os.close(self._start_pipe)
        try:
            self._process.wait(_EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._done_pipe)
        self._output.close()
        self._temporary_folder.cleanup()


def race(contestants: Sequence[Contestant], rounds: int, steps: int, warmup_steps: int) -> None:
    """Measures the contestants and appends each round to step_seconds. Every second round runs in reverse order."""
    started: list[Contestant] = []
    try:
        for contestant in contestants:
            contestant.start()
            started.append(contestant)
            contestant.take_turn(warmup_steps)  # waits until it is ready: the start of one would slow another
        for index in range(rounds):
            for contestant in contestants[:: -1 if index % 2 else 1]:
                contestant.step_seconds.append(contestant.take_turn(steps))
    finally:
        for contestant in started:
            contestant.end()


def speed_ratio(contestant: Contestant, baseline: Contestant) -> float:
    """Returns how many times as fast as the baseline a contestant is: the median over the rounds."""
    return statistics.median(
        baseline_seconds / seconds
        for seconds, baseline_seconds in zip(contestant.step_seconds, baseline.step_seconds, strict=True)
    )


def free_port() -> int:
    """Returns a TCP port on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def contestant_command(name: str, settings: dict[str, Any]) -> list[str]:
    """Returns the command that starts contestants/NAME.py with these settings."""
    return [sys.executable, str(Path(__file__).parent / "contestants" / f"{name}.py"), json.dumps(settings)]
