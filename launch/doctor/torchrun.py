"""Connects the machines of a torchrun start: the first process of each machine serves it, and rank 0 coordinates."""

import hashlib
import os
import sys
import time
from dataclasses import dataclass

from launch.doctor.node import server
from launch.doctor.nodes import Nodes, accept_nodes, connect_to_coordinator
from trainer.distributed.environment import read_environment, store_address

_PORT_OFFSET, _NUM_PORTS = 32, 8  # above the port of the ranks' rendezvous: all machines can compute them


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the machines of one torchrun start find each other."""

    num_nodes: int
    node: int
    """number of this machine, from 0"""
    ranks_per_node: int
    address: str
    """address of the machine with rank 0"""
    ports: tuple[int, ...]
    """ports to try for the connection to rank 0"""
    token: str
    """identifies this start, so that a machine of another one is rejected"""

    def accept_nodes(self, nodes: Nodes, deadline: float) -> None:
        """Adds the other machines that connect by the deadline (monotonic seconds)."""
        if self.num_nodes > 1:
            for connection in accept_nodes(self.address, self.ports, self.token, self.num_nodes - 1, deadline):
                nodes.connect(connection)


def read_rendezvous() -> Rendezvous:
    """Returns the rendezvous of this process, computed from torchrun's environment variables."""
    environment = read_environment()
    address, port = store_address()
    ranks = environment.local_world_size
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')} {address} {port}"
    return Rendezvous(
        num_nodes=max(1, environment.world_size // ranks),
        node=environment.rank // ranks,
        ranks_per_node=ranks,
        address=address,
        ports=tuple((port + _PORT_OFFSET + index - 1024) % 64000 + 1024 for index in range(_NUM_PORTS)),
        token=hashlib.sha256(start.encode()).hexdigest()[:16],
    )


def is_first() -> bool:
    """Returns whether this process is rank 0, which coordinates and reports."""
    return read_environment().rank == 0


def serve(seconds: float) -> int:
    """Runs every process except rank 0: the first one of a machine serves it, the others exit at once.

    seconds: half of it is the time limit for the connection to rank 0. Returns the exit code.
    """
    if read_environment().local_rank:
        return 0
    rendezvous = read_rendezvous()
    deadline = time.monotonic() + seconds / 2
    connection = connect_to_coordinator(rendezvous.address, rendezvous.ports, rendezvous.token, deadline)
    if isinstance(connection, str):
        print(
            f"samecurve: {os.uname().nodename} (node {rendezvous.node}) cannot reach rank 0 at "
            f"{rendezvous.address}:{rendezvous.ports[0]} ({connection}); check the firewalls and routes between them",
            file=sys.stderr,
        )
        return 1
    with connection:
        return server.serve(connection.makefile("r"), connection.makefile("w"), rendezvous.node)
