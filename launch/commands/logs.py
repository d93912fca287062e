"""`samecurve logs RUN`: what a rank has to say, or what SLURM has of its job before it came to training; once, or on
and on until the run is over."""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from launch.commands.arguments import add_run
from launch.commands.status import tell_trouble
from launch.runs import records
from launch.runs.run import Run, RunPoller, find_run, read_runs
from trainer.errors import UserError

_POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="whose; default: 0")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run is over, or Ctrl-C")
    parser.add_argument("--lines", type=int, metavar="N", help="begin with the last N lines; default: all")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run(arguments.run, arguments.root)
    if arguments.lines is not None and arguments.lines < 0:
        raise UserError(f"--lines {arguments.lines}: wanted 0 or more")
    try:
        if arguments.follow:
            _follow(path, arguments.root, arguments.rank, arguments.lines)
        else:
            (run,), queue = read_runs([path], arguments.root)
            tell_trouble(queue.trouble)
            _Tail(_file(run, arguments.rank), arguments.lines).show()
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:  # whoever read it, such as head, has seen enough; Python's end would say so once more
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _file(run: Run, rank: int) -> Path:
    """The log of a rank, else that of the job if the run has not come to training. Raises UserError."""
    folder = run.path / "logs"
    file = folder / f"rank-{rank}.log"
    if file.is_file():
        return file
    ranks = sorted(int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.log"))
    if ranks:
        listed = ", ".join(map(str, ranks))
        raise UserError(f"rank {rank} of {run.name} has no log; there are those of rank {listed} in {folder}")
    if run.log and Path(run.log).is_file():
        print(f"samecurve: {run.name} has no logs of ranks yet; this is job {run.job}'s {run.log}", file=sys.stderr)
        return Path(run.log)
    where = f", and {run.log}, where job {run.job} writes, is not there" if run.log else ""
    reason = f" ({run.reason})" if run.reason else ""
    raise UserError(f"{run.name} is {run.state}{reason} and has no logs yet{where}; --follow waits for them")


def _follow(path: Path, root: Path, rank: int, lines: int | None) -> None:
    """Shows what is added, until the run is over and all is shown."""
    tail = _Tail(path / "logs" / f"rank-{rank}.log", lines)
    look = RunPoller(path, root)
    run = look()
    if not tail.path.is_file() and not run.is_over:
        print(f"samecurve: {run}; waiting for {tail.path}", file=sys.stderr)
    while not run.is_over:
        tail.show()
        time.sleep(_POLL_SECONDS)
        run = look()
    if not tail.path.is_file():
        tail = _Tail(_file(run, rank), lines)
    tail.show()
    print(f"samecurve: {run}", file=sys.stderr)


class _Tail:
    """A file that grows, is written anew or is not there yet."""

    def __init__(self, path: Path, lines: int | None) -> None:
        """lines: as many of those that are there already; None: all."""
        self.path, self._lines = path, lines
        self._position = 0
        self._inode: int | None = None

    def show(self) -> None:
        """What has been added since the last time."""
        try:
            with self.path.open("rb") as file:
                about = os.fstat(file.fileno())
                if self._inode is None and self._lines is not None:
                    self._position = records.start_of_last(file, self._lines)
                elif self._inode != about.st_ino or about.st_size < self._position:
                    self._position = 0
                self._inode = about.st_ino
                file.seek(self._position)
                while block := file.read(1 << 16):
                    sys.stdout.buffer.write(block)
                    self._position += len(block)
        except FileNotFoundError:
            return
        sys.stdout.flush()
