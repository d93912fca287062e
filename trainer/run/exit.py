"""How an attempt ended, for the launcher that started it: one small JSON file at the path that the launcher gives.

A launcher of ranks turns every failure into exit code 1, so that the exit code of the one that started it cannot tell
a wrong setting from a rank that died. Who speaks to the user leaves here what its own exit code says, and why.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from trainer.errors import PeerError, UserError

OUTCOME_VARIABLE = "SAMECURVE_OUTCOME"


def outcome_requested() -> bool:
    """Whether a launcher reads it: then a stop need not be an exit code, which torchrun takes for a failure."""
    return OUTCOME_VARIABLE in os.environ


def write_outcome(code: int, reason: str) -> None:
    """code: that of trainer/main.py; reason: one line. A disk that is full is told; the run has ended all the same."""
    if not outcome_requested():
        return
    path = Path(os.environ[OUTCOME_VARIABLE])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        print(f"samecurve: {path} cannot be written ({error.strerror}); the launcher cannot know why", file=sys.stderr)


def read_outcome(path: Path) -> tuple[int, str] | None:
    """Code and reason; None when no attempt got so far as to say."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return int(found["code"]), str(found["reason"])
    except FileNotFoundError:
        return None


def would_repeat_failure(rank: int) -> bool:
    """Whether an earlier attempt of this launch met something that only the user can change: torchrun does not know,
    and starts the ranks again. What else an earlier attempt left is taken away by the first rank."""
    if not outcome_requested():
        return False
    path = Path(os.environ[OUTCOME_VARIABLE])
    found = read_outcome(path)
    if found is not None and found[0] == 2:
        return True
    if rank == 0:
        path.unlink(missing_ok=True)
    return False


_OTHERS_WAIT_SECONDS = 10.0


def report_user_error(error: UserError, speaks: bool) -> int:
    """One line. Who need not speak waits: a launcher ends all as soon as one is gone, maybe before the line is out.

    One that nobody has ended by then has met something that the others have not, and speaks after all.
    """
    if not speaks:
        time.sleep(_OTHERS_WAIT_SECONDS)
    print(f"samecurve: {error}", file=sys.stderr, flush=True)
    write_outcome(2, str(error))
    return 2


def report_peer_error(error: PeerError, rank: int) -> int:
    """One line; every rank speaks: they may have lost each other in different ways."""
    print(f"samecurve: rank {rank}: {error}", file=sys.stderr, flush=True)
    return 1


def exit_process(code: int) -> NoReturn:
    """All files are closed by now. Python's own end would wait for nothing more, and gloo's threads may abort in it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(code)
