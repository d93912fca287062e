"""Sums through the memory that the ranks of one machine share: real processes, thousands of meetings."""

import json
import os
import random
import resource
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import SMALL, Ranks
from torch import Tensor

from trainer import neighbors, shards, world
from trainer.near_sums import NearSums, place_bytes
from trainer.settings import Train
from trainer.stopwatch import Stopwatch
from trainer.world import World

LENGTHS = (5000, 1, 77)
needs_neighbors = pytest.mark.skipif(not neighbors._machine(), reason="needs Linux on x86-64")


def tensors(rank: int, turn: int) -> list[Tensor]:
    """What a rank lays down: other numbers for each rank and turn, of two types."""
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    first, second, third = (torch.randn(length, generator=generator) for length in LENGTHS)
    return [first, second.double(), third]


def in_order(parts: list[Tensor]) -> Tensor:
    """Their sum, along the tree."""
    blocks = [((rank, rank + 1), part) for rank, part in enumerate(parts)]
    return shards.add_up(blocks, len(parts), torch.add)


def draw_of(rank: int, turn: int) -> float:
    return float((7 * rank + turn) % 5)


def adds(env: dict[str, str], log: str, turns: int) -> None:
    """Compares the sums of many turns, bit for bit, some ranks now and then late by more than others spin for."""
    forked.become_rank(env, log)
    with World(Train(device="cpu")) as world:
        near = world.share(place_bytes(tensors(world.rank, 0), 1))
        assert near is not None and world.describe()["gradient_exchange"] == "shared memory"
        sums = NearSums(near, Stopwatch())
        draw = random.Random(world.rank)
        wrong = 0
        for turn in range(turns):
            own = tensors(world.rank, turn)
            if draw.random() < 0.02:
                time.sleep(draw.choice([0.0003, 0.02]))
            for tensor in own if turn % 3 else own[1:]:  # what is laid changes from turn to turn
                sums.lay([tensor], tensor, world.size)
            sums.add()
            every = [tensors(rank, turn) for rank in range(world.size)]
            expected = [in_order([each[index] for each in every]) for index in range(len(own))]
            compared = slice(0 if turn % 3 else 1, None)
            if turn % 7 == 0:
                wrong += world.largest([draw_of(rank, turn) for rank in (world.rank, 0)]) != [
                    max(draw_of(rank, turn) for rank in range(world.size)),
                    draw_of(0, turn),
                ]
            wrong += any(not torch.equal(a, b) for a, b in zip(own[compared], expected[compared], strict=True))
        Path(f"wrong-{world.rank}").write_text(str(wrong))


@needs_neighbors
@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_have_the_sum_along_the_tree(ranks: Ranks, size: int) -> None:
    assert ranks.end(ranks.call(size, adds, 600)) == [0] * size, ranks.log.read_text()
    assert [Path(f"wrong-{rank}").read_text() for rank in range(size)] == ["0"] * size


def waits(env: dict[str, str], log: str) -> None:
    """Rank 1 never comes to the second sum; rank 0 tells what it heard of that."""
    forked.become_rank(env, log)
    near = World(Train(device="cpu")).share(64)
    assert near is not None
    for turn in range(2):
        if turn and env["RANK"] == "1":
            Path("pid").write_text(str(os.getpid()))
            time.sleep(600)
        try:
            near.meet()
        except RuntimeError as error:
            Path("heard").write_text(str(error))
            os._exit(0)


@needs_neighbors
def test_a_rank_that_ends_is_not_waited_for(ranks: Ranks) -> None:
    started = ranks.call(2, waits)
    ranks.until("the second turn", lambda: Path("pid").exists())
    os.kill(started[1].pid, signal.SIGKILL)
    assert ranks.end([started[0]]) == [0]
    assert Path("heard").read_text() == f"connection closed by peer: process {started[1].pid} has ended"


@needs_neighbors
def test_a_rank_that_does_not_come_is_not_waited_for_ever(ranks: Ranks) -> None:
    started = ranks.call(2, waits_briefly)
    assert ranks.end([started[0]]) == [0]
    assert Path("heard").read_text() == "another rank did not come within 0:00:01"


def waits_briefly(env: dict[str, str], log: str) -> None:
    world._EXCHANGE_TIMEOUT = timedelta(seconds=1)
    waits(env, log)


def run(ranks: Ranks, name: str, plant: str) -> tuple[Any, list[str], bytes]:
    ranks.run(2, *SMALL, "run.root=runs", f"run.name={name}", "train.max_steps=30", "log.every_steps=1", plant=plant)
    folder = Path("runs") / name
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [f"{line['loss']} {line['accuracy']}" for line in lines]
    environment = json.loads((folder / "environment.json").read_text())
    return environment["gradient_exchange"], told, (folder / "model.safetensors").read_bytes()


def test_two_ranks_compute_what_they_compute_apart(ranks: Ranks) -> None:
    """Of two numbers there is one sum, whoever takes it: the same bits as through gloo, BatchNorm's statistics too."""
    near, apart = run(ranks, "near", "tiny"), run(ranks, "apart", "without_neighbors")
    assert (near[0], apart[0]) == ("shared memory" if neighbors._machine() else "gloo", "gloo")
    assert near[1:] == apart[1:]


def finds_none(env: dict[str, str], log: str, forbidden: str) -> None:
    """A rank may not do what finding neighbors takes: then none of the ranks has any, and all go on."""
    forked.become_rank(env, log)
    rank, what = forbidden.split()
    if rank == env["RANK"] and what == "sizes":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    elif rank == env["RANK"] and what == "token":
        os.pread = lambda *_: bytes(16)  # type: ignore[assignment]
    elif rank == env["RANK"]:
        call = neighbors._call
        neighbors._call = lambda name, *given: -1 if name == what else call(name, *given)
    with World(Train(device="cpu")) as group:
        files = len(os.listdir("/proc/self/fd"))
        found = [group.share(1 << 20) is not None, group.largest([float(group.rank)])]
        found.append(len(os.listdir("/proc/self/fd")) - files)
    Path(f"found-{env['RANK']}").write_text(str(found))


@needs_neighbors
@pytest.mark.parametrize("forbidden", ["0 memfd_create", "0 sizes", "1 syscall", "0 syscall", "1 token"])
def test_what_one_rank_may_not_do_none_does(ranks: Ranks, forbidden: str) -> None:
    assert ranks.end(ranks.call(2, finds_none, forbidden)) == [0, 0], ranks.log.read_text()
    for rank in range(2):
        assert Path(f"found-{rank}").read_text() == "[False, [1.0], 0]"
