"""How a global batch is cut into shards, which rank computes which, and the one order in which shards are added up.

Floating-point addition is not associative, so a sum is the same on any number of ranks only when it is taken in one
order. That order is a binary tree over the shards: a node joins a left half, whose length is the largest power of
two that is shorter than the node, with the rest. A rank that computes neighbouring shards can add whole subtrees of
its own before anything is sent, so that as a rule it sends one sum and not one for each shard.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Block = tuple[int, int]
"""Shards [first, end) whose sum is a node of the tree."""


class ShardLayout(NamedTuple):
    """Into how many shards global batches are cut."""

    most: int
    """where there are samples for all"""
    may_be_empty: bool
    """DDP wants one of each rank; else no shard is empty, and a rank may have none"""

    def number(self, num_samples: int) -> int:
        """Of a batch of so many samples, with the empty ones."""
        return self.most if self.may_be_empty else min(num_samples, self.most)


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """[0, count) in `parts` runs [first, end) whose lengths differ by at most one."""
    return [(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def push_block(stack: list[tuple[Block, T]], block: Block, value: T, num_shards: int, add: Callable[[T, T], T]) -> None:
    """Puts a block's sum on a stack of its left neighbours, then joins what the tree joins: add(left, right)."""
    while stack and _is_node(stack[-1][0], block, num_shards):
        (first, _), left = stack.pop()
        block, value = (first, block[1]), add(left, value)
    stack.append((block, value))


def partial_sum_blocks(first: int, end: int, num_shards: int) -> list[Block]:
    """What is left to send when shards [first, end) of `num_shards` have been added as far as the tree allows."""
    stack: list[tuple[Block, None]] = []
    for shard in range(first, end):
        push_block(stack, (shard, shard + 1), None, num_shards, lambda left, right: None)
    return [block for block, _ in stack]


def tree_sum(values: Iterable[tuple[Block, T]], num_shards: int, add: Callable[[T, T], T]) -> T:
    """The sum over all shards of blocks given from left to right."""
    stack: list[tuple[Block, T]] = []
    for block, value in values:
        push_block(stack, block, value, num_shards, add)
    assert [block for block, _ in stack] == [(0, num_shards)], "the blocks do not cover the shards"
    return stack[0][1]


def _is_node(left: Block, right: Block, num_shards: int) -> bool:
    length, rest = left[1] - left[0], right[1] - right[0]
    is_power_of_two = length & (length - 1) == 0
    is_left_child = is_power_of_two and left[0] % (2 * length) == 0
    return left[1] == right[0] and is_left_child and (rest == length or (rest < length and right[1] == num_shards))
