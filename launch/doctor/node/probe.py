"""Measures one rank for `samecurve doctor`: times a matrix product, then an all-reduce with one peer at a time.

Starts like a rank of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, ...). Prints one JSON object per line as it goes, so that
the output of a rank that hangs or dies is not lost. A process group has two ranks, so a lost rank fails only its pairs.
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

_FOLDER = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _FOLDER:  # run as a script: Python put this file's folder there
    sys.path[0] = str(_FOLDER.parents[2])

import torch
from torch.distributed import DistError, PrefixStore, TCPStore  # type: ignore[attr-defined]

from launch.doctor.node import pairing
from trainer.distributed.environment import read_environment, store_address
from trainer.text.escape import one_line

_MATRIX_SIZE = {"cpu": 768, "cuda": 8192}
_PRODUCT_REPEATS, _PRODUCT_SECONDS = 15, 3.0
_LARGE_MESSAGE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
_SMALL_REPEATS, _LARGE_REPEATS = 20, 5
_PAIR_TIMEOUT = timedelta(seconds=5)
_POLL_SECONDS = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the measurements of this rank; returns 0 when it reaches the end, whatever the measurements are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--node-of-rank", required=True, help="node number of each rank: 0,0,1,1")
    parser.add_argument("--seconds", type=float, required=True, help="time limit of the whole probe")
    arguments = parser.parse_args(argv)
    signal.alarm(int(arguments.seconds) + 1)
    environment = read_environment()
    world_size = environment.world_size
    log("start", gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0, torch=torch.__version__)
    device = torch.device("cuda", environment.local_rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        log("product", **time_product(device))
        return 0
    store = TCPStore(
        *store_address(),
        is_master=environment.rank == 0,
        wait_for_workers=False,
        timeout=timedelta(seconds=arguments.seconds / 3),
    )
    membership = Membership(store, environment.rank, world_size)
    membership.wait_for_all("start", arguments.seconds / 3)  # imports of other ranks would disturb the measurement
    log("product", **time_product(device))
    membership.wait_for_all("product", arguments.seconds / 4)
    node_of_rank = [int(node) for node in arguments.node_of_rank.split(",")]
    for round_number, pairs in enumerate(pairing.disjoint_rounds(node_of_rank)):
        pair = next((pair for pair in pairs if environment.rank in pair), None)
        if pair is not None:
            _measure_pair(pair, round_number, membership, device)
    log("end", lost=sorted(membership.lost))
    membership.wait_for_all("end", arguments.seconds / 4 if environment.rank == 0 else 0.0)  # rank 0 holds the store
    return 0


def log(event: str, **values: object) -> None:
    """Prints an event as one line of JSON."""
    print(json.dumps({"event": event, **values}), flush=True)


def time_product(device: torch.device) -> dict[str, float]:
    """Returns `seconds` of a square matrix product, fp32 on a CPU and bf16 on a GPU, and `flops`, its FLOP/s.

    Reports the first quartile: other work slows down some of the products, a slow device slows down all of them.
    """
    size = _MATRIX_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    durations = time_repeats(lambda: left @ right, _PRODUCT_REPEATS, device, _PRODUCT_SECONDS)
    seconds = sorted(durations)[len(durations) // 4]
    return {"seconds": seconds, "flops": 2 * size**3 / seconds}


def time_repeats(
    work: Callable[[], object], repeats: int, device: torch.device, limit_seconds: float = 60.0
) -> list[float]:
    """Returns the seconds of each repeat, after one for warm-up; fewer repeats when the time limit is over."""
    deadline = time.monotonic() + limit_seconds
    durations: list[float] = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - begin)
        if time.monotonic() > deadline and len(durations) > 1:
            break
    return durations[1:]


class Membership:
    """Tracks which ranks are alive, through the store. Once any rank misses a peer, no rank waits for it again."""

    def __init__(self, store: TCPStore, rank: int, world_size: int) -> None:
        self.store, self.rank, self._world_size = store, rank, world_size
        self.lost: set[int] = set()

    def wait_for_all(self, phase: str, seconds: float) -> None:
        """Waits until all ranks that are not lost reach a phase, and marks those that do not as lost."""
        self.store.set(f"{phase}/{self.rank}", "here")
        deadline = time.monotonic() + seconds
        missing = set(range(self._world_size)) - self.lost
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not self.store.check([f"{phase}/{rank}"])} - self._read_lost()
            time.sleep(_POLL_SECONDS if missing else 0)
        if phase != "end":
            self.mark_lost(missing)

    def wait_for_peer(self, peer: int, round_number: int) -> bool:
        """Returns whether a peer arrives in a round; marks it as lost if not."""
        self.store.set(f"round-{round_number}/{self.rank}", "here")
        # The peer may be waiting for a lost rank itself, and that rank's partner for another one.
        deadline = time.monotonic() + 4 * _PAIR_TIMEOUT.total_seconds()
        while time.monotonic() < deadline and peer not in self._read_lost():
            if self.store.check([f"round-{round_number}/{peer}"]):
                return True
            time.sleep(_POLL_SECONDS)
        self.mark_lost({peer})
        return False

    def mark_lost(self, ranks: set[int]) -> None:
        """Marks ranks as lost for all ranks."""
        for rank in ranks:
            self.store.set(f"lost/{rank}", "lost")
            self.store.set("any-lost", "yes")
        self.lost |= ranks

    def _read_lost(self) -> set[int]:
        if self.store.check(["any-lost"]):
            self.lost |= {rank for rank in range(self._world_size) if self.store.check([f"lost/{rank}"])}
        return self.lost


def _measure_pair(pair: pairing.Pair, round_number: int, membership: Membership, device: torch.device) -> None:
    """Measures an all-reduce of a pair. The lower rank prints `latency_seconds` and `bytes_per_second`."""
    position = pair.index(membership.rank)
    peer = pair[1 - position]
    if not membership.wait_for_peer(peer, round_number):
        return
    store = PrefixStore(f"pair-{round_number}/{pair[0]}-{pair[1]}", membership.store)
    try:
        latency, rate = _time_all_reduce(store, position, device)
    except (DistError, RuntimeError) as error:  # gloo raises plain RuntimeError
        log("lost", pair=pair, reason=one_line(error))
        membership.mark_lost({peer})
        return
    if position == 0:
        log("pair", pair=pair, latency_seconds=latency, bytes_per_second=rate)


def _time_all_reduce(store: PrefixStore, position: int, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of a small all-reduce, and the bytes per second, each way, of a large one."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # NCCL then raises an error, and does not abort this process
    torch.distributed.init_process_group(backend, store=store, rank=position, world_size=2, timeout=_PAIR_TIMEOUT)
    try:
        small = torch.zeros(2, device=device)
        large = torch.zeros(_LARGE_MESSAGE_BYTES[device.type] // 4, device=device)
        latency = median(time_repeats(lambda: torch.distributed.all_reduce(small), _SMALL_REPEATS, device))
        seconds = median(time_repeats(lambda: torch.distributed.all_reduce(large), _LARGE_REPEATS, device))
    finally:
        torch.distributed.destroy_process_group()
    return latency, large.numel() * large.element_size() / seconds


if __name__ == "__main__":
    sys.exit(main())
