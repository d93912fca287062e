"""Tests the console on pseudo-terminals of several widths and on files."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.processes import REPOSITORY

from trainer.tracking.console import Console

PROGRESS_SCRIPT = """
from trainer.tracking.console import Console, TrainingRow
console = Console(lambda text: None)
console.start(20, 12_345)
scalars = {"epoch": 1.5, "loss": 2.34567, "accuracy": 0.456, "samples_per_second": 9876.0}
console.log_training([TrainingRow(30, scalars, 0.0, 90.0), TrainingRow(40, scalars, 0.0, 75.0)])
console.close()
"""
SUMMARY_SCRIPT = """
from pathlib import Path
from trainer.tracking.console import Console
row = {"name": "automobile", "precision": 0.987, "recall": 0.5, "f1": 0.664, "support": 1000}
test = {"classes": [row], "accuracy": 0.5, "num_samples": 1000}
summary = {"test": test, "train": {"samples_per_second": 9.0}, "world_size": 1, "steps": 3, "epochs": 1, "seconds": 2.0}
Console(lambda text: None).log_summary(summary, Path("runs/x"))
"""
HOSTILE_SCRIPT = """
from pathlib import Path
from trainer.text.streams import protect_streams
from trainer.tracking.console import Console
protect_streams()
row = {"name": "[cat]:smile:\\x1b[31m", "precision": 0.987, "recall": 0.5, "f1": 0.664, "support": 1000}
test = {"classes": [row], "accuracy": 0.5, "num_samples": 1000}
summary = {"test": test, "train": {"samples_per_second": 9.0}, "world_size": 1, "steps": 3, "epochs": 1, "seconds": 2.0}
logged = []
console = Console(logged.append)
console.log("[bold]x[/bold] :smile: \\x1b[31m \\u202e")
console.log_summary(summary, Path("runs/[x]"))
for text in ("[bold]x[/bold] :smile: \\\\x1b[31m \\\\u202e", "[cat]:smile:\\\\x1b[31m", "runs/[x]"):
    assert any(text in line for line in logged), (text, logged)
"""


def run_on_terminal(columns: int, script: str = PROGRESS_SCRIPT, **env: str) -> str:
    """Runs a script on a pseudo-terminal and returns its output with escape sequences."""
    controller, terminal = pty.openpty()
    env = os.environ | {"COLUMNS": str(columns), "TERM": "xterm-256color"} | env
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, stdout=terminal, stderr=terminal, cwd=REPOSITORY, env=env, timeout=60, check=False)
    os.close(terminal)
    output = b""
    try:
        while chunk := os.read(controller, 1 << 16):
            output += chunk
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        pass
    os.close(controller)
    assert result.returncode == 0, output
    return output.decode()


def last_progress_line(output: str) -> str:
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    return [line for line in re.split(r"[\r\n]+", plain) if "step" in line][-1].rstrip()


@pytest.mark.parametrize(
    ("columns", "shown", "dropped"),
    [
        (120, ["epoch 1.50", "loss 2.3457", "accuracy 45.6%", "9,876 images/s", "1:15 left"], []),
        (80, ["loss 2.3457", "accuracy 45.6%", "1:15 left"], ["epoch", "images/s"]),
        (50, ["1:15 left"], ["epoch", "images/s", "accuracy"]),
    ],
)
def test_progress_bar_fits_the_terminal(columns: int, shown: list[str], dropped: list[str]) -> None:
    line = last_progress_line(run_on_terminal(columns))
    assert len(line) <= columns and "40/12,345" in line and "…" not in line
    assert all(field in line for field in shown) and not any(field in line for field in dropped), line


def test_class_table_fits_the_terminal() -> None:
    wide, narrow = run_on_terminal(80, SUMMARY_SCRIPT), run_on_terminal(36, SUMMARY_SCRIPT)
    assert all(cell in wide for cell in ("automobile", "98.7%", "50.0%", "66.4%", "1,000"))
    assert all(cell in narrow for cell in ("automobile", "66.4%", "1,000")) and "98.7%" not in narrow
    assert "…" not in wide + narrow


def test_no_color_variable_disables_colors() -> None:
    assert "\x1b[3" in run_on_terminal(100) or "\x1b[1;3" in run_on_terminal(100)
    plain = re.sub(r"\x1b\[0m", "", run_on_terminal(100, NO_COLOR="1")).replace("\x1b[1m", "")
    assert not re.search(r"\x1b\[[0-9;]*m", plain)


def test_output_to_a_file_is_one_plain_line_for_each_row() -> None:
    command = [sys.executable, "-c", PROGRESS_SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    metrics = "epoch 1.50  loss 2.3457  accuracy 45.6%  9,876 images/s"
    assert result.stdout == f"step 30/12,345  {metrics}  1:30 left\nstep 40/12,345  {metrics}  1:15 left\n"
    assert not result.stderr


@pytest.mark.parametrize(("columns", "term"), [(0, "dumb"), (1, "xterm-256color"), (10_000, ""), (1, "unknown")])
def test_console_prints_on_any_terminal(columns: int, term: str) -> None:
    for script in (PROGRESS_SCRIPT, HOSTILE_SCRIPT):
        run_on_terminal(columns, script, TERM=term)


def test_markup_emoji_and_control_characters_are_shown_as_text() -> None:
    command = [sys.executable, "-c", HOSTILE_SCRIPT]
    piped = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True).stdout
    for output in (piped, run_on_terminal(120, HOSTILE_SCRIPT, NO_COLOR="1")):
        assert "[bold]x[/bold] :smile: \\x1b[31m \\u202e" in output and "[cat]:smile:\\x1b[31m" in output
        assert "runs/[x]" in output and "\x1b[31m" not in output


def test_line_is_written_in_a_single_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads print; with unbuffered output, each write of one could end inside a line of the other."""
    writes: list[str] = []
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "write", lambda text: writes.append(text), raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    Console(lambda text: None).log("a line")
    assert [text for text in writes if text] == ["a line\n"]


def test_evaluation_is_one_line_with_both_splits_and_the_best_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(lambda text: None)
    console.log_evaluation("validation", 1380, {"loss": 0.25, "accuracy": 0.97}, "validation 97.50% at step 1,150")
    console.log_evaluation("test", 1380, {"loss": 0.5, "accuracy": 0.9}, "validation 97.50% at step 1,150")
    console.log_evaluation("test", 1403, {"loss": 0.5, "accuracy": 0.9, "tta_accuracy": 0.91})
    assert capsys.readouterr().out.splitlines() == [
        "test at step 1,380: loss 0.5000  accuracy 90.00%  validation: loss 0.2500  accuracy 97.00%  "
        "best so far: validation 97.50% at step 1,150",
        "test at step 1,403: loss 0.5000  accuracy 90.00%  with test-time augmentation 91.00%",
    ]


def test_notebook_shows_the_class_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    display = SimpleNamespace(display=shown.append)  # rich imports this module in a notebook
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    logged: list[str] = []
    row = {"name": "cat", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    test = {"classes": [row], "accuracy": 0.5, "num_samples": 2}
    summary = {"test": test, "train": {"samples_per_second": 9.0}, "world_size": 1, "steps": 3, "epochs": 1}
    Console(logged.append).log_summary(summary | {"seconds": 2.0}, Path("runs/x"))
    tables = [part for part in shown if "precision" in str(getattr(part, "html", part))]
    assert len(tables) == 1 and "precision" in logged[0]
