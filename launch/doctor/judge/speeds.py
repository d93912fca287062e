"""Turns the measurements of the ranks into findings: slow ranks, slow pairs, and ranks that hung or died."""

import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.examination import Examination
from launch.doctor.judge.findings import Finding
from launch.doctor.node import pairing
from launch.doctor.node.pairing import Pair

_SLOW_SHARE = 0.5  # of the median: every rank would wait half of its time for this one
_MIN_TO_COMPARE = 3
_SLOW_LATENCY_FACTOR = 4.0
_MIN_SLOW_LATENCY_SECONDS = 2e-3  # shorter differences come from the operating system, not from the link
_MIN_SHARE_OF_LINK = 0.3
_GLOO_BYTES_PER_SECOND = 1.25e9  # the limit of one connection, however fast the link is
_NVLINK_BYTES_PER_SECOND = 25e9  # one link, each way (NVLink 3 and 4)
_PCIE_BYTES_PER_SECOND = 12e9  # between two GPUs over 16 lanes of generation 3

Events = list[dict[str, Any]]


def judge(exam: Examination) -> Iterator[Finding]:
    """Yields the findings about ranks; none if no rank was to be measured."""
    if exam.probed is None:
        return
    for node in exam.nodes:
        if node not in exam.probed:
            got = "its ranks were not measured: it does not answer, or does not reach all other nodes"
            yield Finding("speed", exam.name(node), "warning", got)
    measurements = Measurements(exam, exam.probed)
    yield from _rank_ends(measurements)
    yield from _products(measurements)
    yield from _pairs(measurements)


class Measurements:
    """The output of the ranks, parsed, with the node of each rank."""

    def __init__(self, exam: Examination, probed: tuple[int, ...]) -> None:
        self.exam = exam
        self.ranks_per_node: int = exam.request["ranks_per_node"]
        self.is_cuda = exam.request.get("probe_device") == "cuda"
        nodes = [node for node in probed for _ in range(self.ranks_per_node)]
        self.node_of_rank = dict(enumerate(nodes))
        self.events = {rank: _parse_events(result["out"]) for rank, result in exam.ranks.items()}

    def node_name(self, rank: int) -> str:
        """Returns the display name of a rank's node."""
        return self.exam.name(self.node_of_rank[rank])

    def node_names(self, pair: Pair) -> str:
        """Returns the display names of a pair's nodes, or the name of its only node."""
        return " and ".join(dict.fromkeys(self.node_name(rank) for rank in pair))


def _parse_events(out: str) -> Events:
    """Returns the events that a rank printed, without a last line that was cut off."""
    events = []
    for line in out.splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [event for event in events if isinstance(event, dict) and "event" in event]


def _first_event(events: Events, name: str) -> dict[str, Any] | None:
    return next((event for event in events if event["event"] == name), None)


def _rank_ends(measurements: Measurements) -> Iterator[Finding]:
    """Reports ranks that did not reach the end or that see too few GPUs."""
    for rank in measurements.node_of_rank:
        problem = _rank_problem(measurements, rank)
        yield problem or Finding("ranks", measurements.node_name(rank), "ok", "measured")


def _rank_problem(measurements: Measurements, rank: int) -> Finding | None:
    exam, name = measurements.exam, measurements.node_name(rank)
    expected = "measurements to the end"
    if rank not in exam.ranks:
        return Finding("ranks", name, "fail", f"rank {rank}: no result", expected, "run the doctor again")
    result, events = exam.ranks[rank], measurements.events[rank]
    if result["timed_out"]:
        last_event = f"after '{events[-1]['event']}'" if events else "before its first output"
        got, fix = f"rank {rank} hung {last_event} and was killed", "check that node's load and its GPU (nvidia-smi)"
        return Finding("ranks", name, "fail", got, expected, fix)
    if result["code"]:
        got = f"rank {rank} ended with code {result['code']}: {result['last_words'] or 'no error message'}"
        return Finding("ranks", name, "fail", got, expected, "resolve this error")
    start = _first_event(events, "start")
    if start and measurements.is_cuda and start["gpus"] < measurements.ranks_per_node:
        got = f"torch {start['torch']} sees {start['gpus']} GPUs"
        fix = "check that the driver is new enough for this torch (nvidia-smi)"
        return Finding("ranks", name, "fail", got, f"{measurements.ranks_per_node}", fix)
    return None


def _products(measurements: Measurements) -> Iterator[Finding]:
    """Compares each rank's matrix product with the median of all ranks."""
    products = {
        rank: product
        for rank, events in sorted(measurements.events.items())
        if (product := _first_event(events, "product"))
    }
    if not products:
        return
    median = statistics.median_high([product["flops"] for product in products.values()])
    for rank, product in products.items():
        got, name = f"rank {rank}: {_format_flops(product['flops'])}", measurements.node_name(rank)
        if product["flops"] < _SLOW_SHARE * median:
            expected = f"about {_format_flops(median)}, the median of all ranks"
            fix = "all ranks would wait for it: check other programs, the clock rate and the heat, or exclude the node"
            yield Finding("product", name, "fail", got, expected, fix)
        else:
            yield Finding("product", name, "ok", got)


