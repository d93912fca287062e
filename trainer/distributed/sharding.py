"""Splits a global batch into shards, assigns shards to ranks, and defines the order in which shard sums are added.

Floating-point addition is not associative, so a sum has the same bits on any number of ranks only if the order of
additions is fixed. That order is a binary tree over the shards. The left child of a node holds the largest power of two
of shards that is smaller than the node; the right child holds the others. A rank with neighboring shards can add whole
subtrees before it sends anything, so it usually sends one partial sum instead of one per shard.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Block = tuple[int, int]
"""Shards [first, end) whose sum is a node of the tree."""


class ShardLayout(NamedTuple):
    """How many shards a global batch is split into."""

    max_shards: int
    """number of shards of a batch that has at least this many samples"""
    allows_empty_shards: bool
    """True under DDP, which needs one shard per rank; False with virtual ranks, where a rank may have no shard"""

    def num_shards(self, num_samples: int) -> int:
        """Returns the number of shards, including empty ones, for a batch of `num_samples` samples."""
        return self.max_shards if self.allows_empty_shards else min(num_samples, self.max_shards)


def split_evenly(count: int, num_ranges: int) -> list[tuple[int, int]]:
    """Splits [0, count) into consecutive ranges [first, end) whose lengths differ by at most one."""
    return [(count * index // num_ranges, count * (index + 1) // num_ranges) for index in range(num_ranges)]


def push_block(stack: list[tuple[Block, T]], block: Block, value: T, num_shards: int, add: Callable[[T, T], T]) -> None:
    """Pushes a block's sum onto the stack of its left neighbors, then adds sums as far as the tree allows.

    add: called as add(left, right).
    """
    while stack and _form_node(stack[-1][0], block, num_shards):
        (first, _), left_value = stack.pop()
        block, value = (first, block[1]), add(left_value, value)
    stack.append((block, value))


def partial_sum_blocks(first: int, end: int, num_shards: int) -> list[Block]:
    """Returns the blocks that remain after shards [first, end) of `num_shards` are added as far as the tree allows."""
    stack: list[tuple[Block, None]] = []
    for shard in range(first, end):
        push_block(stack, (shard, shard + 1), None, num_shards, lambda left, right: None)
    return [block for block, _ in stack]


def tree_sum(sums: Iterable[tuple[Block, T]], num_shards: int, add: Callable[[T, T], T]) -> T:
    """Returns the sum over all shards, given block sums from left to right."""
    stack: list[tuple[Block, T]] = []
    for block, value in sums:
        push_block(stack, block, value, num_shards, add)
    assert [block for block, _ in stack] == [(0, num_shards)], "the blocks do not cover the shards"
    return stack[0][1]


def _form_node(left: Block, right: Block, num_shards: int) -> bool:
    """Returns whether two blocks are the two children of one node.

    A left child does not end at `num_shards`, so its length is a power of two.
    """
    left_length, right_length = left[1] - left[0], right[1] - right[0]
    is_left_child = left[0] % (2 * left_length) == 0
    is_right_child = right_length == left_length or (right_length < left_length and right[1] == num_shards)
    return left[1] == right[0] and is_left_child and is_right_child
