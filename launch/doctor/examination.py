"""Holds all measurements of all nodes in one value: command.py fills it in, judge/diagnosis.py judges it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Examination:
    """The measurements. Nodes are numbered from 0, in the order of the ranks."""

    names: tuple[str, ...]
    """name of each node, used until the node reports its own"""
    request: Mapping[str, Any]
    """what the run needs: gpus_per_node, ranks_per_node, device, run_root, data, wandb, workers, seconds, settings;
    clock_offset: seconds that this machine's clock is ahead of SLURM's controller, None if unknown"""
    facts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """result of node/server.py by node, with `received_at` by this machine's clock"""
    reach: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """by node: `unreachable` maps other nodes to reasons, `shared_problem` is why it could not use the run folder,
    `has_own_flock` whether it does not see the flock of the first node"""
    answered: frozenset[int] = frozenset()
    """nodes whose answer in the run folder is visible on this machine"""
    shared_problem: str = ""
    """why this machine could not write the token file for the other nodes"""
    probed: tuple[int, ...] | None = None
    """nodes whose ranks were measured, in the order of the ranks; None: not requested"""
    ranks: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """result of node/probe.py by rank among the probed nodes"""

    def name(self, node: int) -> str:
        """Returns the display name of a node; nodes with equal names also get their number."""
        names = [self.facts[other]["name"] if other in self.facts else self.names[other] for other in self.nodes]
        return f"{names[node]}#{node}" if names.count(names[node]) > 1 else str(names[node])

    @property
    def nodes(self) -> range:
        """All nodes that should answer."""
        return range(len(self.names))

    def connected_nodes(self) -> tuple[int, ...]:
        """Returns a set of nodes that all reach each other: it drops the node with most failed connections first."""
        nodes = [node for node in self.nodes if node in self.reach]
        while True:
            failed = {node: self._failed_connections(node, nodes) for node in nodes}
            if not any(failed.values()):
                return tuple(nodes)
            nodes.remove(max(nodes, key=lambda node: (failed[node], node)))

    def _failed_connections(self, node: int, others: list[int]) -> int:
        """Counts failed connections between a node and others, in both directions."""
        outgoing = sum(str(other) in self.reach[node]["unreachable"] for other in others)
        return outgoing + sum(str(node) in self.reach[other]["unreachable"] for other in others)