def _pairs(measurements: Measurements) -> Iterator[Finding]:
    """Compares each pair with the rate of its link, where that is known, and with the median of similar pairs."""
    nodes = list(measurements.node_of_rank.values())
    planned = [pair for members in pairing.disjoint_rounds(nodes) for pair in members]
    results: dict[Pair, dict[str, Any]] = {
        (event["pair"][0], event["pair"][1]): event
        for events in measurements.events.values()
        for event in events
        if event["event"] == "pair"
    }
    yield from _missing_pairs(measurements, planned, results)
    by_kind: dict[str, dict[Pair, dict[str, Any]]] = {}
    for pair, result in results.items():
        by_kind.setdefault(_link_kind(measurements, pair), {})[pair] = result
    for kind, members in by_kind.items():
        yield from _pairs_of_kind(measurements, kind, members)
    if len(nodes) > pairing.ALL_PAIRS_MAX_RANKS:
        got = f"measured {len(planned)} pairs, not all: neighbors in the ring, and one pair of every two nodes"
        yield Finding("pairs", "", "ok", got)


def _missing_pairs(
    measurements: Measurements, planned: list[Pair], results: Mapping[Pair, dict[str, Any]]
) -> Iterator[Finding]:
    """Reports pairs without a result, unless one of their ranks failed: `_rank_ends` reports that rank."""
    ranks = measurements.exam.ranks
    failed = {rank for rank, result in ranks.items() if result["timed_out"] or result["code"]}
    failed |= set(measurements.node_of_rank) - set(ranks)
    for pair in planned:
        if pair not in results and not failed & set(pair):
            got = f"{_pair_name(pair)}: no all-reduce finished"
            fix = "read the output of the ranks; a link that loses large packets (MTU) looks like this"
            yield Finding("pairs", measurements.node_names(pair), "fail", got, "a result within 5 s", fix)


def _pairs_of_kind(measurements: Measurements, kind: str, results: Mapping[Pair, dict[str, Any]]) -> Iterator[Finding]:
    rate = statistics.median(result["bytes_per_second"] for result in results.values())
    latency = statistics.median(result["latency_seconds"] for result in results.values())
    num_ok = 0
    for pair, result in results.items():
        reasons = []
        link_rate = _link_rate(measurements, pair, kind)
        if link_rate and result["bytes_per_second"] < _MIN_SHARE_OF_LINK * link_rate:
            reasons.append(f"the link allows {_format_rate(link_rate)}")
        if len(results) >= _MIN_TO_COMPARE:
            if result["bytes_per_second"] < _SLOW_SHARE * rate:
                reasons.append(f"the median of such pairs is {_format_rate(rate)}")
            if result["latency_seconds"] > max(_SLOW_LATENCY_FACTOR * latency, _MIN_SLOW_LATENCY_SECONDS):
                reasons.append(f"their median latency is {_format_seconds(latency)}")
        if not reasons:
            num_ok += 1
            continue
        measured = f"{_format_rate(result['bytes_per_second'])}, {_format_seconds(result['latency_seconds'])}"
        got, fix = (
            f"{_pair_name(pair)}: {measured} ({kind})",
            "check the cable, the switch and other traffic between them",
        )
        yield Finding("pairs", measurements.node_names(pair), "warning", got, "; ".join(reasons), fix)
    if num_ok:
        got = f"{num_ok} of {len(results)} {kind}: all-reduce {_format_rate(rate)}, {_format_seconds(latency)} (median)"
        yield Finding("pairs", "", "ok", got)


def _link_kind(measurements: Measurements, pair: Pair) -> str:
    """Returns the kind of link between a pair. Pairs of the same kind should be equally fast."""
    first_node, second_node = (measurements.node_of_rank[rank] for rank in pair)
    if first_node != second_node:
        return "between nodes"
    if not measurements.is_cuda:
        return "within a node"
    topology = measurements.exam.facts[first_node].get("topology") or []
    first_gpu, second_gpu = (rank % measurements.ranks_per_node for rank in pair)
    is_known = first_gpu < len(topology) and second_gpu < len(topology[first_gpu])
    return f"within a node by {topology[first_gpu][second_gpu]}" if is_known else "within a node"


def _link_rate(measurements: Measurements, pair: Pair, kind: str) -> float | None:
    """Returns the bytes per second, each way, that the link should allow this pair; None: unknown."""
    link = kind.rpartition(" by ")[2]
    if link.startswith("NV") and link[2:].isdigit():
        return int(link[2:]) * _NVLINK_BYTES_PER_SECOND
    if link in ("PIX", "PXB", "PHB", "NODE", "SYS"):
        return _PCIE_BYTES_PER_SECOND
    speeds = [measurements.exam.facts[measurements.node_of_rank[rank]]["link_mbit"] for rank in pair]
    # GPUs may use another network, InfiniBand. All ranks of a node may share the link at the same time.
    if kind != "between nodes" or measurements.is_cuda or not all(speeds):
        return None
    share = float(min(speeds)) * 1e6 / 8 / measurements.ranks_per_node
    return min(share, _GLOO_BYTES_PER_SECOND)


def _pair_name(pair: Pair) -> str:
    return f"ranks {pair[0]} and {pair[1]}"


def _format_flops(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def _format_rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def _format_seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
