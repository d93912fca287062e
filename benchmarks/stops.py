"""Kills, stops and suspends launchers and ranks at random moments, each time starts the same command at once, and
compares the bits.

    python benchmarks/stops.py [--kills 60] [--kills-per-run 6] [--seed 0] [--launchers samecurve torchrun accelerate]

Each run is started by one launcher and hit by SIGKILL, SIGTERM, SIGHUP or a pause (SIGSTOP, then SIGCONT), on the
launcher, torchrun's agent, one rank or all ranks. Writes stops.json and stops.md. Exits with 1 if a run differs from
its undisturbed twin, or if a start was refused or failed.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import report
from report import MAIN, REPOSITORY

from launch.verify.compare import compare_runs
from trainer.run.record import RunRecord

_STEPS = 600
_SETTINGS = [
    "--config", "digits", "model.name=lenet", "train.virtual_ranks=2", "train.threads_per_rank=1", "train.device=cpu",
    "train.precision=fp32", f"train.max_steps={_STEPS}", "train.epochs=9999", "checkpoint.every_steps=20",
    "log.every_steps=3", "log.wandb=off", "log.figures=false", "train.hang_timeout_seconds=30",
]  # fmt: skip
_ACCELERATE_CONFIG = str(REPOSITORY / "launch" / "accelerate" / "multi_cpu.yaml")
_SHARE_AT_START = 0.2
_START_SECONDS = 8.0  # roughly the time from a process's start to its first step
_PAUSE_SECONDS = (2.0, 10.0)
_TARGETS = ("launcher", "agent", "rank 0", "rank 1", "all ranks", "all")
_KINDS = ("SIGKILL", "SIGTERM", "SIGHUP", "pause")
_POLL_SECONDS = 0.02


@dataclass(slots=True)
class Hit:
    """One signal, or one pause."""

    launcher: str
    kind: str
    target: str
    step: int
    """the last one in metrics.jsonl before it; of the run, not of the session"""
    at_start: bool
    """whether it came before the first step of its session"""
    outcome: str = ""
    """ended CODE, restarted by its launcher, went on, or finished before"""
    seconds: float = 0.0
    """until the outcome"""


class Failure(Exception):
    """A run that was refused, failed, or did not answer in time. Its text ends with the log."""


class DisturbedRun:
    """A run that is hit again and again."""

    def __init__(self, root: Path, launcher: str, max_restarts: int, timeout_seconds: float) -> None:
        self.root, self.launcher = root, launcher
        self._max_restarts, self._timeout_seconds = max_restarts, timeout_seconds
        self.folder, self.log = root / "disturbed", root / "disturbed.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = [*_SETTINGS, f"run.root={self.root}", "run.name=disturbed"]
        restarts = str(self._max_restarts)
        commands = {
            "samecurve": [
                sys.executable, str(REPOSITORY / "launch" / "main.py"), "train", "--ranks", "2",
                "--max-restarts", restarts, *settings,
            ],
            "torchrun": ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), *settings],
            "accelerate": [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", _ACCELERATE_CONFIG,
                "--max_restarts", restarts, "--main_process_port", "0", MAIN, *settings,
            ],
        }  # fmt: skip
        environment = os.environ | {"RANKS": "2", "RESTARTS": restarts, "SAMECURVE_PYTHON": sys.executable}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                commands[self.launcher], stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def num_waits(self) -> int:
        """Returns how many starts found the folder held by processes that still saved, and waited."""
        return self.log.read_text(errors="replace").count(" is in use by ")

    def step(self) -> int:
        """Returns the last step in metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        steps = [json.loads(line)["step"] for line in lines[-3:] if line.endswith(b"}")]
        return max(steps, default=0)

    def num_sessions(self) -> int:
        path = self.folder / "starts.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_until_trains(self, sessions_before: int, step: int) -> bool:
        """Waits for a row of `step` or later of a new session. Returns False if the run has finished first."""
        deadline = time.monotonic() + self._timeout_seconds
        while self.num_sessions() <= sessions_before or self.step() < step:
            code = self._code()
            if code == 0 and self.is_finished():
                return False
            if code is not None:
                raise self.failure(f"ended with {code} before step {step}")
            if time.monotonic() > deadline:
                raise self.failure(f"did not reach step {step}")
            time.sleep(_POLL_SECONDS)
        return True

    def is_finished(self) -> bool:
        return RunRecord(self.folder).status.get("state") == "finished"

    def processes(self, target: str) -> list[psutil.Process]:
        """Returns the processes of a target that exist now, those nearest to the launcher first."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            descendants = launcher.children(recursive=True)
            ranks = {rank: process for process in descendants if (rank := _rank_of(process)) is not None}
            agents = [process for process in descendants if _is_agent(process)] or [launcher]
            if target.startswith("rank"):
                return [ranks[int(target[5:])]] if int(target[5:]) in ranks else []
            chosen = {"launcher": [launcher], "agent": agents, "all ranks": [*ranks.values()]}
            return chosen.get(target, [launcher, *agents, *ranks.values()])
        return []

    def wait_for_outcome(self, kind: str, sessions_before: int, step: int) -> str:
        """Waits until the launcher has ended, or has restarted its ranks, or the run has gone on."""
        deadline = time.monotonic() + self._timeout_seconds
        while (code := self._code()) is None:
            if self.num_sessions() > sessions_before:
                return "restarted by its launcher"
            if kind == "pause" and self.step() > step + 3:
                return "went on"
            if time.monotonic() > deadline:
                raise self.failure(f"neither ended nor went on after {kind}")
            time.sleep(_POLL_SECONDS)
        if code == 2:
            raise self.failure("was refused")
        return "finished before" if code == 0 and self.is_finished() else f"ended {code}"

    def _code(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    def finish(self) -> None:
        """Lets the run train to its end."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(self._timeout_seconds)
        if not self.is_finished():
            raise self.failure(f"did not finish (exit code {self._code()})")

    def failure(self, what: str) -> Failure:
        return Failure(f"{self.launcher}: {what}\n{self.log.read_text(errors='replace')[-3000:]}")

    def end(self) -> None:
        """Kills what is left of the run."""
        for process in self.processes("all")[::-1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in _ranks_of(self.root):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _rank_of(process: psutil.Process) -> int | None:
    """Returns the rank of a process of the trainer; None for another process."""
    with contextlib.suppress(psutil.Error):
        words, environment = process.cmdline(), process.environ()
        is_trainer = any(word.endswith("trainer/main.py") for word in words) and not _is_agent(process)
        if is_trainer and "RANK" in environment:
            return int(environment["RANK"])
    return None


def _is_agent(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(word.endswith("launch/elastic.py") or "accelerate.commands" in word for word in process.cmdline())
    return False


def _ranks_of(root: Path) -> list[psutil.Process]:
    """Returns the ranks of runs under a folder, orphans included."""
    ranks = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"run.root={root}" in process.cmdline():
                ranks.append(process)
    return ranks


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=180, help="seconds for each start and each end")
    parser.add_argument("--launchers", nargs="+", default=["samecurve", "torchrun", "accelerate"])
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    start, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        twin = _train_twin(Path(folder))
        for number in range(-(-arguments.kills // arguments.kills_per_run)):
            num_hits = min(arguments.kills_per_run, arguments.kills - number * arguments.kills_per_run)
            root = Path(folder) / str(number)
            root.mkdir()
            launcher = arguments.launchers[number % len(arguments.launchers)]
            run = DisturbedRun(root, launcher, generator.choice([0, 3]), arguments.timeout)
            runs.append(_disturb(run, num_hits, generator, twin))
            print(f"run {number + 1}: {launcher}, {len(runs[-1]['hits'])} hits: {runs[-1]['verdict']}", flush=True)
    result: dict[str, Any] = {
        "kills": sum(len(run["hits"]) for run in runs),
        "runs": len(runs),
        "runs_with_the_same_bits": sum(run["verdict"] == "same bits" for run in runs),
        "starts_that_waited_for_the_folder": sum(run["waits_for_the_folder"] for run in runs),
        "seconds": round(time.perf_counter() - start),
        "each": runs,
    }
    text = _text(result)
    report.write(arguments.output, "stops", __doc__, result, text)
    print(text)
    return int(result["runs_with_the_same_bits"] != result["runs"])


def _train_twin(root: Path) -> Path:
    """Trains the same run in one process without disturbances. Returns its folder."""
    command = [sys.executable, MAIN, *_SETTINGS, f"run.root={root}", "run.name=twin"]
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
    return root / "twin"


def _disturb(run: DisturbedRun, num_hits: int, generator: random.Random, twin: Path) -> dict[str, Any]:
    """Hits a run at random moments and lets it finish."""
    hits: list[Hit] = []
    try:
        for step in sorted(generator.randrange(1, _STEPS - 60) for _ in range(num_hits)):
            hit = _hit_once(run, step, generator)
            hits += [hit] if hit is not None else []
        if run.process is None or run.process.poll() is not None:
            run.start()
        run.finish()
        difference = compare_runs(twin, run.folder)
        verdict = str(difference) if difference else "same bits"
    except Failure as failure:
        verdict = str(failure)
    finally:
        run.end()
    each_hit = [asdict(hit) for hit in hits]
    return {"launcher": run.launcher, "hits": each_hit, "waits_for_the_folder": run.num_waits(), "verdict": verdict}


def _hit_once(run: DisturbedRun, step: int, generator: random.Random) -> Hit | None:
    """Starts the run unless it trains already, hits it once and waits for the outcome. None: it has finished before."""
    sessions_before = run.num_sessions()
    has_started = run.process is None or run.process.poll() is not None
    if has_started:
        run.start()
    kind, target = generator.choice(_KINDS), generator.choice(_TARGETS)
    at_start = has_started and generator.random() < _SHARE_AT_START
    if at_start:
        time.sleep(generator.random() * _START_SECONDS)
    elif not run.wait_until_trains(sessions_before if has_started else sessions_before - 1, step):
        return None
    time.sleep(generator.random() * 0.2)
    hit = Hit(run.launcher, kind, target, run.step(), at_start and run.num_sessions() == sessions_before)
    sessions_before = run.num_sessions()
    processes = run.processes(target) or run.processes("launcher")
    start = time.monotonic()
    if kind == "pause":
        _signal(processes, signal.SIGSTOP)
        time.sleep(generator.uniform(*_PAUSE_SECONDS))
        _signal(processes[::-1], signal.SIGCONT)
        sessions_before += hit.at_start  # the session that it starts is not a restart
    else:
        _signal(processes, signal.Signals[kind])
    if hit.at_start and kind == "pause":
        hit.outcome = "went on" if run.wait_until_trains(sessions_before - 1, 1) else "finished before"
    else:
        hit.outcome = run.wait_for_outcome(kind, sessions_before, hit.step)
    hit.seconds = round(time.monotonic() - start, 1)
    print(f"   {hit.launcher}: {hit.kind} to {hit.target} at step {hit.step}: {hit.outcome}", flush=True)
    return hit


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _text(result: dict[str, Any]) -> str:
    hits = [hit for run in result["each"] for hit in run["hits"]]
    counts = Counter((hit["launcher"], hit["kind"], hit["target"]) for hit in hits)
    rows = []
    for launcher in sorted({hit["launcher"] for hit in hits}):
        for kind in _KINDS:
            numbers = [str(counts[launcher, kind, target] or "") for target in _TARGETS]
            rows.append(" | ".join([launcher, kind, *numbers]))
    failures = [run["verdict"].splitlines()[0] for run in result["each"] if run["verdict"] != "same bits"]
    return (
        f"{result['kills']} signals and pauses over {result['runs']} runs in {result['seconds']} s: "
        f"{result['runs_with_the_same_bits']} runs ended with the same bits as an undisturbed run; "
        f"{len([hit for hit in hits if hit['at_start']])} came before the first step of a session; "
        f"{result['starts_that_waited_for_the_folder']} starts waited for processes that still saved.\n\n"
        + report.table(" | ".join(["launcher", "signal", *_TARGETS]), rows)
        + "".join(f"\n- {failure}" for failure in failures)
    )


if __name__ == "__main__":
    sys.exit(main())
