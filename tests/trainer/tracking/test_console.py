"""What a person sees on a terminal, drawn by a real one of so many columns."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from support.processes import REPOSITORY

from trainer.tracking.console import Console

SCRIPT = """
from trainer.console import Console, Row
console = Console(lambda text: None)
console.start(20, 12_345)
line = {"epoch": 1.5, "loss": 2.34567, "accuracy": 0.456, "samples_per_second": 9876.0}
console.training([Row(30, line, 0.0, 90.0), Row(40, line, 0.0, 75.0)])
console.close()
"""


TABLE = """
from pathlib import Path
from trainer.console import Console
row = {"name": "automobile", "precision": 0.987, "recall": 0.5, "f1": 0.664, "support": 1000}
test = {"classes": [row], "accuracy": 0.5, "num_samples": 1000}
summary = {"test": test, "train": {"samples_per_second": 9.0}, "world_size": 1, "steps": 3, "epochs": 1, "seconds": 2.0}
Console(lambda text: None).finished(summary, Path("runs/x"))
"""


def drawn(columns: int, script: str = SCRIPT, **env: str) -> str:
    """What a terminal of so many columns is sent."""
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"} | env
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, stdout=theirs, stderr=theirs, cwd=REPOSITORY, env=env, timeout=60, check=False)
    os.close(theirs)
    sent = b""
    try:
        while chunk := os.read(ours, 1 << 16):
            sent += chunk
    except OSError:  # Linux says so at the end
        pass
    os.close(ours)
    assert done.returncode == 0, sent
    return sent.decode()


def last_line(sent: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
    return [line for line in re.split(r"[\r\n]+", plain) if "step" in line][-1].rstrip()


@pytest.mark.parametrize(
    ("columns", "kept", "dropped"),
    [
        (120, ["epoch 1.50", "loss 2.3457", "accuracy 45.6%", "9,876 images/s", "1:15 left"], []),
        (80, ["loss 2.3457", "accuracy 45.6%", "1:15 left"], ["epoch", "images/s"]),
        (50, ["1:15 left"], ["epoch", "images/s", "accuracy"]),
    ],
)
def test_the_bar_fits_its_terminal(columns: int, kept: list[str], dropped: list[str]) -> None:
    line = last_line(drawn(columns))
    assert len(line) <= columns and "40/12345" in line and "…" not in line
    assert all(part in line for part in kept) and not any(part in line for part in dropped), line


def test_the_table_of_the_end_fits_its_terminal() -> None:
    wide, narrow = drawn(80, TABLE), drawn(36, TABLE)
    assert all(part in wide for part in ("automobile", "98.7%", "50.0%", "66.4%", "1,000"))
    assert all(part in narrow for part in ("automobile", "66.4%", "1,000")) and "98.7%" not in narrow
    assert "…" not in wide + narrow


def test_colours_show_where_they_are_wanted() -> None:
    assert "\x1b[38" in drawn(100) or "\x1b[1;3" in drawn(100) or "\x1b[3" in drawn(100)
    assert not re.search(r"\x1b\[[0-9;]*m", re.sub(r"\x1b\[0m", "", drawn(100, NO_COLOR="1")).replace("\x1b[1m", ""))


def test_a_file_gets_plain_lines() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    told = "epoch 1.50  loss 2.3457  accuracy 45.6%  9,876 images/s"
    wanted = f"step 30/12,345  {told}  1:30 left\nstep 40/12,345  {told}  1:15 left\n"
    assert done.stdout == wanted and not done.stderr


SPEAKING = """
from trainer.console import Console
console = Console(lambda text: None)
while True:
    console.log("a line")
"""


def test_a_reader_that_has_gone_ends_it_without_a_traceback() -> None:
    command = [sys.executable, "-c", SPEAKING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == b"a line\n"
            process.stdout.close()
            assert process.wait(60) == 1 and process.stderr.read() == b""
        finally:
            process.kill()


def test_a_line_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads speak, and where Python is unbuffered each piece would be a line's end for the other."""
    written: list[str] = []
    out = io.StringIO()
    monkeypatch.setattr(out, "write", lambda text: written.append(text), raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    Console(lambda text: None).log("a line")
    assert "".join(written) == "a line\n" and len([piece for piece in written if piece]) == 1
