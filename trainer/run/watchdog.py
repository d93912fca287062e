"""Detects a rank that hangs or is gone. Writes a report that names the late rank, then ends all ranks.

A thread in each rank sends a heartbeat to the common store every few seconds, with the position of the main thread. A
rank whose main thread has not moved for train.hang_timeout_seconds reports a hang. Then each rank that still can puts
its Python stacks into the store, one rank writes the report, and all ranks end, so that a launcher can restart them.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread, get_ident
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.distributed.environment import store_address
from trainer.run.folder import RunFolder
from trainer.run.hang_report import (
    HANG_REPORT,
    PHASES,
    RankState,
    describe_late_ranks,
    format_report,
    format_stacks,
    process_state,
)

# Factors on train.hang_timeout_seconds. At the start a data set may be decoded, and the first step may compile the
# network. A checkpoint may wait for a slow disk, and the result for an upload.
_PHASE_FACTORS = {"start": 6.0, "checkpoint": 4.0, "result": 4.0}
_FIRST_STEP_FACTOR = 4.0
_HEARTBEAT_SECONDS = 5.0
_SILENCE_SECONDS = 30.0  # a rank without a heartbeat for this long is gone, or its machine is
_ANSWER_SECONDS = 10.0  # time for each rank to answer a hang with its stacks
_EXIT_SECONDS = 3.0  # time for the process of a lost rank to end
# Texts of gloo's and NCCL's errors when a peer is lost.
_PEER_LOST = "closed by peer|reset by peer|Broken pipe|Connection refused|Connection closed|remote process"


class NullWatchdog:
    """Watches nothing: for a single rank, and for train.hang_timeout_seconds=0."""

    def start(self) -> None: ...
    def heartbeat(self, step: int, phase: str) -> None: ...
    def peer_lost(self, error: BaseException) -> str:
        return ""

    def close(self) -> None: ...


class Watchdog(NullWatchdog):
    def __init__(
        self,
        rank: int,
        world_size: int,
        attempt_id: str,
        timeout_seconds: float,
        folder: RunFolder,
        write_log: Callable[[str], None],
    ) -> None:
        """attempt_id: the same on all ranks and another one for each attempt; write_log: adds to this rank's log."""
        self._attempt_id, self._write_log = attempt_id, write_log
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds, self._folder = timeout_seconds, folder
        self._interval_seconds = min(_HEARTBEAT_SECONDS, timeout_seconds / 4)
        self._main_thread = get_ident()
        self._position, self._position_time = (0, PHASES[0]), time.monotonic()
        self._first_step: int | None = None
        self._num_heartbeats = 0
        self._last_heard: dict[int, tuple[int, float]] = {}  # by peer: number of its last heartbeat, time
        self._store_time = time.monotonic()  # when the store answered last
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Starts watching. All ranks call it after the rendezvous."""
        host, port = store_address()
        timeout = timedelta(seconds=_SILENCE_SECONDS)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        self._store = PrefixStore(f"samecurve/watchdog/{self._attempt_id}", store)
        self._last_heard = {peer: (-1, time.monotonic()) for peer in self._watched_peers()}
        self._store.set(f"process/{self._rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._position_time = self._store_time = time.monotonic()
        self._thread = Thread(target=self._watch_ranks, name="watchdog", daemon=True)
        self._thread.start()
        Thread(target=self._watch_store, name="store watchdog", daemon=True).start()

    def heartbeat(self, step: int, phase: str) -> None:
        """Notes the position of the main thread. Takes less than a microsecond. phase: one of PHASES."""
        if self._first_step is None and phase != PHASES[0]:
            self._first_step = step
        self._position, self._position_time = (step, phase), time.monotonic()

    def peer_lost(self, error: BaseException) -> str:
        """Returns which rank is gone, if the error is a failed exchange with it; empty for any other error."""
        if self._thread is None or not isinstance(error, RuntimeError) or not re.search(_PEER_LOST, str(error)):
            return ""
        lost = ""
        try:
            if self._store.check(["hang"]):  # the peer has ended because of a hang; our thread ends this rank, too
                time.sleep(3 * _ANSWER_SECONDS)
            deadline = time.monotonic() + _EXIT_SECONDS
            while not lost and time.monotonic() < deadline:
                lost = self._ended_ranks()
                time.sleep(0.1)
        except DistError:  # the store ended with rank 0
            lost = "rank 0"
        return f"{lost or 'another rank'} is gone ({_shorten(error)})"

    def _ended_ranks(self) -> str:
        """Names the ranks on this machine whose processes have ended."""
        return " and ".join(
            f"rank {rank} (process {process['pid']})"
            for rank, process in self._processes().items()
            if process["host"] == socket.gethostname() and process_state(process["pid"]) in ("gone", "Z")
        )

    def close(self) -> None:
        """Stops watching."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._interval_seconds)

    def _watched_peers(self) -> list[int]:
        """Rank 0 watches all peers, and they watch rank 0: more would be too many requests for one store."""
        return [peer for peer in range(self._world_size) if peer != self._rank] if self._rank == 0 else [0]

    def _watch_ranks(self) -> None:
        while not self._closing.wait(self._interval_seconds):
            try:
                self._send_heartbeat()
                if self._store.check(["hang"]):
                    self._answer_hang()
                problem = self._find_problem()
                if problem:
                    self._report_hang(problem)
                self._store_time = time.monotonic()
            except DistError as error:  # the store is gone with rank 0's machine, or the run is ending
                if not self._closing.wait(_ANSWER_SECONDS):
                    self._end(f"rank {self._rank} cannot reach the store on rank 0 any more ({_shorten(error)})")
                return

    def _watch_store(self) -> None:
        """Ends this rank if the store hangs. _watch_ranks cannot: it waits for the answer of a frozen machine."""
        while not self._closing.wait(self._interval_seconds):
            if time.monotonic() - self._store_time > self._interval_seconds + _SILENCE_SECONDS:
                self._end(f"rank {self._rank}: the store on rank 0 has not answered for {_SILENCE_SECONDS:g} s")

    def _timeout_now(self) -> float:
        step, phase = self._position
        factor = _FIRST_STEP_FACTOR if step == self._first_step else 1.0
        return self._timeout_seconds * max(factor, _PHASE_FACTORS.get(phase, 1.0))

    def _send_heartbeat(self) -> None:
        self._num_heartbeats += 1
        content = {"number": self._num_heartbeats, "position": self._position}
        self._store.set(f"heartbeat/{self._rank}", json.dumps(content))

    def _find_problem(self) -> str:
        """Returns why this rank reports a hang; empty if there is no hang."""
        now = time.monotonic()
        for peer, (last_number, last_time) in self._last_heard.items():
            number = self._read(f"heartbeat/{peer}", {"number": 0})["number"]
            if number != last_number:
                self._last_heard[peer] = (number, now)
            elif now - last_time > max(_SILENCE_SECONDS, 3 * self._interval_seconds):
                return f"no heartbeat of rank {peer} for {now - last_time:.0f} s"
        step, phase = self._position
        if now - self._position_time > self._timeout_now():
            return f"rank {self._rank} has been in step {step}, {phase}, for {now - self._position_time:.0f} s"
        return ""

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
        headline = f"{problem}; late: {describe_late_ranks(states)}"
        try:
            self._folder.write(HANG_REPORT, format_report(headline, self._timeout_seconds, states))
            report = f"the stacks of all ranks are in {self._folder.path / HANG_REPORT}"
        except OSError as error:
            report = f"the report could not be written ({error.strerror})"
        self._store.set("reported", "yes")
        self._end(f"{headline}; {report}")

    def _answer_hang(self) -> None:
        """Sends this rank's stacks to the reporting rank, waits for the report, and ends."""
        with contextlib.suppress(DistError):  # the reporting rank may end before this rank sees its last message
            self._store.set(f"stacks/{self._rank}", format_stacks(self._main_thread))
            deadline = time.monotonic() + 2 * _ANSWER_SECONDS
            while time.monotonic() < deadline and not self._store.check(["reported"]):
                time.sleep(0.1)
        self._write_log(f"samecurve: ended because a rank is late; {HANG_REPORT} names it")
        os._exit(1)

    def _end(self, reason: str) -> None:
        """Ends the process. The main thread cannot: it waits in an exchange that never ends."""
        if self._closing.is_set():
            return
        with contextlib.suppress(OSError):  # the line below contains the reason, too
            self._folder.write_status("failed", self._position[0], reason)
        self._write_log(f"samecurve: {reason}")
        print(f"samecurve: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def _rank_states(self) -> list[RankState]:
        states = []
        for rank, process in self._processes().items():
            step, phase = self._read(f"heartbeat/{rank}", {"position": [-1, PHASES[0]]})["position"]
            stacks = self._read_text(f"stacks/{rank}")
            states.append(RankState(rank, process["host"], process["pid"], step, phase, stacks))
        return states

    def _processes(self) -> dict[int, Any]:
        """Returns host and pid of each rank."""
        return {rank: self._read(f"process/{rank}", {"host": "?", "pid": 0}) for rank in range(self._world_size)}

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
) -> NullWatchdog:
    """Returns the watchdog of a rank; a NullWatchdog for a single rank or if timeout_seconds is 0."""
    if world_size == 1 or not timeout_seconds:
        return NullWatchdog()
    return Watchdog(rank, world_size, attempt_id, timeout_seconds, folder, write_log)


def _shorten(error: BaseException) -> str:
    """Returns the message of gloo or the store without source positions and advice."""
    text = re.sub(r"\[/[^]]*\] ?", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:160]
