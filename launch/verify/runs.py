"""Starts, kills and resumes real training runs for `samecurve verify`."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from launch.hardware import INSTALL_ROOT, this_machine
from launch.torchrun import torchrun_command
from launch.verify.compare import Difference, compare_runs
from trainer.config.load import find_config_file, load_config
from trainer.distributed.environment import without_launchers
from trainer.errors import UserError
from trainer.run.record import RunRecord

_MAIN = str(INSTALL_ROOT / "trainer" / "main.py")
_POLL_SECONDS = 0.002
_START_SECONDS = 8.0  # roughly the time from a process's start to its first step
_SHARE_KILLED_AT_START = 0.2
_LONGEST_DELAY_SECONDS = 0.02  # between a step and its kill


@dataclass(frozen=True)
class RunSpec:
    """The settings, folder and time limit that the runs of a check have in common."""

    config: list[str]
    """names or paths, as --config takes them"""
    overrides: list[str]
    """the user's section.key=value, which win over check_settings"""
    root: Path
    """folder for the run folders and logs"""
    timeout_seconds: float
    """for each start of a run"""
    check_settings: list[str] = field(default_factory=list)
    """section.key=value that the check needs"""

    def with_settings(self, check_settings: list[str]) -> "RunSpec":
        return replace(self, check_settings=check_settings)

    def check_config(self) -> None:
        """Raises ConfigError if the settings are invalid, before any process starts."""
        load_config([find_config_file(name) for name in self.config], [*self.check_settings, *self.overrides])

    def command(self, name: str, ranks: int) -> list[str]:
        """Returns the command line that starts or resumes the run `name`."""
        launcher = [sys.executable] if ranks == 1 else torchrun_command(this_machine(), ranks)
        config_options = [word for name_or_path in self.config for word in ("--config", name_or_path)]
        return [
            *launcher, _MAIN, *config_options, *self.check_settings, *self.overrides,
            f"run.root={self.root}", f"run.name={name}",
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kill:
    """A SIGKILL of all processes of a run."""

    step: int
    """the last one in metrics.jsonl; 0 if this session has not written a row yet"""
    during_save: bool
    """whether it interrupted the writing of a checkpoint"""
    newest_checkpoint: str | None
    """the folder name of the newest valid checkpoint"""


@dataclass(frozen=True, slots=True)
class ResumeResult:
    kills: list[Kill]
    difference: Difference
    """between the uninterrupted run and the killed run"""


def kill_and_compare(
    spec: RunSpec, world_sizes: list[int], steps: int, num_kills: int, generator: random.Random
) -> ResumeResult:
    """Trains one uninterrupted run and one that is killed `num_kills` times at random, and compares them.

    The killed run uses the next of `world_sizes` at each start. Kills can be fewer than `num_kills` if the run finishes
    first. Raises UserError when a run fails, or does not finish in time.
    """
    settings = ["log.wandb=off", "log.every_steps=3", "train.threads_per_rank=1", "checkpoint.every_steps=10"]
    settings += [f"train.max_steps={steps}"]
    if len(world_sizes) > 1:
        settings.append(f"train.virtual_ranks={max(world_sizes)}")
    spec = spec.with_settings(settings)
    spec.check_config()
    run_to_end(spec, "uninterrupted", world_sizes[0])
    kills = []
    for number, kill_step in enumerate(sorted(generator.randrange(1, steps) for _ in range(num_kills))):
        step: int | None = kill_step
        if generator.random() < _SHARE_KILLED_AT_START:  # while it imports, reads the data and loads the checkpoint
            step, delay_seconds = None, generator.random() * _START_SECONDS
        else:
            delay_seconds = generator.random() * _LONGEST_DELAY_SECONDS
        kill = kill_run(spec, "killed", world_sizes[number % len(world_sizes)], step, delay_seconds)
        if kill is not None:
            kills.append(kill)
    run_to_end(spec, "killed", world_sizes[num_kills % len(world_sizes)])
    return ResumeResult(kills, compare_runs(spec.root / "uninterrupted", spec.root / "killed"))


def kill_run(spec: RunSpec, name: str, ranks: int, step: int | None, delay_seconds: float) -> Kill | None:
    """Starts or resumes a run and kills all its processes `delay_seconds` after `step`, or after the start if None.

    Returns None if the run finished first. Raises UserError if it failed, or did not reach the step in time.
    """
    folder = spec.root / name
    metrics = folder / "metrics.jsonl"
    modified_before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    partial_saves_before = _partial_saves(folder)
    with _started(spec, name, ranks) as process:
        last_step = 0
        if step is not None:
            last_step = _wait_for_step(process, metrics, modified_before, step, spec.timeout_seconds)
        time.sleep(delay_seconds)
        exit_code = process.poll()
    if exit_code:
        raise UserError(f"a run on {ranks} ranks failed with exit code {exit_code}{_log_hint(spec, name)}")
    if exit_code == 0:
        return None
    from trainer.run import checkpoint  # lazy import: torch takes 2 s

    newest, _ = checkpoint.find_newest_valid(folder / "checkpoints")
    return Kill(last_step, bool(_partial_saves(folder) - partial_saves_before), newest.name if newest else None)


def _wait_for_step(
    process: "subprocess.Popen[bytes]", metrics: Path, modified_before: int, step: int, timeout_seconds: float
) -> int:
    """Waits until this session has written a row of `step` or later, or has ended. Returns its last step.

    modified_before: st_mtime_ns of metrics.jsonl before this session started; until it changes, the rows are older.
    """
    deadline, last_step = time.monotonic() + timeout_seconds, 0
    while process.poll() is None and last_step < step:
        if metrics.exists() and metrics.stat().st_mtime_ns != modified_before:
            last_step = _last_step(metrics)
        if time.monotonic() > deadline:
            raise UserError(
                f"run {metrics.parent.name} did not reach step {step} in {timeout_seconds:g} s; give it more time with "
                "--timeout-seconds"
            )
        time.sleep(_POLL_SECONDS)
    return last_step


def run_to_end(spec: RunSpec, name: str, ranks: int) -> None:
    """Starts or resumes a run and waits for its end. Raises UserError if it does not finish in time."""
    with _started(spec, name, ranks) as process, contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(spec.timeout_seconds)
    if RunRecord(spec.root / name).status.get("state") != "finished":
        raise UserError(f"a run on {ranks} ranks did not finish{_log_hint(spec, name)}")


@contextlib.contextmanager
def _started(spec: RunSpec, name: str, ranks: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a run's process; at the end kills it and all its descendants, by process id."""
    with (spec.root / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            spec.command(name, ranks),
            env=without_launchers(os.environ),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _kill_with_descendants(process)


def _kill_with_descendants(process: "subprocess.Popen[bytes]") -> None:
    """Sends SIGKILL to the ranks first and to their launcher last, then waits for all."""
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(process.pid).children(recursive=True)
        for descendant in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
        process.kill()
        psutil.wait_procs(descendants, timeout=10)
    process.wait()


def _partial_saves(folder: Path) -> set[tuple[str, int]]:
    """Returns the folders of interrupted saves. The inode tells apart two saves of the same step."""
    return {(path.name, path.stat().st_ino) for path in (folder / "checkpoints").glob(".step-*")}


def _last_step(metrics: Path) -> int:
    lines = [line for line in metrics.read_bytes().splitlines() if line.endswith(b"}")]  # the last may be incomplete
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _log_hint(spec: RunSpec, name: str) -> str:
    """Returns the last line of a run's log, an error message if it has one, and the path of the log."""
    log = spec.root / f"{name}.log"
    lines = log.read_text(errors="replace").strip().splitlines()
    message = [line for line in lines if line.startswith("samecurve: ")][-1:] or lines[-1:] or ["its log is empty"]
    return f" ({message[0]}); read {log}, which --keep DIR preserves"
