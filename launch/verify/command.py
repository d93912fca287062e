"""The two promises, put to the proof on this machine: the same run on any number of ranks, and after any kill.

    samecurve verify ranks  [--config NAME_OR_PATH]... [--ranks 1,2,4] [--plain] [section.key=value]...
    samecurve verify resume [--config NAME_OR_PATH]... [--ranks 1] [--kills 3] [section.key=value]...

Each run is started as a user would start it. Exit code 0: no difference; 1: a difference; 2: it could not be tried.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from launch.hardware import INSTALL_ROOT
from launch.verify.compare import Difference, compare, largest_loss_difference
from trainer.config.load import find_config_file, load_config
from trainer.errors import UserError
from trainer.run import checkpoint
from trainer.run.folder import RunFolder

_MAIN = str(INSTALL_ROOT / "trainer" / "main.py")
_PLAIN_TOLERANCE = 1e-4
_POLL_SECONDS = 0.002
_START_SECONDS = 8.0  # more or less what a start takes


@dataclass(frozen=True)
class Recipe:
    """What is run, and where."""

    config: list[str]
    overrides: list[str]
    root: Path
    timeout_seconds: float
    settings: list[str] = field(default_factory=list)

    def command(self, name: str, ranks: int) -> list[str]:
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        which = [word for name_or_path in self.config for word in ("--config", name_or_path)]
        return [
            sys.executable, *launcher, _MAIN, *which, *self.settings, *self.overrides,
            f"run.root={self.root}", f"run.name={name}",
        ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["ranks", "resume"])
    parser.add_argument(
        "--ranks", type=_numbers, metavar="N,N,...", help="numbers of processes; default: 1,2,4 for ranks, 1 for resume"
    )
    parser.add_argument("--plain", action="store_true", help="ranks: without virtual ranks; losses within 1e-4 will do")
    parser.add_argument("--kills", type=int, default=3, help="resume: how often the run is killed; default: 3")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; default: 30 for ranks, 300 for resume")
    parser.add_argument(
        "--seed", type=int, help="resume: of the moments at which it is killed; default: another each time"
    )
    parser.add_argument("--keep", metavar="DIR", help="leave the run folders and logs there")
    parser.add_argument("--timeout-seconds", type=float, default=1800.0, help="for each run; default: 1800")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the check that is asked for; returns the exit code."""
    with _root(arguments.keep) as root:
        recipe = Recipe(arguments.config or ["digits"], overrides, root, arguments.timeout_seconds)
        check = verify_ranks if arguments.what == "ranks" else verify_resume
        return check(recipe, arguments)


