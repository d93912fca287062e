"""Where each rank is, from all ranks; a report that names the late one, and an end, when a rank is stuck or gone.

Each rank has a thread that tells the ranks' common store every few seconds where its main thread is. A rank that has
not moved for train.hang_timeout_seconds calls a hang; then every rank that can leaves its Python stacks in the store,
one writes the report, and all end: a launcher may start them again, or a person may read.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread, get_ident
from typing import Any

from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from trainer.distributed.environment import store_address
from trainer.run.folder import RunFolder

HANG_REPORT = "hang-report.txt"
# The order of a step: of two ranks in the same step the one at an earlier place is the late one.
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
# How many times the limit a place may take: data sets are decoded, networks compiled in a first step, disks are slow,
# weights are uploaded at the end.
_PATIENCE = {"start": 6.0, "checkpoint": 4.0, "result": 4.0}
_FIRST_STEP_PATIENCE = 4.0
_BEAT_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # a rank whose thread says nothing for so long is gone, or its machine is
_ANSWER_SECONDS = 10.0
_GONE_SECONDS = 3.0
# What gloo and NCCL say.
_LOST = "closed by peer|reset by peer|Broken pipe|Connection refused|Connection closed|remote process"


class NullWatchdog:
    """For a process alone, whom nobody waits for."""

    def start(self) -> None: ...
    def heartbeat(self, step: int, place: str) -> None: ...
    def peer_lost(self, error: BaseException) -> str:
        return ""

    def close(self) -> None: ...


class Watchdog(NullWatchdog):
    def __init__(
        self,
        rank: int,
        world_size: int,
        meeting: str,
        timeout_seconds: float,
        folder: RunFolder,
        keep: Callable[[str], None],
    ) -> None:
        """meeting: a word that all ranks have, and none of an earlier attempt (meeting.py); keep: this rank's log."""
        self._meeting, self._keep = meeting, keep
        self._rank, self._world_size = rank, world_size
        self._timeout_seconds, self._folder = timeout_seconds, folder
        self._beat_seconds = min(_BEAT_SECONDS, timeout_seconds / 4)
        self._main_thread = get_ident()
        self._at, self._since = (0, PHASES[0]), time.monotonic()
        self._first_step: int | None = None
        self._beats = 0
        self._heard: dict[int, tuple[int, float]] = {}
        self._answered = time.monotonic()
        self._closing = Event()
        self._thread: Thread | None = None

    def start(self) -> None:
        """To be called by all ranks when they have met."""
        host, port = store_address()
        timeout = timedelta(seconds=_SILENT_SECONDS)
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        self._store = PrefixStore(f"samecurve/watch/{self._meeting}", store)
        self._heard = {other: (-1, time.monotonic()) for other in self._listens_to()}
        self._store.set(f"who/{self._rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        self._since = self._answered = time.monotonic()
        self._thread = Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        Thread(target=self._watch_store, name="watch store", daemon=True).start()

    def heartbeat(self, step: int, place: str) -> None:
        """Where the main thread is now; costs next to nothing."""
        if self._first_step is None and place != PHASES[0]:
            self._first_step = step
        self._at, self._since = (step, place), time.monotonic()

    def peer_lost(self, error: BaseException) -> str:
        """Which rank an exchange failed with, if that is what the error says; nothing for any other error."""
        if self._thread is None or not isinstance(error, RuntimeError) or not re.search(_LOST, str(error)):
            return ""
        gone = ""
        try:
            if self._store.check(["hang"]):  # the one that called it has ended; this one's watch says so, and ends it
                time.sleep(3 * _ANSWER_SECONDS)
            until = time.monotonic() + _GONE_SECONDS
            while not gone and time.monotonic() < until:
                gone = self._gone()
                time.sleep(0.1)
        except DistError:  # the store went with rank 0
            gone = "rank 0"
        return f"{gone or 'another rank'} is gone ({_short(error)})"

    def _gone(self) -> str:
        """The ranks on this machine whose processes have ended."""
        return " and ".join(
            f"rank {rank} (process {who['pid']})"
            for rank, who in self._everybody().items()
            if who["host"] == socket.gethostname() and _state(who["pid"]) in ("gone", "Z")
        )

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self._beat_seconds)

    def _listens_to(self) -> list[int]:
        """Rank 0 hears all others, and they hear it: a store with a thousand ranks is asked a thousand times a beat."""
        return [other for other in range(self._world_size) if other != self._rank] if self._rank == 0 else [0]

    def _watch(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            try:
                self._beat()
                if self._store.check(["hang"]):
                    self._answer()
                problem = self._problem()
                if problem:
                    self._call(problem)
                self._answered = time.monotonic()
            except DistError as error:  # the store is gone, and rank 0's machine with it; or the run is at its end
                if not self._closing.wait(_ANSWER_SECONDS):
                    self._end(f"rank {self._rank} cannot reach the others' meeting point any more ({_short(error)})")
                return

    def _watch_store(self) -> None:
        """A store whose machine is frozen, or cut off, answers nothing and refuses nothing: the other thread waits."""
        while not self._closing.wait(self._beat_seconds):
            if time.monotonic() - self._answered > self._beat_seconds + _SILENT_SECONDS:
                self._end(
                    f"rank {self._rank}: the ranks' meeting point, with rank 0, has been silent for 30 s and more"
                )

    def _limit_seconds(self) -> float:
        step, place = self._at
        patience = _FIRST_STEP_PATIENCE if step == self._first_step else 1.0
        return self._timeout_seconds * max(patience, _PATIENCE.get(place, 1.0))

    def _beat(self) -> None:
        self._beats += 1
        stuck = time.monotonic() - self._since
        self._store.set(f"beat/{self._rank}", json.dumps({"beat": self._beats, "at": self._at, "seconds": stuck}))

    def _problem(self) -> str:
        """Why to call a hang, or nothing."""
        now = time.monotonic()
        for other, (last_beat, when) in self._heard.items():
            beat = self._read(f"beat/{other}", {"beat": 0})["beat"]
            if beat != last_beat:
                self._heard[other] = (beat, now)
            elif now - when > max(_SILENT_SECONDS, 3 * self._beat_seconds):
                return f"nothing heard of rank {other} for {now - when:.0f} s"
        if now - self._since > self._limit_seconds():
            return f"rank {self._rank} has been in step {self._at[0]}, {self._at[1]}, for {now - self._since:.0f} s"
        return ""

    def _call(self, problem: str) -> None:
        """The first rank that calls a hang writes the report; the others answer."""
        if self._store.add("callers", 1) > 1:
            return
        self._store.set("hang", problem)
        self._store.set(f"stacks/{self._rank}", self._stacks())
        until = time.monotonic() + _ANSWER_SECONDS
        keys = [f"stacks/{rank}" for rank in range(self._world_size)]
        while time.monotonic() < until and not all(self._store.check([key]) for key in keys):
            time.sleep(0.1)
        ranks = self._everybody()
        late = self._late(ranks)
        headline = f"{problem}; late: {late}"
        parts = [headline, f"train.hang_timeout_seconds={self._timeout_seconds:g}", ""]
        for rank, who in ranks.items():
            beat = self._read(f"beat/{rank}", {"at": ["?", "?"], "seconds": 0})
            parts.append(
                f"== rank {rank}, process {who['pid']} on {who['host']}: step {beat['at'][0]}, {beat['at'][1]}"
            )
            parts.append(self._read(f"stacks/{rank}", None) or f"   no answer; {self._why_silent(who)}\n")
        try:
            self._folder.write(HANG_REPORT, "\n".join(parts))
            where = f"every rank's stacks are in {self._folder.path / HANG_REPORT}"
        except OSError as error:
            where = f"the report could not be written ({error.strerror})"
        self._store.set("reported", "yes")
        self._end(f"{headline}; {where}")

    def _answer(self) -> None:
        """This rank's stacks for the one that called, then the end."""
        with contextlib.suppress(DistError):  # the one that called may be gone before we see that it is done
            self._store.set(f"stacks/{self._rank}", self._stacks())
            until = time.monotonic() + 2 * _ANSWER_SECONDS
            while time.monotonic() < until and not self._store.check(["reported"]):
                time.sleep(0.1)
        self._keep(f"samecurve: ended: a rank is late; {HANG_REPORT} says which, and where all were")
        os._exit(1)

    def _end(self, line: str) -> None:
        """The main thread is deep in an exchange that never ends: only the process can be ended."""
        if self._closing.is_set():
            return
        with contextlib.suppress(OSError):  # the line below says it too
            self._folder.status("failed", self._at[0], line)
        self._keep(f"samecurve: {line}")
        print(f"samecurve: {line}", file=sys.stderr, flush=True)
        os._exit(1)

    def _late(self, ranks: dict[int, Any]) -> str:
        places = {rank: self._read(f"beat/{rank}", {"at": [-1, PHASES[0]]})["at"] for rank in ranks}
        silent = [rank for rank in ranks if not self._store.check([f"stacks/{rank}"])]
        order = {rank: (step, PHASES.index(place)) for rank, (step, place) in places.items()}
        behind = [rank for rank in ranks if order[rank] == min(order.values()) < max(order.values())]
        found = [f"rank {rank}, which does not answer ({self._why_silent(ranks[rank])})" for rank in silent]
        found += [f"rank {rank}, in step {places[rank][0]}, {places[rank][1]}" for rank in behind if rank not in silent]
        return " and ".join(found) or f"none; all are in step {places[self._rank][0]}, {places[self._rank][1]}"

    def _why_silent(self, who: dict[str, Any]) -> str:
        if who["host"] != socket.gethostname():
            return f"look at process {who['pid']} on {who['host']}"
        state = _state(who["pid"])
        words = {"T": "it is stopped", "t": "it is in a debugger", "gone": "it has ended", "Z": "it has ended"}
        return f"process {who['pid']}: {words.get(state, f'alive, state {state}, but none of its Python threads runs')}"

    def _everybody(self) -> dict[int, Any]:
        return {rank: self._read(f"who/{rank}", {"host": "?", "pid": 0}) for rank in range(self._world_size)}

    def _read(self, key: str, default: Any) -> Any:
        """What a rank has left in the store; it is waited for nothing."""
        if not self._store.check([key]):
            return default
        text = self._store.get(key).decode()
        return text if key.startswith("stacks/") else json.loads(text)

    def _stacks(self) -> str:
        """This process's Python stacks, the main thread's first."""
        frames = sys._current_frames()
        frames.pop(get_ident(), None)
        order = sorted(frames, key=lambda thread: thread != self._main_thread)
        parts = []
        for thread in order:
            name = "main thread" if thread == self._main_thread else f"thread {thread}"
            parts.append(f"   {name}\n" + "".join(traceback.format_stack(frames[thread])))
        return "\n".join(parts)


def build_watchdog(
    rank: int, world_size: int, meeting: str, timeout_seconds: float, folder: RunFolder, keep: Callable[[str], None]
) -> NullWatchdog:
    """The watch for one of several ranks, unless the settings say to wait for ever."""
    if world_size == 1 or not timeout_seconds:
        return NullWatchdog()
    return Watchdog(rank, world_size, meeting, timeout_seconds, folder, keep)


def _state(pid: int) -> str:
    """Linux's letter for what a process of this machine does; 'gone' when there is none, '?' where /proc is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone" if Path("/proc").is_dir() else "?"
    except (OSError, IndexError):
        return "?"


def _short(error: BaseException) -> str:
    """An error of gloo's or the store's without the place in its source and its advice."""
    text = re.sub(r"\[/[^]]*\] ?", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:160]
