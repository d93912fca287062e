"""Ends a process: prints the error, writes the outcome file for the launcher, exits.

A launcher starts the ranks through torchrun, which turns each failure into exit code 1. Its exit code does not tell a
wrong setting from a rank that died. A rank therefore writes its exit code and the reason to a small JSON file, at the
path in SAMECURVE_OUTCOME.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from trainer.errors import PeerError, UserError

OUTCOME_VARIABLE = "SAMECURVE_OUTCOME"
_USER_ERROR_CODE = 2
_REPORTER_SECONDS = 10.0  # time for the reporting rank to print the error


def is_outcome_requested() -> bool:
    """Returns whether a launcher reads the outcome file. Then a stopped run exits with 0, because torchrun takes other
    exit codes for failures."""
    return OUTCOME_VARIABLE in os.environ


def write_outcome(code: int, reason: str) -> None:
    """Writes the outcome file, if a launcher reads it. Only prints a warning if the disk is full.

    code: exit code of trainer/main.py.
    reason: one line.
    """
    if not is_outcome_requested():
        return
    path = Path(os.environ[OUTCOME_VARIABLE])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        print(
            f"samecurve: {path} cannot be written ({error.strerror}); the launcher does not get the reason of the exit",
            file=sys.stderr,
        )


def read_outcome(path: Path) -> tuple[int, str] | None:
    """Returns exit code and reason; None if no rank has written them."""
    try:
        outcome: Any = json.loads(path.read_text(encoding="utf-8"))
        return int(outcome["code"]), str(outcome["reason"])
    except FileNotFoundError:
        return None


def would_repeat_failure(rank: int) -> bool:
    """Returns whether an earlier attempt of this launch failed by a user error, which another attempt would repeat.

    torchrun does not know the reason and starts the ranks again. Rank 0 removes any other outcome of earlier attempts.
    """
    if not is_outcome_requested():
        return False
    path = Path(os.environ[OUTCOME_VARIABLE])
    outcome = read_outcome(path)
    if outcome is not None and outcome[0] == _USER_ERROR_CODE:
        return True
    if rank == 0:
        path.unlink(missing_ok=True)
    return False


def report_user_error(error: UserError, is_reporter: bool) -> int:
    """Prints the error in one line, writes the outcome and returns the exit code.

    is_reporter: this rank prints for all. The other ranks wait first: a launcher ends all ranks when one exits, perhaps
    before the reporter has printed. A rank that is still alive after 10 s has an error of its own and prints it.
    """
    if not is_reporter:
        time.sleep(_REPORTER_SECONDS)
    print(f"samecurve: {error}", file=sys.stderr, flush=True)
    write_outcome(_USER_ERROR_CODE, str(error))
    return _USER_ERROR_CODE


def report_peer_error(error: PeerError, rank: int) -> int:
    """Prints the error in one line and returns the exit code. Each rank prints: each may have lost another peer."""
    print(f"samecurve: rank {rank}: {error}", file=sys.stderr, flush=True)
    return 1


def exit_process(code: int) -> NoReturn:
    """Exits at once. Call it after all files are closed: gloo's threads may abort during Python's normal exit."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
