"""The launcher of a process is found behind wrappers, and a shell is never taken for one."""

import subprocess
import sys
import time

import pytest

from trainer.process import launcher
from trainer.process.identity import process_state

# Prints the launcher's pid, from a process that a shell script of the launcher starts.
CHILD = "from trainer.process.launcher import find_launcher; print(find_launcher())"
LAUNCHER = """
import os, subprocess, sys
variable, wrapper, child = sys.argv[1:4]
words = [sys.executable, "-c", child]
words = ["sh", "-c", '"$@"; true', "sh", *words] if wrapper == "sh" else words
print(os.getpid(), flush=True)
subprocess.run(words, env=os.environ | {variable: "x", "RANK": "0"}, check=True)
"""


@pytest.mark.parametrize("wrapper", ["", "sh"])
@pytest.mark.parametrize(
    ("variable", "word", "is_found"),
    [
        ("TORCHELASTIC_RUN_ID", "", True),
        ("ACCELERATE_MIXED_PRECISION", "accelerate", True),
        ("ACCELERATE_MIXED_PRECISION", "", False),
        ("PATH_OF_NO_LAUNCHER", "accelerate", False),
    ],
)
def test_launcher_is_the_ancestor_that_set_the_variable(variable: str, word: str, is_found: bool, wrapper: str) -> None:
    command = [sys.executable, "-c", LAUNCHER, variable, wrapper, CHILD, word]
    pid, found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()
    assert found == (pid if is_found else "0")


def test_process_of_a_shell_has_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.find_launcher() == 0
    for variable in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        script = f"export {variable}=no; {sys.executable} -c '{CHILD}'"
        assert subprocess.run(["sh", "-c", script], capture_output=True, timeout=60, check=True).stdout == b"0\n"


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_end_of_a_process_that_is_no_child_is_noticed(has_pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_pidfd:
        monkeypatch.setattr(launcher.os, "pidfd_open", lambda pid: (_ for _ in ()).throw(PermissionError()))
        monkeypatch.setattr(launcher, "_POLL_SECONDS", 0.01)
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '1.5'], stdout=-3, stderr=-3).pid)"
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True).stdout)
    start = time.monotonic()
    launcher.wait_for_end(pid)
    assert 0.02 < time.monotonic() - start < 10 and process_state(pid) in ("gone", "Z")
    launcher.wait_for_end(pid)  # at once
