"""Examinations of samecurve doctor for tests: three nodes without a problem, to which a test adds its own."""

import json
from typing import Any

from launch.doctor.examination import Examination
from launch.doctor.judge import diagnosis
from launch.doctor.judge.findings import Finding

GIB = 1 << 30
REQUEST = {
    "seconds": 60.0,
    "ranks_per_node": 1,
    "gpus_per_node": 0,
    "device": "auto",
    "probe_device": "cpu",
    "run_root": "/runs",
    "data": {"name": "image_folder", "root": "/photos"},
    "workers": 0,
    "wandb": "online",
    "wandb_problem": "",
    "settings": "",
    "launcher": "",
    "clock_offset": None,
}


def node_facts(name: str, **changes: Any) -> dict[str, Any]:
    """The facts of a node without a problem, with changes."""
    space = {"path": "/runs", "total": 100 * GIB, "free": 50 * GIB}
    facts = {
        "name": name,
        "address": "10.0.0.1",
        "interface": "eth0",
        "link_mbit": 10000,
        "head_problem": "",
        "versions": {"python": "3.11.7", "torch": "2.15.0", "torchvision": "0.29.2", "accelerate": "1.15.0"},
        "torchvision_requires": "2.15.0",
        "gpus": 0,
        "gpus_installed": 0,
        "limits": {"nofile": 65536, "memlock": -1, "nproc": -1},
        "shm": space,
        "disk": {"run folder": space, "temp": space},
        "write_problem": "",
        "lock_problem": "",
        "data": {"problem": "", "summary": "two classes"},
        "own_name_problem": "",
        "wandb": {"has_key": True, "problem": "", "server": "https://wandb.example"},
        "clock": 1000.0,
        "received_at": 1000.0,
    }
    return facts | changes


def facts_with(node: int, **changes: Any) -> dict[int, Any]:
    """The facts of three nodes, with changes on one of them."""
    return {other: node_facts(f"n{other + 1}", **(changes if other == node else {})) for other in range(3)}


def reach_of(*nodes: int) -> dict[int, dict[str, Any]]:
    """The replies of nodes that reach all others and share the run folder."""
    return {node: {"unreachable": {}, "shared_problem": "", "has_own_flock": False} for node in nodes}


def examination(request: dict[str, Any] | None = None, **changes: Any) -> Examination:
    """Three nodes without a problem, n1, n2 and n3, with changes of the request and of the measurements."""
    names = ("n1", "n2", "n3")
    facts = {node: node_facts(name) for node, name in enumerate(names)}
    fields = {"facts": facts, "reach": reach_of(0, 1, 2), "answered": frozenset(range(3))} | changes
    return Examination(names, REQUEST | (request or {}), **fields)


def rank_result(flops: float = 1e11, pairs: tuple[tuple[int, int, float], ...] = (), **changes: Any) -> dict[str, Any]:
    """The result of a rank. pairs: lower rank, higher rank and bytes per second of each pair that it reports."""
    events: list[dict[str, Any]] = [
        {"event": "start", "gpus": 0, "torch": "2.15.0"},
        {"event": "product", "seconds": 0.01, "flops": flops},
    ]
    for lower, higher, rate in pairs:
        events.append({"event": "pair", "pair": [lower, higher], "latency_seconds": 1e-4, "bytes_per_second": rate})
    out = "\n".join(json.dumps(event) for event in events)
    return {"out": out, "code": 0, "timed_out": False, "last_words": ""} | changes


def findings_of(exam: Examination, state: str) -> list[Finding]:
    """The findings in a state."""
    return [finding for finding in diagnosis.judge(exam) if finding.state == state]


def problems(exam: Examination) -> list[tuple[str, str, str]]:
    """State, check and node of every finding that is not ok."""
    return [(entry.state, entry.check, entry.node) for entry in diagnosis.judge(exam) if entry.state != "ok"]
