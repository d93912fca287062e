"""Kills launchers and ranks at random moments, runs the same command again at once, and compares all bits.

    python benchmarks/kills.py [--kills 120] [--kills-per-run 10] [--seed 0] [--seconds LIMIT] [--at-once 2]

Each run has one launcher: `samecurve train`, launch/torchrun.sh or `accelerate launch`. Each kill is SIGKILL, SIGTERM,
SIGHUP, or SIGSTOP followed by SIGCONT, to the launcher, torchrun below it, one rank, all ranks or all of these. Half of
the runs have 2 ranks; the others have 3 virtual ranks on 2, 3 and 1 ranks in turn. After each run the program writes
kills.json and kills.md. After LIMIT seconds it kills no more, lets the runs in progress finish, and compares them.
Exits with 1 if a run differs from an uninterrupted one, or if a start was refused or failed.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import report
from report import MAIN, REPOSITORY

from launch.verify.compare import compare_runs
from trainer.distributed.environment import without_launchers
from trainer.run.record import RunRecord

_STEPS = 600
_SETTINGS = [
    "--config", "digits", "model.name=lenet", "train.threads_per_rank=1", "train.device=cpu", "train.precision=fp32",
    f"train.max_steps={_STEPS}", "train.epochs=9999", "checkpoint.every_steps=20", "log.every_steps=3", "log.wandb=off",
    "log.figures=false", "train.hang_timeout_seconds=30",
]  # fmt: skip
_ACCELERATE_CONFIG = str(REPOSITORY / "launch" / "accelerate" / "multi_cpu.yaml")
_AGENT = str(REPOSITORY / "launch" / "elastic.py")
_LAUNCHERS = ("samecurve", "torchrun", "accelerate")
_MAX_RESTARTS = (0, 3)
_SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP", "SIGSTOP, SIGCONT")
_TARGETS = ("launcher", "torchrun below it", "one rank", "all ranks", "all")
_MOMENTS = {"step": 0.6, "start": 0.2, "save": 0.2}
_START_SECONDS = 10.0  # roughly the time from a process's start to its first step
_PAUSE_SECONDS = (1.0, 6.0)
_LONGEST_DELAY_SECONDS = 0.2  # between a step and its kill
_POLL_SECONDS = 0.02
_SAVE_POLL_SECONDS = 0.002
_SAME_BITS = "same bits"


@dataclass(frozen=True, slots=True)
class Plan:
    """How many ranks a run has."""

    virtual_ranks: int | None
    world_sizes: tuple[int, ...]
    """the next one at each start"""

    @property
    def settings(self) -> list[str]:
        return [*_SETTINGS, *([f"train.virtual_ranks={self.virtual_ranks}"] if self.virtual_ranks else [])]


_PLANS = (Plan(None, (2,)), Plan(3, (2, 3, 1)))


@dataclass(slots=True)
class Kill:
    """One signal, or one pause."""

    signal: str
    target: str
    step: int
    """the last one in metrics.jsonl before it"""
    at_start: bool
    """whether it came before its session had begun"""
    in_save: bool
    """whether it came while a checkpoint was being written"""
    outcome: str = ""
    """ended CODE, restarted by its launcher, went on, or finished"""
    seconds: float = 0.0
    """until the outcome"""


class Failure(Exception):
    """A run that was refused, failed, or did not answer in time. The first line of its text says which."""


class Run:
    """A run that is started again and again until it has finished."""

    def __init__(self, root: Path, plan: Plan, launcher: str, max_restarts: int, timeout_seconds: float) -> None:
        root.mkdir()
        self.root, self.plan, self.launcher = root, plan, launcher
        self.folder = root / "run"
        self._log = root / "log"
        self._log.touch()
        self._max_restarts, self._timeout_seconds = max_restarts, timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._num_starts = 0
        self._is_over = False

    def start(self) -> None:
        """Starts the run with its launcher, on the next world size."""
        if self._is_over:
            raise self.failure("interrupted")
        ranks = str(self.plan.world_sizes[self._num_starts % len(self.plan.world_sizes)])
        restarts = str(self._max_restarts)
        settings = [*self.plan.settings, f"run.root={self.root}", "run.name=run"]
        commands = {
            "samecurve": [
                sys.executable, str(REPOSITORY / "launch" / "main.py"), "train", "--ranks", ranks,
                "--max-restarts", restarts, *settings,
            ],
            "torchrun": ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), *settings],
            "accelerate": [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", _ACCELERATE_CONFIG,
                "--num_processes", ranks, "--max_restarts", restarts, "--main_process_port", "0", MAIN, *settings,
            ],
        }  # fmt: skip
        variables = {"RANKS": ranks, "RESTARTS": restarts, "SAMECURVE_PYTHON": sys.executable}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                commands[self.launcher],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=without_launchers(os.environ) | variables,
            )
        self._num_starts += 1

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def step(self) -> int:
        """Returns the last step in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines[-3:] if line.endswith(b"}")), default=0)

    def num_sessions(self) -> int:
        path = self.folder / "starts.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def partial_saves(self) -> set[tuple[str, int]]:
        """Returns the folders of checkpoints that are being written, and of interrupted saves. The inode tells apart
        two saves of the same step."""
        saves = set()
        for path in (self.folder / "checkpoints").glob(".step-*"):
            with contextlib.suppress(FileNotFoundError):
                saves.add((path.name, path.stat().st_ino))
        return saves

    def num_waits(self) -> int:
        """Returns how many starts found the folder held by processes that still saved, and waited."""
        return self._log.read_text(errors="replace").count(" is in use by ") - self.num_refusals()

    def num_refusals(self) -> int:
        """Returns how many starts found the folder held, and gave up."""
        return self._log.read_text(errors="replace").count("; wait for its end, or choose another run.name")

    def is_finished(self) -> bool:
        return RunRecord(self.folder).status.get("state") == "finished"

    def has_finished(self) -> bool:
        """Returns whether the run has ended by itself. Raises Failure if it ended before its last step."""
        code = self._code()
        if code is not None and not (code == 0 and self.is_finished()):
            raise self.failure("refused to continue" if code == 2 else f"ended with {code} without a signal")
        return code is not None

    def wait_until(self, condition: Callable[[], bool], what: str, poll_seconds: float = _POLL_SECONDS) -> bool:
        """Returns True once `condition` is true, False if the run has finished first. Raises Failure."""
        deadline = time.monotonic() + self._timeout_seconds
        while not condition():
            if self.has_finished():
                return False
            if time.monotonic() > deadline:
                raise self.failure(f"did not reach {what}")
            time.sleep(poll_seconds)
        return True

    def wait_for_outcome(self, is_pause: bool, num_sessions: int, step: int) -> str:
        """Waits until the launcher has ended or has restarted its ranks, or the run has gone on."""
        deadline = time.monotonic() + self._timeout_seconds
        while (code := self._code()) is None:
            if self.num_sessions() > num_sessions:
                return "restarted by its launcher"
            if is_pause and self.step() > step + 3:
                return "went on"
            if time.monotonic() > deadline:
                raise self.failure("neither ended nor went on after a signal")
            time.sleep(_POLL_SECONDS)
        if code == 2:
            raise self.failure("refused to continue")
        return "finished" if code == 0 and self.is_finished() else f"ended {code}"

    def processes(self, target: str, choice: float) -> list[psutil.Process]:
        """Returns the processes of a target that exist now, those nearest to the launcher first.

        choice: in [0, 1), which one of the ranks is "one rank".
        """
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            descendants = launcher.children(recursive=True)
            agents = [process for process in descendants if _AGENT in _words(process)]
            trainers = [process for process in descendants if MAIN in _words(process) and process not in agents]
            forked = {child.pid for trainer in trainers for child in _children(trainer)}  # data workers
            ranks = [process for process in trainers if process.pid not in forked]
            return {
                "launcher": [launcher],
                "torchrun below it": agents,
                "one rank": ranks[int(choice * len(ranks)) :][:1],
                "all ranks": ranks,
                "all": [launcher, *agents, *ranks],
            }[target]
        return []

    def finish(self) -> None:
        """Lets the run train to its end. Raises Failure if it does not get there."""
        if not self.is_running:
            self.start()
        self.wait_until(lambda: False, "its last step")

    def failure(self, what: str) -> Failure:
        return Failure(f"{what}\n{self._log.read_text(errors='replace')[-3000:]}")

    def end(self) -> None:
        """Kills what is left of the run, orphans included. The run cannot be started again."""
        self._is_over = True
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"run.root={self.root}" in process.cmdline():
                    process.kill()

    def _code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()


