"""Settings of small test runs under runs/, and readers of their state."""

from pathlib import Path

from launch.verify.compare import compare_runs
from support.processes import SMALL
from trainer.run.record import RunRecord

RUN = [*SMALL, "run.root=runs", "log.tensorboard=true", "train.threads_per_rank=1", "log.every_steps=3"]
RUN += ["train.max_steps=150", "checkpoint.every_steps=10", "data.augment=[flip,crop,cutout]", "schedule.name=constant"]
VIRTUAL = [*RUN, "train.virtual_ranks=3"]


def read_status(name: str) -> dict[str, object]:
    """Returns status.json of a run."""
    return RunRecord(Path("runs") / name).status


def difference_between(first_run: str, second_run: str) -> str:
    """Returns how two runs differ; empty if they have the same bits."""
    difference = compare_runs(Path("runs") / first_run, Path("runs") / second_run)
    return f"{difference}" if difference else ""
