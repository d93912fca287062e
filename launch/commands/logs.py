"""`samecurve logs RUN`: prints the log of a rank, or the output of the SLURM job if no rank has logged yet.

With --follow it continues until the run is over.
"""

import argparse
import codecs
import os
import sys
import time
from pathlib import Path

from launch.commands.arguments import add_run_argument
from launch.commands.status import print_queue_problem
from launch.runs import tail
from launch.runs.find import find_run
from launch.runs.run import Run, RunPoller, read_runs
from trainer.errors import UserError
from trainer.run.record import is_file
from trainer.text.escape import escape

_POLL_SECONDS = 0.2
_BLOCK_BYTES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="show the log of this rank; default: 0")
    parser.add_argument("--follow", "-f", action="store_true", help="continue until the run is over, or until Ctrl-C")
    parser.add_argument("--lines", type=int, metavar="N", help="start with the last N lines; default: all lines")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run(arguments.run, arguments.root)
    if arguments.lines is not None and arguments.lines < 0:
        raise UserError(f"--lines must be 0 or more, not {arguments.lines}; omit it to print all lines")
    try:
        if arguments.follow:
            _follow(path, arguments.root, arguments.rank, arguments.lines)
        else:
            (run,), queue = read_runs([path], arguments.root)
            print_queue_problem(queue.problem)
            _GrowingFile(_log_path(run, arguments.rank), arguments.lines).print_new()
    except KeyboardInterrupt:
        pass
    return 0


def _log_path(run: Run, rank: int) -> Path:
    """Returns the log of a rank, or the job's output if no rank has a log. Raises UserError if there is neither."""
    folder = run.path / "logs"
    path = folder / f"rank-{rank}.log"
    if path.is_file():
        return path
    numbers = (log.stem.removeprefix("rank-") for log in folder.glob("rank-*.log"))
    ranks = sorted(int(number) for number in numbers if number.isascii() and number.isdecimal())
    if ranks:
        listed = ", ".join(map(str, ranks))
        raise UserError(f"rank {rank} of {run.name} has no log; {folder} has the logs of rank {listed}")
    if run.log and is_file(Path(run.log)):
        note = f"samecurve: {run.name} has no logs of ranks yet; this is the output of job {run.job}, {run.log}"
        print(escape(note), file=sys.stderr)
        return Path(run.log)
    missing = f", and the output of job {run.job}, {run.log}, does not exist" if run.log else ""
    reason = f" ({run.reason})" if run.reason else ""
    raise UserError(f"{run.name} is {run.state}{reason} and has no logs yet{missing}; --follow waits for them")


def _follow(path: Path, root: Path, rank: int, num_lines: int | None) -> None:
    """Prints the log of a rank while it grows, until the run is over."""
    log = _GrowingFile(path / "logs" / f"rank-{rank}.log", num_lines)
    poll_run = RunPoller(path, root)
    run = poll_run()
    if not log.path.is_file() and not run.is_over:
        print(f"samecurve: {run}; waiting for {escape(log.path)}", file=sys.stderr)
    while not run.is_over:
        log.print_new()
        time.sleep(_POLL_SECONDS)
        run = poll_run()
    if not log.path.is_file():
        log = _GrowingFile(_log_path(run, rank), num_lines)
    log.print_new()
    print(f"samecurve: {run}", file=sys.stderr)


class _GrowingFile:
    """Prints a file as it grows, escaped. The file may also be missing at first, or be replaced."""

    def __init__(self, path: Path, num_lines: int | None) -> None:
        """num_lines: how many of the existing lines to print; None: all."""
        self.path, self._num_lines = path, num_lines
        self._position = 0
        self._inode: int | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")

    def print_new(self) -> None:
        """Prints the content added since the last call."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if self._inode is None and self._num_lines is not None:
                    self._position = tail.offset_of_last_lines(file, self._num_lines)
                elif self._inode != stat.st_ino or stat.st_size < self._position:
                    self._position = 0
                    self._decoder.reset()
                self._inode = stat.st_ino
                file.seek(self._position)
                while block := file.read(_BLOCK_BYTES):
                    sys.stdout.write(escape(self._decoder.decode(block), keep="\n\t"))
                    self._position += len(block)
        except FileNotFoundError:
            return
        sys.stdout.flush()
