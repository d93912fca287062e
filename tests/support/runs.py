"""Runs under runs/ of the working folder: how they are started, their state, their differences."""

import json
from pathlib import Path

from launch.verify.compare import compare
from support.processes import SMALL

RUN = [*SMALL, "run.root=runs", "log.tensorboard=true", "train.threads_per_rank=1", "log.every_steps=3"]


VIRTUAL = [*RUN, "train.virtual_ranks=3"]


def status(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((Path("runs") / name / "status.json").read_text())
    return found


def differing(one: str, other: str) -> str:
    found = compare(Path("runs") / one, Path("runs") / other)
    return f"{found}" if found else ""
