"""What `samecurve doctor` runs as each rank: times a matrix product, then an all-reduce with one rank at a time.

Started like a rank of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). Prints one JSON object a line as it goes, so that
a rank that hangs or dies leaves what it had. Only pairs ever form a group: a rank that is gone costs its own pairs.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script: Python put trainer/ itself there
    sys.path[0] = str(_HERE.parents[2])

import torch
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from launch.doctor.node import pairing
from trainer.distributed.environment import (
    read_environment,
    store_address,
)

_PRODUCT_SIDE = {"cpu": 768, "cuda": 8192}
_PRODUCTS, _PRODUCT_SECONDS = 15, 3.0
_MESSAGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_SMALL_REPEATS, _LARGE_REPEATS = 20, 5
_PAIR_TIMEOUT = timedelta(seconds=5)
_POLL_SECONDS = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the rank's measurements; 0 when it has come to its end, whatever they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--node-of", required=True, help="the node of each rank: 0,0,1,1")
    parser.add_argument("--seconds", type=float, required=True, help="at most for all of it")
    arguments = parser.parse_args(argv)
    signal.alarm(int(arguments.seconds) + 1)
    env = read_environment()
    size = env.announced_world_size
    log("seen", gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0, torch=torch.__version__)
    device = torch.device(arguments.device, env.local_rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        log("product", **product(device))
        return 0
    store = TCPStore(
        *store_address(),
        is_master=env.rank == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=arguments.seconds / 3),
    )
    roll = Roll(store, env.rank, size)
    roll.call("start", arguments.seconds / 3)  # their imports would be in each other's way
    log("product", **product(device))
    roll.call("product", arguments.seconds / 4)
    for number, members in enumerate(pairing.disjoint_rounds([int(node) for node in arguments.node_of.split(",")])):
        mine = next((pair for pair in members if env.rank in pair), None)
        if mine is not None:
            _measure_pair(mine, number, roll, device)
    log("end", gone=sorted(roll.gone))
    roll.call("end", arguments.seconds / 4 if env.rank == 0 else 0.0)  # the store ends with rank 0
    return 0


def log(what: str, **values: object) -> None:
    """One line of JSON."""
    print(json.dumps({"what": what, **values}), flush=True)


def product(device: torch.device) -> dict[str, float]:
    """`seconds` of a square matrix product, fp32 on a CPU and bf16 on a GPU, and its `flops` a second.

    The quickest quarter counts: other work makes some of them slow, a slow device makes all of them slow.
    """
    side = _PRODUCT_SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = timed(lambda: left @ right, _PRODUCTS, device, _PRODUCT_SECONDS)
    seconds = sorted(found)[len(found) // 4]
    return {"seconds": seconds, "flops": 2 * side**3 / seconds}


def timed(work: Callable[[], object], repeats: int, device: torch.device, most_seconds: float = 60.0) -> list[float]:
    """Seconds of each of so many runs, one for warming up not counted; fewer when the time is over."""
    until = time.monotonic() + most_seconds
    found: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
        if time.monotonic() > until and len(found) > 1:
            break
    return found[1:]


class Roll:
    """Who is still there. A rank that is once missed is gone for all: nobody waits for it a second time."""

    def __init__(self, store: TCPStore, rank: int, size: int) -> None:
        self.store, self.rank, self._size = store, rank, size
        self.gone: set[int] = set()

    def call(self, name: str, seconds: float) -> None:
        """Waits for all ranks to call the same name, but for none that is gone."""
        self.store.set(f"{name}/{self.rank}", "here")
        until = time.monotonic() + seconds
        waiting = set(range(self._size)) - self.gone
        while waiting and time.monotonic() < until:
            waiting = {rank for rank in waiting if not self.store.check([f"{name}/{rank}"])} - self._known_gone()
            time.sleep(_POLL_SECONDS if waiting else 0)
        if name != "end":
            self.lose(waiting)

    def meets(self, other: int, number: int) -> bool:
        """Whether the other rank comes to the round of that number."""
        self.store.set(f"round-{number}/{self.rank}", "here")
        # The other may itself be held up by one that is gone, and that one's partner by another.
        until = time.monotonic() + 4 * _PAIR_TIMEOUT.total_seconds()
        while time.monotonic() < until and other not in self._known_gone():
            if self.store.check([f"round-{number}/{other}"]):
                return True
            time.sleep(_POLL_SECONDS)
        self.lose({other})
        return False

    def lose(self, ranks: set[int]) -> None:
        for rank in ranks:
            self.store.set(f"gone/{rank}", "gone")
            self.store.set("any-gone", "yes")
        self.gone |= ranks

    def _known_gone(self) -> set[int]:
        if self.store.check(["any-gone"]):
            self.gone |= {rank for rank in range(self._size) if self.store.check([f"gone/{rank}"])}
        return self.gone


def _measure_pair(pair: pairing.Pair, number: int, roll: Roll, device: torch.device) -> None:
    """`latency_seconds` of a few bytes and `bytes_per_second` of some megabytes, said by the lower rank."""
    place = pair.index(roll.rank)
    if not roll.meets(pair[1 - place], number):
        return
    try:
        latency, rate = _all_reduce(PrefixStore(f"pair-{number}", roll.store), pair, place, device)
    except (DistError, RuntimeError) as error:  # gloo has no error of its own
        log("lost", pair=pair, why=" ".join(str(error).split())[:160])
        roll.lose({pair[1 - place]})
        return
    if place == 0:
        log("pair", pair=pair, latency_seconds=latency, bytes_per_second=rate)


def _all_reduce(store: PrefixStore, pair: pairing.Pair, place: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a small one; bytes a second, each way, of a large one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # NCCL then raises what else would abort this process
    prefixed = PrefixStore(f"{pair[0]}-{pair[1]}", store)
    torch.distributed.init_process_group(backend, store=prefixed, rank=place, world_size=2, timeout=_PAIR_TIMEOUT)
    try:
        small = torch.zeros(2, device=device)
        large = torch.zeros(_MESSAGE_BYTES[device.type] // 4, device=device)
        latency = median(timed(lambda: torch.distributed.all_reduce(small), _SMALL_REPEATS, device))
        seconds = median(timed(lambda: torch.distributed.all_reduce(large), _LARGE_REPEATS, device))
    finally:
        torch.distributed.destroy_process_group()
    return latency, large.numel() * large.element_size() / seconds


if __name__ == "__main__":
    sys.exit(main())
