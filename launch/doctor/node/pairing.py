"""Chooses the pairs of ranks to measure, in rounds of pairs that share no rank. No torch."""

from collections.abc import Sequence
from itertools import combinations

ALL_PAIRS_MAX_RANKS = 8
ALL_PAIRS_MAX_NODES = 16

Pair = tuple[int, int]


def disjoint_rounds(node_of_rank: Sequence[int]) -> list[list[Pair]]:
    """Returns the rounds of pairs for ranks on the given nodes.

    Up to 8 ranks: all pairs. Beyond: each rank with its neighbor in the ring, and the first ranks of every two nodes
    (beyond 16 nodes: of neighboring nodes), so that the number of pairs grows linearly.
    """
    world_size = len(node_of_rank)
    if world_size <= ALL_PAIRS_MAX_RANKS:
        return _schedule(list(combinations(range(world_size), 2)))
    pairs = {_ordered(rank, (rank + 1) % world_size) for rank in range(world_size)}
    first_ranks = [node_of_rank.index(node) for node in dict.fromkeys(node_of_rank)]
    if len(first_ranks) <= ALL_PAIRS_MAX_NODES:
        pairs |= set(combinations(sorted(first_ranks), 2))
    else:
        neighbors = first_ranks[1:] + first_ranks[:1]
        pairs |= {_ordered(rank, neighbor) for rank, neighbor in zip(first_ranks, neighbors, strict=True)}
    return _schedule(sorted(pairs))


def _ordered(rank: int, peer: int) -> Pair:
    return min(rank, peer), max(rank, peer)


def _schedule(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Puts each pair into the first round in which both of its ranks are free."""
    rounds: list[list[Pair]] = []
    for pair in pairs:
        for members in rounds:
            if not any(rank in member for rank in pair for member in members):
                members.append(pair)
                break
        else:
            rounds.append([pair])
    return rounds
