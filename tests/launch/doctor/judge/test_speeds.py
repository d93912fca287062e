"""Findings about the speed of ranks and pairs."""

from support.examinations import examination, facts_with, findings_of, node_facts, problems, rank_result

PROBED = (0, 1, 2)
ALL_PAIRS = {0: rank_result(pairs=((0, 1, 1e9), (0, 2, 1e9))), 1: rank_result(pairs=((1, 2, 1e9),)), 2: rank_result()}


def test_equal_ranks_and_pairs_give_no_problem() -> None:
    assert problems(examination(probed=PROBED, ranks=ALL_PAIRS)) == []


def test_slow_rank_fails() -> None:
    ranks = ALL_PAIRS | {1: rank_result(flops=4e10, pairs=((1, 2, 1e9),))}
    assert problems(examination(probed=PROBED, ranks=ranks)) == [("fail", "product", "n2")]


def test_rank_that_hung_fails_without_its_pairs() -> None:
    ranks = {0: rank_result(pairs=((0, 2, 1e9),)), 1: rank_result(code=-9, timed_out=True), 2: rank_result()}
    exam = examination(probed=PROBED, ranks=ranks)
    (finding,) = findings_of(exam, "fail")
    assert (finding.check, finding.node) == ("ranks", "n2")
    assert finding.got == "rank 1 hung after 'product' and was killed"


def test_rank_that_died_fails_with_its_last_words() -> None:
    died = {"out": "", "code": 1, "timed_out": False, "last_words": "ImportError: libcudart.so"}
    ranks = {0: rank_result(pairs=((0, 2, 1e9),)), 1: died, 2: rank_result()}
    (finding,) = findings_of(examination(probed=PROBED, ranks=ranks), "fail")
    assert finding.node == "n2" and finding.got == "rank 1 ended with code 1: ImportError: libcudart.so"


def test_rank_without_result_fails() -> None:
    ranks = {0: rank_result(pairs=((0, 2, 1e9),)), 2: rank_result()}
    (finding,) = findings_of(examination(probed=PROBED, ranks=ranks), "fail")
    assert (finding.check, finding.node, finding.got) == ("ranks", "n2", "rank 1: no result")


def test_rank_that_sees_too_few_gpus_fails() -> None:
    request = {"probe_device": "cuda", "ranks_per_node": 1}
    failures = findings_of(examination(request, probed=PROBED, ranks=ALL_PAIRS), "fail")
    assert [(finding.check, finding.got) for finding in failures] == [("ranks", "torch 2.15.0 sees 0 GPUs")] * 3


def test_pair_without_result_fails_when_its_ranks_ended_well() -> None:
    ranks = {0: rank_result(pairs=((0, 2, 1e9),)), 1: rank_result(), 2: rank_result()}
    exam = examination(probed=PROBED, ranks=ranks)
    assert problems(exam) == [("fail", "pairs", "n1 and n2"), ("fail", "pairs", "n2 and n3")]


def test_pair_slower_than_similar_pairs_is_a_warning() -> None:
    ranks = ALL_PAIRS | {1: rank_result(pairs=((1, 2, 4e8),))}
    (finding,) = findings_of(examination(probed=PROBED, ranks=ranks), "warning")
    assert (finding.check, finding.node) == ("pairs", "n2 and n3")
    assert "0.40 GB/s" in finding.got and "median of such pairs is 1.00 GB/s" in finding.expected


def test_pairs_slower_than_their_link_are_warnings() -> None:
    slow = {0: rank_result(pairs=((0, 1, 1e8), (0, 2, 1e8))), 1: rank_result(pairs=((1, 2, 1e8),)), 2: rank_result()}
    warnings = findings_of(examination(probed=PROBED, ranks=slow), "warning")
    assert len(warnings) == 3 and all("the link allows 1.25 GB/s" in finding.expected for finding in warnings)
    # The rate of a link is unknown for virtual interfaces.
    facts = {node: node_facts(f"n{node + 1}", link_mbit=None) for node in range(3)}
    assert problems(examination(facts=facts, probed=PROBED, ranks=slow)) == []


def test_ranks_of_a_node_share_the_rate_of_its_link() -> None:
    facts = {node: node_facts(f"n{node + 1}", link_mbit=8000) for node in range(3)}
    ranks = {0: rank_result(pairs=((0, 1, 1e9), (0, 2, 1.6e8)))} | {rank: rank_result() for rank in (1, 2, 3)}
    exam = examination({"ranks_per_node": 2}, facts=facts, probed=(0, 1), ranks=ranks)
    assert not [finding for finding in findings_of(exam, "warning") if finding.check == "pairs"]  # 0.16 of 0.5 GB/s


def test_gpu_pairs_are_compared_with_their_kind_of_link() -> None:
    topology = [["X", "NV4"], ["NV4", "X"]]
    facts = facts_with(0, topology=topology, gpus=2, gpus_installed=2)
    start = '{"event": "start", "gpus": 2, "torch": "2.15.0"}\n'
    pair = '{"event": "pair", "pair": [0, 1], "latency_seconds": 1e-5, "bytes_per_second": 2e10}\n'
    ranks = {0: rank_result() | {"out": start + pair}, 1: rank_result() | {"out": start}}
    request = {"probe_device": "cuda", "ranks_per_node": 2}
    warnings = findings_of(examination(request, facts=facts, probed=(0,), ranks=ranks), "warning")
    assert [(entry.check, entry.node) for entry in warnings] == [("speed", "n2"), ("speed", "n3"), ("pairs", "n1")]
    assert "(within a node by NV4)" in warnings[2].got and warnings[2].expected == "the link allows 100.00 GB/s"


def test_node_left_out_of_the_measurements_is_a_warning() -> None:
    ranks = {0: rank_result(pairs=((0, 1, 1e9),)), 1: rank_result()}
    (finding,) = findings_of(examination(probed=(0, 2), ranks=ranks), "warning")
    assert finding.node == "n2" and "its ranks were not measured" in finding.got
