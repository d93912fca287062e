"""Findings about nodes, made from examinations with one planted problem."""

import dataclasses
from typing import Any

import pytest
from support.examinations import GIB, examination, facts_with, findings_of, node_facts, problems, reach_of

VERSIONS = node_facts("n2")["versions"]
FULL_DISK = {"run folder": {"path": "/runs", "total": GIB, "free": 1}, "temp": None}
SMALL_DISK = {"run folder": {"path": "/runs", "total": 9 * GIB, "free": GIB}, "temp": None}
FULL_TEMP = {"run folder": None, "temp": {"path": "/tmp", "total": GIB, "free": 1}}
DOWNLOAD = {"problem": "no folder", "summary": "", "server": "data.example", "server_problem": ""}


def test_healthy_nodes_give_no_problem() -> None:
    assert problems(examination()) == []


@pytest.mark.parametrize(
    ("changes", "state", "check"),
    [
        ({"versions": VERSIONS | {"torch": "2.14.0"}, "torchvision_requires": "2.14.0"}, "fail", "versions"),
        ({"versions": VERSIONS | {"accelerate": None}}, "fail", "versions"),
        ({"versions": VERSIONS | {"python": "3.12.1"}}, "fail", "versions"),
        ({"versions": VERSIONS | {"python": "3.11.9"}}, "warning", "versions"),
        ({"torchvision_requires": "2.16.0"}, "fail", "versions"),
        ({"clock": 1005.0}, "warning", "clock"),
        ({"clock": 995.0}, "warning", "clock"),
        ({"clock": 900.0}, "fail", "clock"),
        ({"disk": FULL_DISK}, "fail", "disk"),
        ({"disk": SMALL_DISK}, "warning", "disk"),
        ({"disk": FULL_TEMP}, "warning", "disk"),
        ({"limits": {"nofile": 1024, "memlock": -1, "nproc": -1}}, "warning", "limits"),
        ({"lock_problem": "Function not implemented"}, "warning", "run folder"),
        ({"write_problem": "/runs: Read-only file system"}, "fail", "run folder"),
        ({"data": {"problem": "/photos/train: No such file", "summary": ""}}, "fail", "data"),
        ({"data": DOWNLOAD | {"server_problem": "no route"}}, "fail", "data"),
        ({"data": DOWNLOAD}, "warning", "data"),
        ({"head_problem": "cannot resolve the name n1"}, "fail", "reach"),
    ],
)
def test_problem_is_reported_for_its_node_only(changes: dict[str, Any], state: str, check: str) -> None:
    assert problems(examination(facts=facts_with(1, **changes))) == [(state, check, "n2")]


