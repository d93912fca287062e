"""torchrun's variables in; the first process of each machine speaks for it, and those of the others call rank 0."""

import hashlib
import os
import sys
import time
from dataclasses import dataclass

from launch.doctor import nodes as coordinator
from launch.doctor.node import server
from trainer.distributed.environment import read_environment, store_address

_PORTS_AFTER = 32  # a few above the port where the ranks meet: both sides can work them out


@dataclass(frozen=True, slots=True)
class Meeting:
    nodes: int
    place: int
    """of this machine, from 0"""
    ranks_per_node: int
    address: str
    ports: tuple[int, ...]
    word: str
    """by which the machines of one start know each other"""

    def gather(self, nodes: coordinator.Nodes, until: float) -> None:
        """The other machines' processes, as many as call in time (monotonic seconds)."""
        if self.nodes > 1:
            for connection in coordinator.callers(self.address, self.ports, self.word, self.nodes - 1, until):
                nodes.connect(connection)


def meeting() -> Meeting:
    env = read_environment()
    address, port = store_address()
    ranks = env.local_world_size
    run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {address} {port}"
    word = hashlib.sha256(run.encode()).hexdigest()[:16]
    ports = tuple((port + step - 1024) % 64000 + 1024 for step in range(_PORTS_AFTER, _PORTS_AFTER + 8))
    return Meeting(max(1, env.announced_world_size // ranks), env.rank // ranks, ranks, address, ports, word)


def is_first() -> bool:
    """Whether this process is rank 0, which asks and reports."""
    return read_environment().rank == 0


def serve(seconds: float) -> int:
    """What all other processes do: the first of a machine serves it and starts its ranks, the rest leave at once."""
    if read_environment().local_rank:
        return 0
    own = meeting()
    connection = coordinator.call(own.address, own.ports, own.word, time.monotonic() + seconds / 2)
    if isinstance(connection, str):
        name = os.uname().nodename
        print(
            f"samecurve: {name} (node {own.place}) does not reach rank 0 at {own.address}:{own.ports[0]} "
            f"({connection}); look at firewalls and routes between them",
            file=sys.stderr,
        )
        return 1
    with connection:
        return server.serve(connection.makefile("r"), connection.makefile("w"), own.place)
