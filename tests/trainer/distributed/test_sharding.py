"""Sharding: one tree of additions, however many ranks share the shards."""

import pytest

from trainer.distributed import sharding
from trainer.distributed.sharding import ShardLayout


def expected_sum(first: int, end: int) -> str:
    """Returns the order of additions as text, from its definition."""
    if end - first == 1:
        return str(first)
    half = 1
    while 2 * half < end - first:
        half *= 2
    return f"({expected_sum(first, first + half)}+{expected_sum(first + half, end)})"


def add(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("num_shards", [*range(1, 20), 31, 32, 33])
def test_order_of_additions_does_not_depend_on_world_size(num_shards: int) -> None:
    for world_size in range(1, num_shards + 3):  # also more ranks than shards
        sums = []
        for first, end in sharding.split_evenly(num_shards, world_size):
            stack: list[tuple[sharding.Block, str]] = []
            for shard in range(first, end):
                sharding.push_block(stack, (shard, shard + 1), str(shard), num_shards, add)
            assert [block for block, _ in stack] == sharding.partial_sum_blocks(first, end, num_shards)
            sums += stack
        assert sharding.tree_sum(sums, num_shards, add) == expected_sum(0, num_shards)


def test_rank_whose_shards_form_a_subtree_sends_one_sum() -> None:
    def num_sums(world_size: int) -> list[int]:
        ranges = sharding.split_evenly(256, world_size)
        return [len(sharding.partial_sum_blocks(first, end, 256)) for first, end in ranges]

    assert num_sums(8) == [1] * 8
    assert max(num_sums(7)) <= 8


def test_split_evenly_covers_the_range_with_lengths_that_differ_by_at_most_1() -> None:
    for count in range(12):
        for num_ranges in range(1, 9):
            ranges = sharding.split_evenly(count, num_ranges)
            assert [position for first, end in ranges for position in range(first, end)] == list(range(count))
            lengths = [end - first for first, end in ranges]
            assert max(lengths) - min(lengths) <= 1


def test_tree_sum_with_a_missing_block_raises() -> None:
    with pytest.raises(AssertionError, match="do not cover"):
        sharding.tree_sum([((0, 1), "0"), ((2, 3), "2")], 3, add)


def test_batch_smaller_than_the_layout_has_empty_shards_only_under_ddp() -> None:
    assert ShardLayout(4, allows_empty_shards=True).num_shards(2) == 4
    assert ShardLayout(4, allows_empty_shards=False).num_shards(2) == 2
    assert ShardLayout(4, allows_empty_shards=False).num_shards(9) == 4