def test_small_shm_fails_only_with_workers_or_several_gpus() -> None:
    small = {"path": "/dev/shm", "total": GIB // 16, "free": GIB // 32}
    assert problems(examination(facts=facts_with(2, shm=small))) == []
    assert problems(examination({"workers": 4}, facts=facts_with(2, shm=small))) == [("fail", "shm", "n3")]
    medium = {"path": "/dev/shm", "total": GIB, "free": GIB // 2}
    assert problems(examination({"workers": 4}, facts=facts_with(2, shm=medium))) == [("warning", "shm", "n3")]


def test_limited_memlock_warns_on_gpu_nodes() -> None:
    facts = facts_with(1, limits={"nofile": 65536, "memlock": 65536, "nproc": -1})
    assert problems(examination(facts=facts)) == []
    facts = {node: entry | {"gpus": 1, "gpus_installed": 1} for node, entry in facts.items()}
    (finding,) = findings_of(examination({"gpus_per_node": 1}, facts=facts), "warning")
    assert (finding.node, finding.got, finding.expected) == ("n2", "memlock 65536", "unlimited, for InfiniBand")


def test_missing_gpus_fail() -> None:
    facts = {node: node_facts(f"n{node + 1}", gpus=8 - node // 2, gpus_installed=8) for node in range(3)}
    failures = findings_of(examination({"gpus_per_node": 8}, facts=facts), "fail")
    assert [(entry.check, entry.node, entry.got, entry.expected) for entry in failures] == [
        ("gpus", "n3", "7 GPUs visible (8 installed)", "8")
    ]


def test_cpu_build_of_torch_fails_on_gpu_node_unless_the_run_uses_the_cpu() -> None:
    versions = VERSIONS | {"torch": "2.15.0+cpu"}
    facts = {node: node_facts(f"n{node + 1}", versions=versions, gpus=1, gpus_installed=1) for node in range(3)}
    assert problems(examination(facts=facts)) == [("fail", "versions", f"n{number}") for number in (1, 2, 3)]
    assert problems(examination({"device": "cpu"}, facts=facts)) == []


def test_settings_that_do_not_fit_the_ranks_fail() -> None:
    assert problems(examination({"settings": "3 ranks for a batch of 64"})) == [("fail", "settings", "")]


def test_missing_wandb_access_fails_only_in_online_mode() -> None:
    no_access = facts_with(0, wandb={"has_key": False, "problem": "timed out", "server": "https://wandb.example"})
    assert problems(examination(facts=no_access)) == [("fail", "wandb", "n1")]
    assert problems(examination({"wandb": "auto"}, facts=no_access)) == []
    no_network = facts_with(0, wandb={"has_key": True, "problem": "timed out", "server": "https://wandb.example"})
    assert problems(examination({"wandb": "auto"}, facts=no_network)) == [("warning", "wandb", "n1")]


def test_node_with_a_flock_of_its_own_is_a_warning() -> None:
    reach = reach_of(0, 1, 2)
    reach[1]["has_own_flock"] = True
    assert problems(examination(reach=reach)) == [("warning", "shared", "n2")]


def test_node_without_shared_run_folder_fails() -> None:
    assert problems(examination(answered=frozenset({0, 2}))) == [("fail", "shared", "n2")]


def test_node_that_cannot_write_has_no_second_failure() -> None:
    facts = facts_with(1, write_problem="/runs: Read-only file system")
    assert problems(examination(facts=facts, answered=frozenset({0, 2}))) == [("fail", "run folder", "n2")]


def test_wrong_clock_of_the_coordinator_is_no_problem_of_the_nodes() -> None:
    facts = {node: node_facts(f"n{node + 1}", received_at=4000.0) for node in range(3)}
    assert problems(examination(facts=facts)) == []


def test_wrong_clocks_are_found_by_that_of_the_controller() -> None:
    # The first node, where the doctor runs, is two hours ahead. Of two nodes, each could be the wrong one.
    facts = {0: node_facts("n1"), 1: node_facts("n2", clock=1000.0 - 7200)}
    exam = examination({"clock_offset": 7200.0}, facts=facts, reach=reach_of(0, 1), answered=frozenset({0, 1}))
    exam = dataclasses.replace(exam, names=("n1", "n2"))
    assert problems(exam) == [("fail", "clock", "n1")]
    assert [finding.got for finding in findings_of(exam, "fail")] == ["7200.0 s ahead"]
    assert problems(examination({"clock_offset": -300.0})) == [("fail", "clock", f"n{node}") for node in (1, 2, 3)]
    assert problems(examination({"clock_offset": 20.0})) == []


def test_token_file_that_cannot_be_written_is_a_warning() -> None:
    exam = examination(answered=frozenset(), shared_problem="/runs: Permission denied")
    assert problems(exam) == [("warning", "shared", "")]


def test_node_without_answer_fails() -> None:
    facts = {node: node_facts(f"n{node + 1}") for node in (0, 2)}
    exam = examination(facts=facts, reach=reach_of(0, 2), answered=frozenset({0, 2}))
    assert problems(exam) == [("fail", "answer", "n2")]
    exam = examination(reach=reach_of(0, 2), answered=frozenset({0, 2}))
    assert problems(exam) == [("fail", "answer", "n2")]


def test_unreachable_node_is_reported_with_its_ranks_and_dropped() -> None:
    reach = reach_of(0, 1, 2)
    for node in (0, 2):
        reach[node]["unreachable"] = {"1": "timed out"}
    exam = examination({"ranks_per_node": 2}, reach=reach)
    (finding,) = findings_of(exam, "fail")
    assert finding.node == "n2" and "not reached from n1 (timed out), n3 (timed out)" in finding.got
    assert "ranks 2-3 by ranks 0-1, ranks 4-5" in finding.got
    assert exam.connected_nodes() == (0, 2)


def test_node_that_reaches_no_other_one_is_dropped() -> None:
    reach = reach_of(0, 1, 2)
    reach[1]["unreachable"] = {"0": "timed out", "2": "timed out"}
    assert examination(reach=reach).connected_nodes() == (0, 2)


def test_nodes_with_equal_names_are_numbered() -> None:
    facts = {node: node_facts("localhost" if node < 2 else "n3") for node in range(3)}
    exam = examination(facts=facts)
    assert [exam.name(node) for node in exam.nodes] == ["localhost#0", "localhost#1", "n3"]
