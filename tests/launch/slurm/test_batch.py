"""Ports and waiting of the batch script; tests/slurm runs whole jobs."""

import signal
import socket

import pytest

from launch.slurm import batch
from trainer.errors import FolderError, WorldError


class BusyFolder:
    """A run folder that is in use for a number of polls."""

    path = "runs/x"

    def __init__(self, polls: int) -> None:
        self.polls = polls

    def is_in_use(self) -> bool:
        self.polls -= 1
        return self.polls >= 0


class NoSignal:
    """A SignalForwarder that has received nothing."""

    received = None


def test_free_port_skips_ports_in_use() -> None:
    first = batch.candidate_port(4711)
    with socket.create_server(("", first)):
        port = batch.free_port(4711)
    assert port != first and port in [batch.candidate_port(4711, attempt) for attempt in range(1, 100)]


def test_successive_jobs_try_different_ports() -> None:
    ports = [batch.candidate_port(job, attempt) for job in (7, 8, 9) for attempt in range(7)]
    assert len(set(ports)) == 21 and all(20000 <= port < 30000 for port in ports)


def test_node_without_free_port_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_PORT_CANDIDATES", 1)
    with (
        socket.create_server(("", batch.candidate_port(12))),
        pytest.raises(WorldError, match="no free port among the 1 from 20084 on"),
    ):
        batch.free_port(12)


def test_job_waits_until_the_run_folder_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_POLL_SECONDS", 0.0)
    folder = BusyFolder(3)
    batch.wait_until_free(folder, NoSignal())  # type: ignore[arg-type]
    assert folder.polls == -1
    monkeypatch.setattr(batch, "_FOLDER_IN_USE_SECONDS", -1.0)
    with pytest.raises(FolderError, match="another process still uses run folder runs/x"):
        batch.wait_until_free(BusyFolder(3), NoSignal())  # type: ignore[arg-type]


def test_signal_ends_the_wait_for_the_run_folder() -> None:
    folder, forwarder = BusyFolder(10**9), NoSignal()
    forwarder.received = signal.SIGUSR1  # type: ignore[assignment]
    batch.wait_until_free(folder, forwarder)  # type: ignore[arg-type]
