"""Runs the collectives of World as one of three ranks; test_world.py reads the results from a JSON file per rank."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import nn

from trainer.config.schema import TrainSettings
from trainer.distributed.world import World
from trainer.errors import DataError, UserError

FOLDER = Path(sys.argv[1])


def error_of(work: Callable[[], object]) -> str:
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def fail_on(ranks: tuple[int, ...], rank: int) -> None:
    if rank in ranks:
        raise DataError(f"from rank {rank}")


def leave_mark(rank: int) -> list[str]:
    """Returns the marks of other ranks, then adds a mark of this one."""
    earlier_marks = sorted(path.name for path in FOLDER.glob("mark-*"))
    (FOLDER / f"mark-{rank}").write_text("")
    return earlier_marks


def results(world: World) -> dict[str, object]:
    rank = world.rank
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, float(rank + 5))
    world.broadcast_module(layer)
    return {
        "rank": rank,
        "size": world.size,
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "sum": world.all_reduce_sum(torch.tensor([rank + 1.0, 10.0])).tolist(),
        "weight": float(layer.weight),
        "max": world.all_reduce_max([float(rank), float(-rank)]),
        "error": error_of(lambda: world.raise_together(lambda: fail_on((1, 2), rank))),
        "no error": error_of(lambda: world.raise_together(lambda: fail_on((), rank))),
        "earlier marks": world.rank0_first(lambda: leave_mark(rank)),
        "from rank 0": world.broadcast_from_rank0(lambda: f"rank {rank}"),
        "equal": error_of(lambda: world.check_equal("settings", "same")),
        "unequal": error_of(lambda: world.check_equal("settings", f"a{rank // 2}")),
    }


def main() -> None:
    with World(TrainSettings(device="cpu")) as world:
        (FOLDER / f"results-{world.rank}.json").write_text(json.dumps(results(world)))


main()
