"""How an attempt ended, for the launcher that started it: one small JSON file at the path that the launcher gives.

A launcher of ranks turns every failure into exit code 1, so that the exit code of the one that started it cannot tell
a wrong setting from a rank that died. Who speaks to the user leaves here what its own exit code says, and why.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

VARIABLE = "SAMECURVE_OUTCOME"


def is_asked_for() -> bool:
    """Whether a launcher reads it: then a stop need not be an exit code, which torchrun takes for a failure."""
    return VARIABLE in os.environ


def write(code: int, reason: str) -> None:
    """code: that of trainer/main.py; reason: one line. A disk that is full is told; the run has ended all the same."""
    if not is_asked_for():
        return
    path = Path(os.environ[VARIABLE])
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps({"code": code, "reason": reason}) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        print(f"samecurve: {path} cannot be written ({error.strerror}); the launcher cannot know why", file=sys.stderr)


def read(path: Path) -> tuple[int, str] | None:
    """Code and reason; None when no attempt got so far as to say."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        return int(found["code"]), str(found["reason"])
    except FileNotFoundError:
        return None


def would_repeat(rank: int) -> bool:
    """Whether an earlier attempt of this launch met something that only the user can change: torchrun does not know,
    and starts the ranks again. What else an earlier attempt left is taken away by the first rank."""
    if not is_asked_for():
        return False
    path = Path(os.environ[VARIABLE])
    found = read(path)
    if found is not None and found[0] == 2:
        return True
    if rank == 0:
        path.unlink(missing_ok=True)
    return False
