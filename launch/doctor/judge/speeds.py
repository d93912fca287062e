"""What the ranks measured in, findings out: who is slow, which pair is slow, who hung or died."""

import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from launch.doctor.examination import Examination
from launch.doctor.judge.findings import Finding
from launch.doctor.node import pairing

_SLOW = 0.5  # of the median: all ranks would wait for this one half of their time
_FEWEST_TO_COMPARE = 3
_SLOW_LATENCY = 4.0
_LATENCY_FLOOR_SECONDS = 2e-3  # below it a difference is the system's, not the link's
_PART_OF_LINK = 0.3
_GLOO_BYTES_PER_SECOND = 1.25e9  # one connection does no more, however fast the link is
_NVLINK_BYTES_PER_SECOND = 25e9  # one link, each way (NVLink 3 and 4)
_PCIE_BYTES_PER_SECOND = 12e9  # what two GPUs get over 16 lanes of generation 3


def judge(exam: Examination) -> Iterator[Finding]:
    """Nothing where nothing was measured."""
    if exam.probed is None:
        return
    for node in exam.places:
        if node not in exam.probed:
            got = "its ranks were not measured: it does not answer, or does not reach all others"
            yield Finding("speed", exam.name(node), "warning", got)
    said = {rank: _lines(found["out"]) for rank, found in exam.ranks.items()}
    per_node = exam.asked["ranks_per_node"]
    node_of = {
        rank: node for place, node in enumerate(exam.probed) for rank in range(place * per_node, (place + 1) * per_node)
    }
    yield from _ended(exam, said, node_of)
    yield from _products(exam, said, node_of)
    yield from _pairs(exam, said, node_of)


def _lines(out: str) -> list[dict[str, Any]]:
    """What a rank printed; a last line that was cut off is none."""
    found = []
    for line in out.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in found if isinstance(entry, dict) and "what" in entry]


def _first(lines: list[dict[str, Any]], what: str) -> dict[str, Any] | None:
    return next((entry for entry in lines if entry["what"] == what), None)


def _ended(
    exam: Examination, said: Mapping[int, list[dict[str, Any]]], node_of: Mapping[int, int]
) -> Iterator[Finding]:
    """Ranks that did not come to their end, or have no GPU."""
    wanted = "measurements to the end"
    for rank, node in node_of.items():
        where = f"rank {rank}"
        if rank not in exam.ranks:
            yield Finding("ranks", exam.name(node), "fail", f"{where}: nothing was heard of it", wanted, "run it again")
            continue
        found = exam.ranks[rank]
        seen = _first(said[rank], "seen")
        if found["late"]:
            last = said[rank][-1]["what"] if said[rank] else "its start"
            do = "something holds it: look at that node's load and at its GPU (nvidia-smi)"
            yield Finding("ranks", exam.name(node), "fail", f"{where} hung after '{last}' and was killed", wanted, do)
        elif found["code"]:
            got = f"{where} ended with code {found['code']}: {found['last_words'] or 'no word'}"
            yield Finding("ranks", exam.name(node), "fail", got, wanted, "mend what it says")
        elif seen and exam.asked["probe_device"] == "cuda" and seen["gpus"] < exam.asked["ranks_per_node"]:
            got = f"torch {seen['torch']} sees {seen['gpus']} GPUs"
            wanted_gpus, do = f"{exam.asked['ranks_per_node']}", "is the driver new enough for this torch (nvidia-smi)?"
            yield Finding("ranks", exam.name(node), "fail", got, wanted_gpus, do)
        else:
            yield Finding("ranks", exam.name(node), "ok", "measured")


def _products(
    exam: Examination, said: Mapping[int, list[dict[str, Any]]], node_of: Mapping[int, int]
) -> Iterator[Finding]:
    products = {rank: entry for rank, lines in sorted(said.items()) if (entry := _first(lines, "product"))}
    if not products:
        return
    middle = statistics.median_high([entry["flops"] for entry in products.values()])
    for rank, entry in products.items():
        got = f"rank {rank}: {_flops(entry['flops'])}"
        slow = entry["flops"] < _SLOW * middle
        wanted = f"about {_flops(middle)}, the median of all" if slow else ""
        do = "all ranks would wait for it: look for other programs on it, its clock and its heat, or leave it out"
        yield Finding("product", exam.name(node_of[rank]), "fail" if slow else "ok", got, wanted, do if slow else "")