def verify_ranks(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """The same settings on several numbers of ranks, each against the first."""
    ranks = arguments.ranks or [1, 2, 4]
    settings = ["log.wandb=off", "log.tensorboard=false", "log.every_steps=1", "train.threads_per_rank=1"]
    settings += [f"train.max_steps={arguments.steps or 30}"]
    if not arguments.plain:
        settings.append(f"train.virtual_ranks={max(ranks)}")
    recipe = replace(recipe, settings=settings)
    _check(recipe)
    table = Table("ranks", "seconds", "weights", "optimizer state", "metrics", "largest loss difference")
    first, differs = recipe.root / f"ranks-{ranks[0]}", False
    for number in ranks:
        folder = recipe.root / f"ranks-{number}"
        _to_the_end(recipe, folder.name, number)
        found, by = compare(first, folder), largest_loss_difference(first, folder)
        differs = differs or (by > _PLAIN_TOLERANCE if arguments.plain else bool(found))
        words = [text or "same bits" for text in (found.weights, found.optimizer, found.metrics)]
        table.add_row(str(number), f"{RunFolder(folder).read_json('summary.json')['seconds']:.1f}", *words, f"{by:.1e}")
    _print(table)
    wanted = f"losses within {_PLAIN_TOLERANCE:g}" if arguments.plain else "the same bits"
    print(f"{'DIFFERENT' if differs else 'SAME'}: wanted {wanted} on {', '.join(map(str, ranks))} ranks")
    return int(differs)


@dataclass(frozen=True, slots=True)
class Kill:
    step: int
    """the last one seen in metrics.jsonl"""
    during_save: bool
    """whether it cut one off"""
    left: str
    """the newest checkpoint that verifies"""


@dataclass(frozen=True, slots=True)
class Survival:
    kills: list[Kill]
    difference: Difference
    """of the run that was killed from one that was not"""


def verify_resume(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """One run to its end, and one that is killed at random steps and goes on each time on the next number of ranks."""
    draw = random.Random(arguments.seed)
    found = survive(recipe, arguments.ranks or [1], arguments.steps or 300, arguments.kills, draw)
    for number, kill in enumerate(found.kills, 1):
        when = (f"after step {kill.step}" if kill.step else "before its first line") + (
            ", during a save" if kill.during_save else ""
        )
        print(f"kill {number} of {len(found.kills)}: {when}; {kill.left} is left")
    table = Table("of the killed run", "against the unbroken one")
    for what in ("weights", "optimizer", "metrics", "curves", "results"):
        table.add_row(what, getattr(found.difference, what) or "same bits")
    _print(table)
    print(f"{'DIFFERENT' if found.difference else 'SAME'}: wanted the same bits after {len(found.kills)} kills")
    return int(bool(found.difference))


def survive(recipe: Recipe, ranks: list[int], steps: int, kills: int, draw: random.Random) -> Survival:
    """Runs both under the recipe's root. Raises UserError when one of them cannot go on."""
    settings = ["log.wandb=off", "log.every_steps=3", "train.threads_per_rank=1", "checkpoint.every_steps=10"]
    settings += [f"train.max_steps={steps}"]
    if len(ranks) > 1:
        settings.append(f"train.virtual_ranks={max(ranks)}")
    recipe = replace(recipe, settings=settings)
    _check(recipe)
    _to_the_end(recipe, "unbroken", ranks[0])
    seen = []
    for number, step in enumerate(sorted(draw.randrange(1, steps) for _ in range(kills))):
        # One in five while it starts, reads and rewinds; the others a little after a step.
        at = (None, draw.random() * _START_SECONDS) if draw.random() < 0.2 else (step, draw.random() * 0.02)
        kill = kill_at(recipe, "killed", ranks[number % len(ranks)], *at)
        if kill is not None:
            seen.append(kill)
    _to_the_end(recipe, "killed", ranks[kills % len(ranks)])
    return Survival(seen, compare(recipe.root / "unbroken", recipe.root / "killed"))


def kill_at(recipe: Recipe, name: str, ranks: int, step: int | None, delay_seconds: float) -> Kill | None:
    """Starts or continues a run and kills all its processes a little after it has got to a step, or has been started.

    Returns None for a run that had finished before. Raises UserError for one that failed, or did not get there in time.
    """
    folder = recipe.root / name
    metrics = folder / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    cut_off_before = _cut_off(folder)
    until, seen = time.monotonic() + recipe.timeout_seconds, 0
    with _started(recipe, name, ranks) as process:
        while step is not None and process.poll() is None and seen < step:
            if metrics.exists() and metrics.stat().st_mtime_ns != before:  # this session's
                seen = _last_step(metrics)
            if time.monotonic() > until:
                raise UserError(f"a run on {ranks} ranks did not get to step {step} in {recipe.timeout_seconds:g} s")
            time.sleep(_POLL_SECONDS)
        time.sleep(delay_seconds)
        code = process.poll()
    if code:
        raise UserError(f"a run on {ranks} ranks ended by itself, with exit code {code}{_last_words(recipe, name)}")
    newest, _ = checkpoint.newest_valid(folder / "checkpoints")
    left = newest.name if newest else "no checkpoint"
    return None if code == 0 else Kill(seen, bool(_cut_off(folder) - cut_off_before), left)


def _cut_off(folder: Path) -> set[tuple[str, int]]:
    """The saves that were cut off: their folders, each with the number that tells it from another of that name."""
    return {(path.name, path.stat().st_ino) for path in (folder / "checkpoints").glob(".step-*")}


def _to_the_end(recipe: Recipe, name: str, ranks: int) -> None:
    """Raises UserError when the run does not finish in time."""
    with _started(recipe, name, ranks) as process, contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(recipe.timeout_seconds)
    status = RunFolder(recipe.root / name).read_json("status.json")
    if status is None or status["state"] != "finished":
        raise UserError(f"a run on {ranks} ranks did not finish{_last_words(recipe, name)}")


def _last_words(recipe: Recipe, name: str) -> str:
    """What a run said at its end, and where the rest is."""
    last = (recipe.root / f"{name}.log").read_text(errors="replace").strip().splitlines()
    told = [line for line in last if line.startswith("samecurve: ")][-1:] or last[-1:]
    return f" ({' '.join(told) or 'it said nothing'}); look at {recipe.root / name}.log, with --keep DIR if it is gone"


@contextlib.contextmanager
def _started(recipe: Recipe, name: str, ranks: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run's process; at the end it and all that it started are killed, by their ids."""
    with (recipe.root / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(recipe.command(name, ranks), stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the whole family, the ranks before their launcher, which would start no new ones but complain."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()


def _check(recipe: Recipe) -> None:
    """Raises ConfigError before anything is started."""
    load_config([find_config_file(name) for name in recipe.config], [*recipe.settings, *recipe.overrides])


def _last_step(metrics: Path) -> int:
    lines = [line for line in metrics.read_bytes().splitlines() if line.endswith(b"}")]
    return int(json.loads(lines[-1])["step"]) if lines else 0


@contextlib.contextmanager
def _root(keep: str | None) -> Iterator[Path]:
    """Where the runs go: a folder to be kept, or one that goes when all is done."""
    if keep is not None:
        root = Path(keep).expanduser()
        if root.exists() and any(root.iterdir()):
            raise UserError(f"--keep {keep}: wanted a folder that is empty or not there yet; name another")
        root.mkdir(parents=True, exist_ok=True)
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="samecurve-") as temporary:
        yield Path(temporary)


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def _print(table: Table) -> None:
    """As wide as the terminal; in a file wide enough for every word."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 150).print(table)
