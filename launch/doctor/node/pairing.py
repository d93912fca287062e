"""The node of each rank in, the pairs of ranks to measure out, in rounds of pairs that share no rank. No torch."""

from collections.abc import Sequence
from itertools import combinations

ALL_UP_TO_RANKS = 8
ALL_UP_TO_NODES = 16

Pair = tuple[int, int]


def disjoint_rounds(node_of: Sequence[int]) -> list[list[Pair]]:
    """All pairs of few ranks. Of many: each rank and its neighbour in the ring, and the first ranks of each two nodes
    (beyond 16 nodes: of neighbours)."""
    size = len(node_of)
    if size <= ALL_UP_TO_RANKS:
        return _disjoint(list(combinations(range(size), 2)))
    pairs = {_ordered(rank, (rank + 1) % size) for rank in range(size)}
    first = {node: node_of.index(node) for node in dict.fromkeys(node_of)}
    heads = list(first.values())
    if len(heads) <= ALL_UP_TO_NODES:
        pairs |= set(combinations(sorted(heads), 2))
    else:
        pairs |= {_ordered(rank, other) for rank, other in zip(heads, heads[1:] + heads[:1], strict=True)}
    return _disjoint(sorted(pairs))


def _ordered(rank: int, other: int) -> Pair:
    return min(rank, other), max(rank, other)


def _disjoint(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Each pair into the first round in which both of its ranks are free."""
    found: list[list[Pair]] = []
    for pair in pairs:
        for members in found:
            if not any(rank in other for rank in pair for other in members):
                members.append(pair)
                break
        else:
            found.append([pair])
    return found
