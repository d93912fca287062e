"""Detects a rank that hangs or is gone. Writes a report that names the late rank, then ends all ranks.

Two threads in each rank. One watches the main thread of its own rank: has it moved since the last look? The other one
sends a heartbeat to the common store every few seconds, with the position of the main thread. When the main thread has
not moved for train.hang_timeout_seconds, each rank that still can puts its Python stacks into the store, one rank
writes the report, and all ranks end, so that a launcher can restart them. A single rank, and one that has lost the
store, reports alone.

Time counts only while this process is awake and no rank is suspended: a run that somebody stops (SIGSTOP, scontrol
suspend, a closed laptop) and continues goes on.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from threading import Event, Thread, get_ident
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.distributed.environment import read_environment, store_address
from trainer.process.awake import AwakeClock
from trainer.process.identity import ProcessIdentity, is_suspended
from trainer.run.folder import RunFolder
from trainer.run.hang_report import (
    HANG_REPORT,
    PHASES,
    RankState,
    describe_late_ranks,
    format_report,
    format_stacks,
)
from trainer.run.stop import StopSignals
from trainer.text.escape import one_line

# Factors on train.hang_timeout_seconds. At the start a data set may be decoded, and the first step may compile the
# network. A checkpoint may wait for a slow disk, and the result for an upload.
_PHASE_FACTORS = {"start": 6.0, "checkpoint": 4.0, "result": 4.0}
_FIRST_STEP_FACTOR = 4.0
_WAITING = "waiting for data"
_TICK_SECONDS = 1.0
_HEARTBEAT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0  # a rank without a heartbeat for this long is gone, or its machine is
_ANSWER_SECONDS = 10.0  # time for each rank to answer a hang with its stacks
_EXIT_SECONDS = 3.0  # time for the process of a lost rank to end
# After a request to stop, data may still come for the next step. If not, there is no sense in more waiting.
_STOP_WHILE_WAITING_SECONDS = 5.0
_END_WHILE_WAITING_SECONDS = 60.0
# Texts of gloo's and NCCL's errors when a peer is lost.
_PEER_LOST = "closed by peer|reset by peer|Broken pipe|Connection refused|Connection closed|remote process"


class NullWatchdog:
    """Watches nothing: for train.hang_timeout_seconds=0."""

    def start(self) -> None: ...
    def heartbeat(self, step: int, phase: str) -> None: ...
    def peer_lost(self, error: BaseException) -> str:
        return ""

    def close(self) -> None: ...


class Watchdog(NullWatchdog):
    """Watches a single rank."""

    def __init__(
        self,
        rank: int,
        timeout_seconds: float,
        folder: RunFolder,
        write_log: Callable[[str], None],
        signals: StopSignals,
    ) -> None:
        """write_log: adds to this rank's log."""
        self._rank, self._timeout_seconds = rank, timeout_seconds
        self._folder, self._write_log, self._signals = folder, write_log, signals
        self._main_thread = get_ident()
        self._first_step: int | None = None
        self._position = self._seen_position = (0, PHASES[0])
        self._tick_seconds = min(_TICK_SECONDS, timeout_seconds / 10)
        self._clock = AwakeClock(2 * self._tick_seconds)
        self._moved_at = 0.0  # awake time
        self._closing = Event()
        self._threads: list[Thread] = []

    def start(self) -> None:
        """Starts watching. All ranks call it after the rendezvous."""
        self._clock.tick()
        self._moved_at = self._clock.seconds
        self._start_thread(self._watch, "watchdog")

    def _start_thread(self, target: Callable[[], None], name: str) -> None:
        self._threads.append(Thread(target=target, name=name, daemon=True))
        self._threads[-1].start()

    def heartbeat(self, step: int, phase: str) -> None:
        """Notes the position of the main thread. Takes less than a microsecond. phase: one of PHASES."""
        if self._first_step is None and phase != PHASES[0]:
            self._first_step = step
        self._position = (step, phase)  # a new tuple each time, also at the same position

    def close(self) -> None:
        """Stops watching."""
        self._closing.set()
        for thread in self._threads:
            thread.join(timeout=2 * self._tick_seconds)

    def _watch(self) -> None:
        while not self._closing.wait(self._tick_seconds):
            self._clock.tick()
            if self._position is not self._seen_position:
                self._seen_position, self._moved_at = self._position, self._clock.seconds
            self._on_tick()

    def _late_seconds(self) -> float:
        """Returns for how long the main thread has not moved, in seconds of awake time."""
        return 0.0 if self._position is not self._seen_position else self._clock.seconds - self._moved_at

    def _on_tick(self) -> None:
        # A single rank need not agree with others on stopping. At its start it may decode a data set for hours.
        if self._signals.received and self._late_seconds() > _STOP_WHILE_WAITING_SECONDS:
            self._signals.interrupt_wait(lambda: self._position[1] == _WAITING)
        if self._late_seconds() > self._limit() and self._position[1] != PHASES[0]:
            self._report_alone()

    def _limit(self) -> float:
        """Returns for how many seconds the main thread may stay at its position."""
        step, phase = self._position
        if phase == _WAITING:
            return min(self._timeout_seconds, _END_WHILE_WAITING_SECONDS if self._signals.received else math.inf)
        factor = _FIRST_STEP_FACTOR if step == self._first_step else 1.0
        return self._timeout_seconds * max(factor, _PHASE_FACTORS.get(phase, 1.0))

    def _describe_late(self) -> str:
        step, phase = self._position
        return f"rank {self._rank} has been in step {step}, {phase}, for {self._late_seconds():.0f} s"

    def _report_alone(self) -> None:
        """Writes the report with the stacks of this rank only, and ends."""
        step, phase = self._position
        process = ProcessIdentity.of(os.getpid())
        state = RankState(self._rank, process.host, process.pid, step, phase, format_stacks(self._main_thread))
        self._end(self._write_report(self._describe_late(), [state]))

    def _write_report(self, headline: str, states: Sequence[RankState]) -> str:
        """Returns the headline, with the path of the report."""
        try:
            self._folder.write(HANG_REPORT, format_report(headline, self._timeout_seconds, states))
            report = f"{'its stacks are' if len(states) == 1 else 'the stacks of all ranks are'} in"
            report = f"{report} {self._folder.path / HANG_REPORT}"
        except OSError as error:
            report = f"the report could not be written ({error.strerror})"
        advice = "raise train.hang_timeout_seconds if it was not stuck"
        if all(state.phase == _WAITING for state in states):
            advice = "set data.workers=0 if a data worker is stuck; " + advice
        return f"{headline}; {report}; {advice}"

    def _end(self, reason: str) -> None:
        """Ends the process. The main thread cannot: it waits for something that never comes."""
        if self._closing.is_set():
            return
        if self._position[1] != PHASES[0]:  # before, the folder may be another run's
            with contextlib.suppress(OSError):  # the line below contains the reason, too
                self._folder.write_status("failed", self._position[0], reason)
        self._write_log(f"samecurve: {reason}")
        print(f"samecurve: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


class RankWatchdog(Watchdog):
    """Watches one of several ranks, together with the watchdogs of the others."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        attempt_id: str,
        timeout_seconds: float,
        folder: RunFolder,
        write_log: Callable[[str], None],
        signals: StopSignals,
    ) -> None:
        """attempt_id: the same on all ranks and another one for each attempt."""
        super().__init__(rank, timeout_seconds, folder, write_log, signals)
        self._attempt_id, self._world_size = attempt_id, world_size
        self._interval_seconds = min(_HEARTBEAT_SECONDS, timeout_seconds / 4)
        self._num_heartbeats = 0
        self._last_heard: dict[int, tuple[int, float]] = {}  # by peer: number of its last heartbeat, awake time
        environment = read_environment()
        first_local_rank = rank - environment.local_rank
        self._local_ranks = range(first_local_rank, first_local_rank + environment.local_world_size)
        self._processes: dict[int, ProcessIdentity] = {}  # of the ranks on this machine; in a report, of all
        self._suspended_here: list[int] = []
        self._published_suspended: list[int] = []
        self._suspended_elsewhere: list[int] = []
        self._store_error = ""

    def start(self) -> None:
        self._store = self._connect()
        self._last_heard = {peer: (-1, 0.0) for peer in self._watched_peers()}
        process = ProcessIdentity.of(os.getpid())
        self._store.set(f"process/{self._rank}", json.dumps(dataclasses.asdict(process)))
        super().start()
        self._start_thread(self._exchange, "rank watchdog")

    def _connect(self) -> PrefixStore:
        host, port = store_address()
        timeout = timedelta(seconds=_SILENCE_SECONDS)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(f"samecurve/watchdog/{self._attempt_id}", store)

    def peer_lost(self, error: BaseException) -> str:
        """Returns which rank is gone, if the error is a failed exchange with it; empty for any other error."""
        if not isinstance(error, RuntimeError) or not re.search(_PEER_LOST, str(error)):
            return ""
        lost = ""
        try:
            if not self._store_error and self._store.check(["hang"]):  # the peer has ended because of a hang, and our
                time.sleep(3 * _ANSWER_SECONDS)  # thread ends this rank, too
        except DistError as store_error:
            self._store_error = _shorten(store_error)
        deadline = time.monotonic() + _EXIT_SECONDS
        while not lost and time.monotonic() < deadline:
            lost = self._ended_ranks()
            time.sleep(0.1)
        if not lost and self._store_error and not self._signals.has_lost_launcher:
            lost = "rank 0"  # the store has ended with its machine
        return f"{lost or 'another rank'} is gone ({_shorten(error)})"

    def _ended_ranks(self) -> str:
        """Names the ranks on this machine whose processes have ended."""
        return " and ".join(
            f"rank {rank} (process {process.pid})" for rank, process in self._processes.items() if process.is_gone
        )

    def _watched_peers(self) -> list[int]:
        """Rank 0 watches all peers, and they watch rank 0: more would be too many requests for one store."""
        return [peer for peer in range(self._world_size) if peer != self._rank] if self._rank == 0 else [0]

    def _on_tick(self) -> None:
        """Leaves the report to _exchange(), unless that cannot reach the store."""
        if self._suspended_here or self._late_seconds() > self._limit() / 2:
            self._look_for_suspended_ranks()
        if self._suspended_here or self._suspended_elsewhere:
            self._moved_at = self._clock.seconds
        store_delay = 0.0 if self._store_error else self._interval_seconds + 2 * _ANSWER_SECONDS
        if self._late_seconds() > self._limit() + store_delay:
            self._report_alone()

    def _look_for_suspended_ranks(self) -> None:
        """Notes which ranks on this machine are suspended, and prints changes."""
        processes = {rank: process for rank, process in self._processes.items() if process.is_on_this_machine}
        suspended = [rank for rank, process in processes.items() if is_suspended(process.pid)]
        if suspended != self._suspended_here:
            self._suspended_here = suspended
            if suspended and self._rank == min(set(processes) - set(suspended), default=-1):
                pids = " ".join(str(processes[rank].pid) for rank in suspended)
                names = " and ".join(f"rank {rank}" for rank in suspended)
                print(
                    f"samecurve: {names} is suspended; the run waits for it (kill -CONT {pids} continues it)",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

    def _exchange(self) -> None:
        """Runs in a thread. Without the store it goes on trying: its host may be suspended, or gone for good."""
        is_first = True  # without a wait: this machine's processes must be known before one of them is suspended
        while not self._closing.wait(0.0 if is_first else self._interval_seconds):
            is_first = False
            try:
                if self._store_error:
                    self._store = self._connect()
                    self._store_error = ""
                self._send_heartbeat()
                self._read_processes(self._local_ranks)
                if self._store.check(["hang"]):
                    self._answer_hang()
                if problem := self._find_problem():
                    self._report_hang(problem)
            except DistError as error:
                self._store_error = _shorten(error)

    def _send_heartbeat(self) -> None:
        self._num_heartbeats += 1
        content = {"number": self._num_heartbeats, "position": self._position}
        self._store.set(f"heartbeat/{self._rank}", json.dumps(content))
        if self._suspended_here != self._published_suspended:
            self._published_suspended = self._suspended_here
            # One line for each change on each machine. All ranks can read all machines with one request.
            line = json.dumps([self._local_ranks[0], self._suspended_here])
            self._store.append("suspended", line + "\n")  # type: ignore[attr-defined]  # missing in torch's stub

    def _read_processes(self, ranks: Iterable[int]) -> None:
        for rank in set(ranks) - set(self._processes):
            if content := self._read(f"process/{rank}", {}):
                self._processes[rank] = ProcessIdentity(**content)

    def _find_problem(self) -> str:
        """Returns why this rank reports a hang; empty if there is no hang."""
        self._suspended_elsewhere = []
        for peer, (last_number, last_time) in self._last_heard.items():
            heartbeat = self._heartbeat_of(peer)
            silence_seconds = self._clock.seconds - last_time
            if heartbeat["number"] != last_number:
                self._last_heard[peer] = (heartbeat["number"], self._clock.seconds)
            elif silence_seconds > max(_SILENCE_SECONDS, 3 * self._interval_seconds):
                if not self._is_suspended(peer):
                    return f"no heartbeat of rank {peer} for {silence_seconds:.0f} s"
                self._last_heard[peer] = (last_number, self._clock.seconds)
        if self._late_seconds() <= self._limit():
            return ""
        self._look_for_suspended_ranks()
        self._suspended_elsewhere = self._suspended_ranks()
        return "" if self._suspended_elsewhere else self._describe_late()

    def _is_suspended(self, rank: int) -> bool:
        process = self._processes.get(rank)
        if process is not None and process.is_on_this_machine:
            return is_suspended(process.pid)
        return rank in self._suspended_ranks()

    def _suspended_ranks(self) -> list[int]:
        """Returns ranks that some rank on the same machine knows to be suspended."""
        by_machine: dict[int, list[int]] = dict(map(json.loads, self._read_text("suspended").splitlines()))
        return sorted(rank for ranks in by_machine.values() for rank in ranks)

    def _heartbeat_of(self, rank: int) -> dict[str, Any]:
        default = {"number": 0, "position": [-1, PHASES[0]]}
        content: dict[str, Any] = self._read(f"heartbeat/{rank}", default)
        return content

    def _report_hang(self, problem: str) -> None:
        """Collects the stacks, writes the report and ends. Does nothing if another rank reports already."""
        if self._store.add("reporters", 1) > 1:
            return
        self._store.set("hang", problem)
        self._store.set(f"stacks/{self._rank}", format_stacks(self._main_thread))
        deadline = time.monotonic() + _ANSWER_SECONDS
        keys = [f"stacks/{rank}" for rank in range(self._world_size)]
        while time.monotonic() < deadline and not all(self._store.check([key]) for key in keys):
            time.sleep(0.1)
        states = self._rank_states()
        reason = self._write_report(f"{problem}; late: {describe_late_ranks(states)}", states)
        self._store.set("reported", "yes")
        self._end(reason)

    def _answer_hang(self) -> None:
        """Sends this rank's stacks to the reporting rank, waits for the report, and ends."""
        with contextlib.suppress(DistError):  # the reporting rank may end before this rank sees its last message
            self._store.set(f"stacks/{self._rank}", format_stacks(self._main_thread))
            deadline = time.monotonic() + 2 * _ANSWER_SECONDS
            while time.monotonic() < deadline and not self._store.check(["reported"]):
                time.sleep(0.1)
        self._write_log(f"samecurve: ended because a rank is late; {HANG_REPORT} names it")
        os._exit(1)

    def _rank_states(self) -> list[RankState]:
        states = []
        self._read_processes(range(self._world_size))
        for rank in range(self._world_size):
            step, phase = self._heartbeat_of(rank)["position"]
            stacks = self._read_text(f"stacks/{rank}")
            process = self._processes.get(rank)
            host, pid = ("?", 0) if process is None else (process.host, process.pid)
            states.append(RankState(rank, host, pid, step, phase, stacks))
        return states

    def _read(self, key: str, default: Any) -> Any:
        """Returns the JSON value of a key, or the default without waiting for the key."""
        text = self._read_text(key)
        return json.loads(text) if text else default

    def _read_text(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""


def build_watchdog(
    rank: int,
    world_size: int,
    attempt_id: str,
    timeout_seconds: float,
    folder: RunFolder,
    write_log: Callable[[str], None],
    signals: StopSignals,
) -> NullWatchdog:
    """Returns the watchdog of a rank; a NullWatchdog if timeout_seconds is 0."""
    if not timeout_seconds:
        return NullWatchdog()
    if world_size == 1:
        return Watchdog(rank, timeout_seconds, folder, write_log, signals)
    return RankWatchdog(rank, world_size, attempt_id, timeout_seconds, folder, write_log, signals)


def _shorten(error: BaseException) -> str:
    """Returns the message of gloo or the store without source positions and advice."""
    text = re.sub(r"\[/[^]]*\] ?", "", one_line(error, None))
    return text.partition(". ")[0][:160]