def _words(process: psutil.Process) -> list[str]:
    """Returns the command line of a process, with paths in their shortest form; empty if it has ended."""
    words: list[str] = []
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
    return [os.path.normpath(word) for word in words]


def _children(process: psutil.Process) -> list[psutil.Process]:
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = process.children()
    return children


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no kill after this time")
    parser.add_argument("--at-once", type=int, default=2, help="runs at the same time, which make the machine busy")
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each start and each end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)  # also lets the runs receive SIGHUP under nohup
    start, runs, results = time.monotonic(), list[Run](), list[dict[str, Any]]()
    summary = _summarize(results, 0)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder, ThreadPoolExecutor(arguments.at_once) as executor:
        twins = [Run(Path(folder) / f"twin-{number}", plan, "samecurve", 0, 600) for number, plan in enumerate(_PLANS)]
        runs += twins
        try:
            for _ in executor.map(Run.finish, twins):
                pass
            futures = []
            for number, first_kill in enumerate(range(0, arguments.kills, arguments.kills_per_run)):
                generator = random.Random(f"{arguments.seed}/{number}")
                twin = twins[number // len(_LAUNCHERS) % len(_PLANS)]
                launcher, restarts = _LAUNCHERS[number % len(_LAUNCHERS)], generator.choice(_MAX_RESTARTS)
                runs.append(Run(Path(folder) / str(number), twin.plan, launcher, restarts, arguments.timeout))
                num_kills = min(arguments.kills_per_run, arguments.kills - first_kill)
                deadline = start + arguments.seconds
                futures.append(executor.submit(_kill_often, runs[-1], num_kills, generator, twin.folder, deadline))
            for future in as_completed(futures):
                if (result := future.result()) is not None:
                    results.append(result)
                    summary = _summarize(results, time.monotonic() - start)
                    report.write(arguments.output, "kills", __doc__, summary, _text(summary))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for run in runs:
                run.end()
    print(_text(summary))
    return int(any(result["verdict"] != _SAME_BITS for result in results))


def _kill_often(
    run: Run, num_kills: int, generator: random.Random, twin: Path, deadline: float
) -> dict[str, Any] | None:
    """Kills a run at random moments, lets it finish and compares it. Returns None after the deadline."""
    if time.monotonic() > deadline:
        return None
    kills: list[Kill] = []
    try:
        for step in sorted(generator.randrange(1, _STEPS - 60) for _ in range(num_kills)):
            if time.monotonic() < deadline and (kill := _kill_once(run, step, generator)) is not None:
                kills.append(kill)
                print(f"{run.root.name}, {run.launcher}: {kill}", flush=True)
        run.finish()
        difference = compare_runs(twin, run.folder)
        verdict = f"differs: {difference}" if difference else _SAME_BITS
    except Failure as failure:
        verdict = str(failure)
    finally:
        run.end()
    if run.num_refusals() and verdict == _SAME_BITS:
        verdict = "a start was refused; the next one continued"
    print(f"{run.root.name}, {run.launcher}, {run.plan}, {len(kills)} kills: {verdict}", flush=True)
    return {
        "launcher": run.launcher,
        "virtual_ranks": run.plan.virtual_ranks,
        "world_sizes": run.plan.world_sizes,
        "waits_for_the_folder": run.num_waits(),
        "verdict": verdict,
        "kills": [asdict(kill) for kill in kills],
    }


def _kill_once(run: Run, step: int, generator: random.Random) -> Kill | None:
    """Starts the run unless it trains, kills it once and waits for the outcome. Returns None if it finished first."""
    name, target = generator.choice(_SIGNALS), generator.choice(_TARGETS)
    moment = generator.choices([*_MOMENTS], [*_MOMENTS.values()])[0]
    delay, pause_seconds, choice = generator.random(), generator.uniform(*_PAUSE_SECONDS), generator.random()
    num_sessions, old_saves, is_new = run.num_sessions(), run.partial_saves(), not run.is_running
    if is_new:
        run.start()
    if moment == "start" and is_new:
        time.sleep(delay * _START_SECONDS)
    else:
        if not run.wait_until(
            lambda: run.num_sessions() >= num_sessions + is_new and run.step() >= step, f"step {step}"
        ):
            return None
        if moment == "save":
            run.wait_until(lambda: bool(run.partial_saves() - old_saves), "a save", _SAVE_POLL_SECONDS)
        else:
            time.sleep(delay * _LONGEST_DELAY_SECONDS)
    processes = run.processes(target, choice)
    if not processes:  # there is no torchrun below the launcher, or no rank yet
        target, processes = "launcher", run.processes("launcher", choice)
    if run.has_finished():
        return None
    at_start = is_new and run.num_sessions() == num_sessions
    in_save = not at_start and bool(run.partial_saves() - old_saves)
    kill = Kill(name, target, run.step(), at_start, in_save)
    num_sessions, start = run.num_sessions(), time.monotonic()
    if name in ("SIGKILL", "SIGTERM", "SIGHUP"):
        _send(processes, signal.Signals[name])
        kill.outcome = run.wait_for_outcome(False, num_sessions, kill.step)
    else:
        _send(processes, signal.SIGSTOP)
        time.sleep(pause_seconds)
        _send(processes[::-1], signal.SIGCONT)
        if at_start:
            has_begun = run.wait_until(lambda: run.num_sessions() > num_sessions, "its first step after a pause")
            kill.outcome = "went on" if has_begun else "finished"
        else:
            kill.outcome = run.wait_for_outcome(True, num_sessions, kill.step)
    kill.seconds = round(time.monotonic() - start, 1)
    return kill


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _summarize(results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    kills = [kill for result in results for kill in result["kills"]]
    verdicts = [result["verdict"] for result in results]
    return {
        "kills": len(kills),
        "kills_by_signal": Counter(kill["signal"] for kill in kills),
        "kills_by_target": Counter(kill["target"] for kill in kills),
        "kills_by_launcher": Counter(result["launcher"] for result in results for _ in result["kills"]),
        "kills_at_start": sum(kill["at_start"] for kill in kills),
        "kills_in_saves": sum(kill["in_save"] for kill in kills),
        "runs": len(results),
        "runs_with_the_same_bits": verdicts.count(_SAME_BITS),
        "runs_with_other_bits": sum(verdict.startswith("differs") for verdict in verdicts),
        "runs_refused_or_failed": sum(not verdict.startswith(("differs", _SAME_BITS)) for verdict in verdicts),
        "starts_that_waited_for_the_folder": sum(result["waits_for_the_folder"] for result in results),
        "seconds": round(seconds),
        "each": results,
    }


def _text(summary: dict[str, Any]) -> str:
    counts = Counter(
        (result["launcher"], kill["signal"], kill["target"]) for result in summary["each"] for kill in result["kills"]
    )
    count_rows = [
        " | ".join([launcher, name, *(str(counts[launcher, name, target] or "") for target in _TARGETS)])
        for launcher in _LAUNCHERS
        for name in _SIGNALS
    ]
    run_rows = [
        f"{result['launcher']} | {result['virtual_ranks'] or 'off'} | {', '.join(map(str, result['world_sizes']))} | "
        f"{len(result['kills'])} | {result['verdict'].partition(chr(10))[0]}"
        for result in summary["each"]
    ]
    return (
        f"{summary['kills']} kills over {summary['runs']} runs in {summary['seconds']} s: "
        f"{summary['runs_with_the_same_bits']} runs ended with the same bits as an uninterrupted run, "
        f"{summary['runs_with_other_bits']} with others; {summary['runs_refused_or_failed']} were refused or failed. "
        f"{summary['kills_at_start']} kills hit a start before its session began, {summary['kills_in_saves']} a save. "
        f"{summary['starts_that_waited_for_the_folder']} starts waited for processes that still saved.\n\n"
        + report.table(" | ".join(["launcher", "signal", *_TARGETS]), count_rows)
        + "\ntorchrun.sh and accelerate have no torchrun below them: they are the agent themselves.\n\n"
        + report.table("launcher | virtual ranks | world sizes | kills | verdict", run_rows)
    )


if __name__ == "__main__":
    sys.exit(main())