def _pairs(
    exam: Examination, said: Mapping[int, list[dict[str, Any]]], node_of: Mapping[int, int]
) -> Iterator[Finding]:
    """Each against its link's rate where that is known, and against the median of its like."""
    found = {tuple(entry["pair"]): entry for lines in said.values() for entry in lines if entry["what"] == "pair"}
    planned = [
        pair for members in pairing.disjoint_rounds([node_of[rank] for rank in sorted(node_of)]) for pair in members
    ]
    bad = {rank for rank, entry in exam.ranks.items() if entry["late"] or entry["code"]} | (
        set(node_of) - set(exam.ranks)
    )
    for pair in planned:
        if pair not in found and not bad & set(pair):
            do = "see their ranks' words; a link that loses large packets (MTU) looks like this"
            got = f"{_pair_name(pair)}: no all-reduce came to its end"
            yield Finding("pairs", _nodes_name(exam, node_of, pair), "fail", got, "an answer within 5 s", do)
    kinds: dict[str, list[tuple[int, int]]] = {}
    for pair in found:
        kinds.setdefault(_kind(exam, node_of, pair), []).append(pair)
    for kind, members in kinds.items():
        yield from _of_a_kind(exam, node_of, kind, {pair: found[pair] for pair in members})
    if len(node_of) > pairing.ALL_UP_TO_RANKS:
        got = f"{len(planned)} pairs measured: neighbours in the ring, and one of each two nodes, not all"
        yield Finding("pairs", "", "ok", got)


def _of_a_kind(
    exam: Examination, node_of: Mapping[int, int], kind: str, members: Mapping[tuple[int, int], dict[str, Any]]
) -> Iterator[Finding]:
    rate = statistics.median(entry["bytes_per_second"] for entry in members.values())
    latency = statistics.median(entry["latency_seconds"] for entry in members.values())
    many = len(members) >= _FEWEST_TO_COMPARE
    well = 0
    for pair, entry in members.items():
        link = _link_rate(exam, node_of, pair, kind)
        reasons = []
        if link and entry["bytes_per_second"] < _PART_OF_LINK * link:
            reasons.append(f"the link gives {_rate(link)}")
        if many and entry["bytes_per_second"] < _SLOW * rate:
            reasons.append(f"the median of such pairs is {_rate(rate)}")
        if many and entry["latency_seconds"] > max(_SLOW_LATENCY * latency, _LATENCY_FLOOR_SECONDS):
            reasons.append(f"their median latency is {_seconds(latency)}")
        if not reasons:
            well += 1
            continue
        got = f"{_pair_name(pair)}: {_rate(entry['bytes_per_second'])}, {_seconds(entry['latency_seconds'])} ({kind})"
        do = "look at the cable, the switch and other traffic between them"
        yield Finding("pairs", _nodes_name(exam, node_of, pair), "warning", got, "; ".join(reasons), do)
    if well:
        got = f"{well} of {len(members)} {kind}: all-reduce {_rate(rate)}, {_seconds(latency)} (median)"
        yield Finding("pairs", "", "ok", got)


def _kind(exam: Examination, node_of: Mapping[int, int], pair: tuple[int, int]) -> str:
    """Pairs of the same kind should be as fast as each other."""
    first, second = (node_of[rank] for rank in pair)
    if first != second:
        return "between nodes"
    table = exam.facts[first].get("topology") or []
    if exam.asked["probe_device"] != "cuda":
        return "within a node"
    here, there = (rank % exam.asked["ranks_per_node"] for rank in pair)
    known = here < len(table) and there < len(table[here])
    return f"within a node by {table[here][there]}" if known else "within a node"


def _link_rate(exam: Examination, node_of: Mapping[int, int], pair: tuple[int, int], kind: str) -> float | None:
    """Bytes a second that the link should give this pair, each way; None: unknown."""
    word = kind.rpartition(" by ")[2]
    if word.startswith("NV") and word[2:].isdigit():
        return int(word[2:]) * _NVLINK_BYTES_PER_SECOND
    if word in ("PIX", "PXB", "PHB", "NODE", "SYS"):
        return _PCIE_BYTES_PER_SECOND
    speeds = [exam.facts[node_of[rank]]["link_mbit"] for rank in pair]
    # Of GPUs it may be another network that counts, InfiniBand's; all ranks of a node may share the link at once.
    if kind != "between nodes" or exam.asked["probe_device"] == "cuda" or not all(speeds):
        return None
    share = float(min(speeds)) * 1e6 / 8 / int(exam.asked["ranks_per_node"])
    return min(share, _GLOO_BYTES_PER_SECOND)


def _pair_name(pair: tuple[int, int]) -> str:
    return f"ranks {pair[0]} and {pair[1]}"


def _nodes_name(exam: Examination, node_of: Mapping[int, int], pair: tuple[int, int]) -> str:
    return " and ".join(dict.fromkeys(exam.name(node_of[rank]) for rank in pair))


def _flops(flops: float) -> str:
    return f"{flops / 1e12:.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.1f} GFLOP/s"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.2f} GB/s"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"
