"""`samecurve verify`: checks on this machine that world size and interruptions do not change a run.

    samecurve verify ranks  [--config NAME_OR_PATH]... [--ranks 1,2,4] [--plain] [section.key=value]...
    samecurve verify resume [--config NAME_OR_PATH]... [--ranks 1] [--kills 3] [section.key=value]...

`ranks` trains the same settings on several world sizes. `resume` kills a run at random moments, resumes it each time,
and compares it with an uninterrupted run. Every run is a process that starts as a user would start it.
Exit code 0: the runs are the same; 1: they differ; 2: the check could not be done.
"""

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.verify.compare import compare_runs, largest_loss_difference
from launch.verify.runs import RunSpec, kill_and_compare, run_to_end
from trainer.errors import UserError
from trainer.run.record import RunRecord

_PLAIN_TOLERANCE = 1e-4  # of a training loss, relative
_RESULT_NAMES = {
    "weights": "weights",
    "optimizer": "optimizer state",
    "metrics": "metrics",
    "curves": "TensorBoard curves",
    "results": "results",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument(
        "check", choices=["ranks", "resume"], help="ranks: compare world sizes; resume: compare with a killed run"
    )
    parser.add_argument(
        "--ranks",
        type=_parse_world_sizes,
        metavar="N,N,...",
        help="world sizes; resume uses the next one after each kill; default: 1,2,4 for ranks, 1 for resume",
    )
    parser.add_argument(
        "--plain", action="store_true", help="ranks: train without virtual ranks; losses must agree within 1e-4"
    )
    parser.add_argument("--kills", type=int, default=3, help="resume: number of times the run is killed; default: 3")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run; default: 30 for ranks, 300 for resume")
    parser.add_argument(
        "--seed", type=int, help="resume: seed of the moments of the kills; default: a new one each time"
    )
    parser.add_argument("--keep", metavar="DIR", help="an empty or new folder to keep the run folders and logs in")
    parser.add_argument("--timeout-seconds", type=float, default=1800.0, help="limit for each run; default: 1800")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the chosen check. Returns 0 if the runs are the same, 1 if they differ.

    Raises UserError when a run fails, or does not finish in time.
    """
    with _root_folder(arguments.keep) as root:
        spec = RunSpec(arguments.config or ["digits"], overrides, root, arguments.timeout_seconds)
        check = verify_ranks if arguments.check == "ranks" else verify_resume
        return check(spec, arguments)


def verify_ranks(spec: RunSpec, arguments: argparse.Namespace) -> int:
    """Trains on each world size and compares each run with the first. Returns the exit code."""
    world_sizes = arguments.ranks or [1, 2, 4]
    settings = ["log.wandb=off", "log.tensorboard=false", "log.every_steps=1", "train.threads_per_rank=1"]
    settings += [f"train.max_steps={arguments.steps or 30}"]
    if not arguments.plain:
        settings.append(f"train.virtual_ranks={max(world_sizes)}")
    spec = spec.with_settings(settings)
    spec.check_config()
    columns = ("weights", "optimizer", "metrics", "results")
    table = Table("ranks", "seconds", *(_RESULT_NAMES[column] for column in columns), "largest loss difference")
    first_run, is_different = spec.root / f"ranks-{world_sizes[0]}", False
    for world_size in world_sizes:
        folder = spec.root / f"ranks-{world_size}"
        run_to_end(spec, folder.name, world_size)
        difference, loss_difference = compare_runs(first_run, folder), largest_loss_difference(first_run, folder)
        is_different |= loss_difference > _PLAIN_TOLERANCE if arguments.plain else bool(difference)
        cells = [getattr(difference, column) or "same bits" for column in columns]
        seconds = RunRecord(folder).summary["seconds"]
        table.add_row(str(world_size), f"{seconds:.1f}", *cells, f"{loss_difference:.1e}")
    _print_table(table)
    expected = f"losses within {_PLAIN_TOLERANCE:g}" if arguments.plain else "the same bits"
    print(f"{_verdict(is_different)}: expected {expected} on {', '.join(map(str, world_sizes))} ranks")
    return int(is_different)


def verify_resume(spec: RunSpec, arguments: argparse.Namespace) -> int:
    """Compares a run that is killed and resumed with an uninterrupted run. Returns the exit code."""
    generator = random.Random(arguments.seed)
    result = kill_and_compare(spec, arguments.ranks or [1], arguments.steps or 300, arguments.kills, generator)
    for number, kill in enumerate(result.kills, 1):
        moment = f"after step {kill.step}" if kill.step else "before its first row of metrics"
        moment += ", during a save" if kill.during_save else ""
        checkpoint = f"newest checkpoint {kill.newest_checkpoint}" if kill.newest_checkpoint else "no checkpoint"
        print(f"kill {number} of {len(result.kills)}: {moment}; {checkpoint}")
    table = Table("compared", "killed and resumed run against uninterrupted run")
    for field, name in _RESULT_NAMES.items():
        table.add_row(name, getattr(result.difference, field) or "same bits")
    _print_table(table)
    print(f"{_verdict(bool(result.difference))}: expected the same bits after {len(result.kills)} kills")
    return int(bool(result.difference))


def _verdict(is_different: bool) -> str:
    return "DIFFERENT" if is_different else "SAME"


@contextlib.contextmanager
def _root_folder(keep: str | None) -> Iterator[Path]:
    """Yields the folder for the runs: `keep`, or a temporary folder that is removed at the end."""
    if keep is not None:
        root = Path(keep).expanduser()
        if root.exists() and any(root.iterdir()):
            raise UserError(f"--keep {keep}: expected an empty or new folder, but it has files; choose another folder")
        root.mkdir(parents=True, exist_ok=True)
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="samecurve-") as temporary:
        yield Path(temporary)


def _parse_world_sizes(text: str) -> list[int]:
    try:
        world_sizes = [int(word) for word in text.split(",")]
    except ValueError:
        world_sizes = [0]
    if min(world_sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected world sizes such as 1,2,4, got '{text}'")
    return world_sizes


def _print_table(table: Table) -> None:
    """Prints as wide as the terminal; in a file or a pipe wide enough for each cell to fit on one line."""
    Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 150).print(table)
