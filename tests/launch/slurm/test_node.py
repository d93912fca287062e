"""The torchrun command of each node, and the network that the nodes share."""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import launch.signals
from launch.slurm import node

Commands = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Records the commands and environments that a node would run."""
    recorded: Commands = []

    class Recorder:
        def run(self, argv: Sequence[str], environment: Mapping[str, str]) -> int:
            recorded.append((list(argv), dict(environment)))
            return 0

    monkeypatch.setattr(launch.signals, "SignalForwarder", Recorder)
    return recorded


def start_node(nodes: int, ranks: int, second: str | None = None) -> None:
    options = {"nodes": nodes, "ranks": ranks, "endpoint": "127.0.0.1:20000", "second": second, "id": "12_3"}
    options["controller_time"] = time.time()
    assert node.main(argparse.Namespace(config=["digits"], **options), ["optim.lr=1"]) == 0


def test_single_rank_starts_without_torchrun(commands: Commands) -> None:
    start_node(1, 1)
    argv, _ = commands[0]
    assert not any("elastic.py" in word for word in argv) and argv[-3:] == ["--config", "digits", "optim.lr=1"]


def test_ranks_of_a_single_node_meet_on_its_loopback_address(commands: Commands) -> None:
    start_node(1, 4)
    argv, _ = commands[0]
    assert "--nproc-per-node=4" in argv and "--rdzv-endpoint=127.0.0.1:0" in argv and "--rdzv-id=12_3" not in argv


@pytest.mark.parametrize(("node_id", "is_host"), [("0", True), ("1", False)])
def test_several_nodes_meet_on_the_first_one(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, node_id: str, is_host: bool
) -> None:
    monkeypatch.setenv("SLURM_NODEID", node_id)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    start_node(2, 4, second="127.0.0.1")
    argv, environment = commands[0]
    assert {"--nnodes=2", "--rdzv-endpoint=127.0.0.1:20000", "--rdzv-id=12_3", "--local-addr=127.0.0.1"} <= set(argv)
    assert f"--rdzv-conf=is_host={is_host}" in argv
    assert environment["GLOO_SOCKET_IFNAME"] == "lo" and environment["NCCL_SOCKET_IFNAME"] == "ib0"


def test_interface_of_an_unknown_address_sets_no_variable() -> None:
    assert node.interface_variables("203.0.113.1") == {}


@pytest.mark.parametrize("offset", [7200, -7200, -70])
def test_wrong_clock_is_named_and_the_end_of_the_job_corrected(offset: int, capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"SLURM_JOB_END_TIME": "1700003600", "SLURMD_NODENAME": "n2"}
    corrected = node.correct_job_end(environment, time.time() - offset)
    assert int(corrected["SLURM_JOB_END_TIME"]) == pytest.approx(1700003600 + offset, abs=2)
    error = capsys.readouterr().err
    direction = "ahead of" if offset > 0 else "behind"
    assert f"the clock of n2 is {abs(offset):,} s {direction} the controller's" in error and error.count("\n") == 1
    assert node.correct_job_end({}, time.time() - offset) == {}


@pytest.mark.parametrize("seconds", [90, 900])
def test_slow_start_of_the_task_is_no_error_of_the_clock(
    seconds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sdiag").write_text(f"#!/bin/sh\necho 'sdiag output at Sun Nov 29 20:51:09 2026 ({time.time():.0f})'\n")
    (tmp_path / "sdiag").chmod(0o755)
    environment = {"SLURM_JOB_END_TIME": "1700003600"}
    if seconds < 600:  # no command of SLURM here
        assert node.correct_job_end(environment, time.time() - seconds) == environment
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert node.correct_job_end(environment, time.time() - seconds) == environment
    assert capsys.readouterr().err == ""


def test_clock_that_agrees_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"SLURM_JOB_END_TIME": "1700003600"}
    assert node.correct_job_end(environment, time.time() - 20) == environment  # srun took 20 s to start this task
    assert capsys.readouterr().err == ""
