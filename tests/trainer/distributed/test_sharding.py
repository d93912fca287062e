"""Cutting and adding up: the same tree of sums however many ranks share the shards."""

import pytest

from trainer.distributed import sharding


def tree(first: int, end: int) -> str:
    """The order of sums, written out from its definition."""
    if end - first == 1:
        return str(first)
    half = 1
    while 2 * half < end - first:
        half *= 2
    return f"({tree(first, first + half)}+{tree(first + half, end)})"


def joined(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("num_shards", [*range(1, 20), 31, 32, 33])
def test_the_order_of_sums_is_one_on_any_number_of_ranks(num_shards: int) -> None:
    for world_size in range(1, num_shards + 3):  # more ranks than shards: the rest have none
        sent = []
        for first, end in sharding.split_evenly(num_shards, world_size):
            stack: list[tuple[sharding.Block, str]] = []
            for shard in range(first, end):
                sharding.push_block(stack, (shard, shard + 1), str(shard), num_shards, joined)
            assert [block for block, _ in stack] == sharding.partial_sum_blocks(first, end, num_shards)
            sent += stack
        assert sharding.tree_sum(sent, num_shards, joined) == tree(0, num_shards)


def test_a_rank_sends_one_sum_where_its_shards_are_a_subtree() -> None:
    assert [len(sharding.partial_sum_blocks(first, end, 256)) for first, end in sharding.split_evenly(256, 8)] == [
        1
    ] * 8
    assert max(len(sharding.partial_sum_blocks(first, end, 256)) for first, end in sharding.split_evenly(256, 7)) <= 8


def test_runs_cover_all_and_differ_by_one() -> None:
    for count in range(12):
        for parts in range(1, 9):
            runs = sharding.split_evenly(count, parts)
            assert [place for first, end in runs for place in range(first, end)] == list(range(count))
            assert max(end - first for first, end in runs) - min(end - first for first, end in runs) <= 1


def test_blocks_that_leave_a_gap_are_noticed() -> None:
    with pytest.raises(AssertionError, match="do not cover"):
        sharding.tree_sum([((0, 1), "0"), ((2, 3), "2")], 3, joined)
