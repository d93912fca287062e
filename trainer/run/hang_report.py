"""Formats the report of a hang: the position and the Python stacks of each rank, and which ranks are late."""

import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_ident

from trainer.process.identity import process_state

HANG_REPORT = "hang-report.txt"
# In the order of a step: of two ranks in the same step, the one in the earlier phase is late.
PHASES = (
    "start",
    "waiting for data",
    "forward pass",
    "backward pass",
    "evaluation",
    "checkpoint",
    "agreement on stopping",
    "result",
)
_PROCESS_STATES = {"T": "it is stopped", "t": "it is in a debugger", "gone": "it has ended", "Z": "it has ended"}


@dataclass(frozen=True, slots=True)
class RankState:
    """The position of a rank during a hang."""

    rank: int
    host: str
    pid: int
    step: int
    """-1: the rank has not sent a heartbeat"""
    phase: str
    """one of PHASES"""
    stacks: str
    """Python stacks of all threads; empty: the rank did not answer"""

    @property
    def position(self) -> str:
        return f"in step {self.step}, {self.phase}" if self.step >= 0 else "without a heartbeat"

    def why_silent(self) -> str:
        """Returns the state of the process, as far as this machine can see it."""
        if self.host != socket.gethostname():
            return f"look at process {self.pid} on {self.host}"
        state = process_state(self.pid)
        description = _PROCESS_STATES.get(state, f"alive, state {state}, but none of its Python threads runs")
        return f"process {self.pid}: {description}"


def describe_late_ranks(states: Sequence[RankState]) -> str:
    """Names the ranks that did not answer and those behind the others. states: of all ranks, by rank."""
    order = [(state.step, PHASES.index(state.phase)) for state in states]
    silent = [state for state in states if not state.stacks]
    behind = [state for state, position in zip(states, order, strict=True) if position == min(order) < max(order)]
    late = [f"rank {state.rank}, which does not answer ({state.why_silent()})" for state in silent]
    late += [f"rank {state.rank}, {state.position}" for state in behind if state.stacks]
    answering = next((state for state in states if state.stacks), states[0])
    return " and ".join(late) or f"none; all are {answering.position}"


def format_report(headline: str, timeout_seconds: float, states: Sequence[RankState]) -> str:
    """Returns the text of hang-report.txt."""
    lines = [headline, f"train.hang_timeout_seconds={timeout_seconds:g}", ""]
    for state in states:
        lines.append(f"== rank {state.rank}, process {state.pid} on {state.host}: {state.position}")
        lines.append(state.stacks or f"   no answer; {state.why_silent()}\n")
    return "\n".join(lines)


def format_stacks(main_thread: int) -> str:
    """Returns the Python stacks of this process without the calling thread, the main thread first.

    main_thread: its identifier, from threading.get_ident().
    """
    frames = sys._current_frames()  # documented, and the only way to the stacks of other threads
    frames.pop(get_ident(), None)
    stacks = []
    for thread in sorted(frames, key=lambda thread: thread != main_thread):
        name = "main thread" if thread == main_thread else f"thread {thread}"
        stacks.append(f"   {name}\n" + "".join(traceback.format_stack(frames[thread])))
    return "\n".join(stacks)
