"""What one rank of test_world.py does; prints what it saw as a line of JSON."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import nn

from trainer.config.schema import TrainSettings
from trainer.distributed.world import World
from trainer.errors import DataError

FOLDER = Path(sys.argv[1])


def refused(work: object, world: World) -> str:
    try:
        world.raise_together(work)  # type: ignore[arg-type]
    except DataError as error:
        return str(error)
    return ""


def fails_on(ranks: tuple[int, ...], rank: int) -> None:
    if rank in ranks:
        raise DataError(f"from rank {rank}")


def leave_a_mark(rank: int) -> list[str]:
    seen = sorted(path.name for path in FOLDER.glob("mark-*"))
    (FOLDER / f"mark-{rank}").write_text("")
    return seen


def main() -> None:
    with World(TrainSettings(device="cpu")) as world:
        work(world)


def work(world: World) -> None:
    rank = world.rank
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, float(rank + 5))
    world.broadcast_module(layer)
    seen = {
        "rank": rank,
        "size": world.size,
        "threads": torch.get_num_threads(),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "sum": world.all_reduce_sum(torch.tensor([rank + 1.0, 10.0])).tolist(),
        "weight": float(layer.weight),
        "largest": world.all_reduce_max([float(rank), float(-rank)]),
        "together": refused(lambda: fails_on((1, 2), rank), world),
        "no error": refused(lambda: fails_on((), rank), world),
        "first": world.rank0_first(lambda: leave_a_mark(rank)),
        "from first": world.broadcast_from_rank0(lambda: f"rank {rank}"),
    }
    (FOLDER / f"seen-{rank}.json").write_text(json.dumps(seen))


main()
