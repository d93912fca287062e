"""Loops that take turns on one machine, so that what else happens on it falls on all of them alike.

Each contestant is a process of its own. One at a time takes some steps, then waits, in Python, until it is its turn
again; each is timed by its own clock, around its own steps. A ratio is that of two contestants in one round, and what
is reported is the median over the rounds.
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

_GO, _DONE = "SAMECURVE_TURNS_GO", "SAMECURVE_TURNS_DONE"
_FIRST_TURN_SECONDS, _TURN_SECONDS = 1200.0, 1200.0


class Turn:
    """In a contestant: called after each step, it returns at once, or when the next turn begins."""

    def __init__(self, synchronize: Callable[[], object] = lambda: None) -> None:
        """synchronize: waits for what is under way on a device."""
        self._synchronize = synchronize
        self._go, self._done = int(os.environ[_GO]), int(os.environ[_DONE])
        self._left, self._began = 0, 0.0

    def begin(self) -> None:
        """Called once when all is ready for the first step."""
        self._wait()

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._synchronize()
            os.write(self._done, f"{perf_counter() - self._began}\n".encode())
            self._wait()

    def _wait(self) -> None:
        word = os.read(self._go, 16)
        if not word:  # the benchmark is over
            os._exit(0)
        self._left, self._began = int(word), perf_counter()


@dataclass
class Contestant:
    """A program that makes its own Turn."""

    name: str
    argv: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """of each round, in one step"""

    def start(self) -> None:
        go, self._go = os.pipe()
        self._done, done = os.pipe()
        self._said = tempfile.TemporaryFile()
        self._place = tempfile.TemporaryDirectory(prefix="samecurve-turns-")  # it leaves without cleaning up
        self._process = subprocess.Popen(
            self.argv,
            env=os.environ | self.environment | {"TMPDIR": self._place.name, _GO: str(go), _DONE: str(done)},
            pass_fds=(go, done),
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
        )
        os.close(go)
        os.close(done)

    def turn(self, steps: int, timeout_seconds: float = _TURN_SECONDS) -> float:
        """Seconds of one of so many steps. Raises RuntimeError with what the program has said when it ends."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said is told below
            os.write(self._go, str(steps).encode())
        ready, _, _ = select.select([self._done], [], [], timeout_seconds)
        word = os.read(self._done, 64) if ready else b""
        if not word:
            self._said.seek(0)
            raise RuntimeError(f"{self.name}: no answer\n{self._said.read().decode(errors='replace')[-4000:]}")
        return float(word) / steps

    def end(self) -> None:
        os.close(self._go)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._done)
        self._said.close()
        self._place.cleanup()


def race(contestants: Sequence[Contestant], rounds: int, steps: int, warmup_steps: int) -> None:
    """Fills in the contestants' seconds. Every second round goes the other way about."""
    started: list[Contestant] = []
    try:
        for contestant in contestants:
            contestant.start()
            started.append(contestant)
            contestant.turn(warmup_steps, _FIRST_TURN_SECONDS)  # one after the other: starting is work too
        for index in range(rounds):
            for contestant in contestants[:: -1 if index % 2 else 1]:
                contestant.seconds.append(contestant.turn(steps))
    finally:
        for contestant in started:
            contestant.end()


def speed_ratio(contestant: Contestant, other: Contestant) -> float:
    """How many times as fast as the other one, by the median of the rounds."""
    return statistics.median(theirs / own for own, theirs in zip(contestant.seconds, other.seconds, strict=True))


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def script(name: str, settings: dict[str, Any]) -> list[str]:
    """The command that starts one of contestants/ with these settings."""
    return [sys.executable, str(Path(__file__).parent / "contestants" / f"{name}.py"), json.dumps(settings)]
