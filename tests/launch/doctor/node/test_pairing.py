"""Pairs of ranks to measure."""

from launch.doctor.node import pairing


def test_few_ranks_measure_all_pairs() -> None:
    rounds = pairing.disjoint_rounds([0] * 8)
    pairs = sorted(pair for members in rounds for pair in members)
    assert pairs == [(lower, higher) for lower in range(8) for higher in range(lower + 1, 8)]


def test_many_ranks_measure_the_ring_and_one_pair_of_every_two_nodes() -> None:
    rounds = pairing.disjoint_rounds([rank // 4 for rank in range(16)])
    pairs = {pair for members in rounds for pair in members}
    assert {(0, 15), (3, 4), (0, 12), (4, 8)} <= pairs and len(pairs) == 16 + 6


def test_many_nodes_measure_a_linear_number_of_pairs() -> None:
    assert len({pair for members in pairing.disjoint_rounds(list(range(400))) for pair in members}) == 400


def test_pairs_of_a_round_share_no_rank() -> None:
    for node_of_rank in ([0] * 8, [rank // 4 for rank in range(16)], list(range(40))):
        for members in pairing.disjoint_rounds(node_of_rank):
            ranks = [rank for pair in members for rank in pair]
            assert len(ranks) == len(set(ranks))
