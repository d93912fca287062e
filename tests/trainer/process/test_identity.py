"""Processes are told apart from others with the same pid, and are known to be gone."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import pytest

from trainer.process import identity
from trainer.process.identity import ProcessIdentity, is_suspended, process_state


def test_own_process_is_alive_and_on_this_machine() -> None:
    own = ProcessIdentity.of(os.getpid())
    assert own.is_on_this_machine and not own.is_gone
    assert own == ProcessIdentity(**dataclasses.asdict(own))


def test_ended_process_is_gone_also_as_a_zombie() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = ProcessIdentity.of(process.pid)
    assert not other.is_gone
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while not is_suspended(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not other.is_gone
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert other.is_gone  # a zombie
    process.wait()
    assert other.is_gone and process_state(process.pid) == "gone"


def test_other_process_with_the_same_pid_does_not_count() -> None:
    assert dataclasses.replace(ProcessIdentity.of(os.getpid()), started="1").is_gone


@pytest.mark.parametrize("change", [{"host": "n2"}, {"boot": "another boot, or another container"}])
def test_process_of_another_machine_is_never_known_to_be_gone(change: dict[str, str]) -> None:
    other = dataclasses.replace(ProcessIdentity.of(1 << 30), **change)
    assert not other.is_on_this_machine and not other.is_gone


def test_machine_without_proc_has_identities_too(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(identity, "_PROC", tmp_path)
    identity._boot.cache_clear()
    own = ProcessIdentity.of(os.getpid())
    assert own.started and own.boot and not own.is_gone and ProcessIdentity.of(1 << 30).is_gone
    identity._boot.cache_clear()
