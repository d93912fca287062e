"""All that was measured of all nodes, as one value. Who looked is command.py, who judges diagnosis.py."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Examination:
    """Nodes by their place, from 0; ranks by their number."""

    names: tuple[str, ...]
    """as many as were asked; what they are called where that is known before they answer"""
    asked: Mapping[str, Any]
    """what the run needs: gpus_per_node, ranks_per_node, device, run_root, data, wandb, workers, seconds, settings"""
    facts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """of launch/doctor/facts.py, with `heard_at` by this machine's clock"""
    reach: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """`unreachable`: other node, reason; `shared`: why it could not answer in the run folder"""
    answered: frozenset[int] = frozenset()
    """nodes whose answer in the run folder is seen here"""
    token_problem: str = ""
    """why this machine could not leave a file in the run folder for the others"""
    probed: tuple[int, ...] | None = None
    """nodes whose ranks were measured, in the order of the ranks; None: not asked for"""
    ranks: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """of launch/doctor/node.py's probe, by rank among the probed"""

    def name(self, node: int) -> str:
        """A node's name for people; two of the same name have their place besides."""
        own = self.facts[node]["name"] if node in self.facts else self.names[node]
        names = [self.facts[other]["name"] if other in self.facts else self.names[other] for other in self.places]
        return f"{own}#{node}" if names.count(own) > 1 else str(own)

    @property
    def places(self) -> range:
        return range(len(self.names))

    def reached(self) -> tuple[int, ...]:
        """The nodes that all reach each other, as many as can be: who misses most is left out first."""
        left = [node for node in self.places if node in self.reach]
        while True:
            bad = {node: self._missed(node, left) for node in left}
            if not any(bad.values()):
                return tuple(left)
            left.remove(max(left, key=lambda node: (bad[node], node)))

    def _missed(self, node: int, others: list[int]) -> int:
        """How many connections between it and the others do not come about."""
        out = sum(str(other) in self.reach[node]["unreachable"] for other in others)
        return out + sum(str(node) in self.reach[other]["unreachable"] for other in others)
