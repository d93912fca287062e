"""samecurve's commands end quietly when their output cannot be printed, and show any name as text."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from support.html_page import HtmlPage
from support.processes import REPOSITORY, Samecurve
from support.run_folders import make_run_folder

from trainer.config.load import load_config, to_yaml
from trainer.inference.predict import ClassProbability, Prediction, print_predictions
from trainer.report.html import write_report
from trainer.text.escape import is_visible

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]
ODD = [
    "\x1b[31m",
    "\x1b]0;title\a",
    "\n",
    "\r",
    "\t",
    "\x9b2J",
    "\u202e",
    "\u200b",
    "\u2066",
    "\ufeff",
    "\udcff",
    "\x7f",
]
ODD += [
    "[cat]",
    "[/]",
    "[bold]",
    ":smile:",
    "<script>alert(1)</script>",
    "&amp;",
    "\"'",
    "=1+1",
    "@SUM(A1)",
    "-1",
    "+1",
]
ODD += [
    "%s",
    "{0}",
    "$x$",
    "\\",
    "猫",
    "é",
    "é",
    "a b",
    "…",
    "'",
    "`id`",
    "$(id)",
    ";",
    "|",
    "-rf",
    "--",
    "`",
    "~",
    "*",
]


def odd_name(draw: random.Random) -> str:
    return "".join(draw.choice([*ODD, "a", "name"]) for _ in range(draw.randrange(1, 4)))


def full_disk() -> IO[bytes]:
    return Path("/dev/full").open("wb", buffering=0)


def is_safe(text: str) -> bool:
    return all(character == "\n" or is_visible(character) for character in text)


@pytest.fixture
def run() -> Path:
    path = make_run_folder("x", ("finished", 3), {})
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_text("a line\n" * 100_000)
    return path


@pytest.mark.parametrize(
    "command", ["logs x", "logs x --lines 9", "status", "status x", "status --json", "--help", "train -h"]
)
@pytest.mark.usefixtures("run")
def test_command_that_prints_ends_quietly_without_its_output(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    words = [*SAMECURVE, *command.split()]
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(words, stdout=write_end, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(write_end)
    is_viewer = command != "train -h"
    assert (done.returncode, done.stderr) == (141 if is_viewer else 0, b"")
    with full_disk() as stdout:
        done = subprocess.run(words, stdout=stdout, stderr=subprocess.PIPE, timeout=60, check=False)
    if command in ("--help", "train -h"):
        assert (done.returncode, done.stderr) == (0, b"")
    else:
        assert done.returncode == 2
        assert (
            done.stderr == b"samecurve: standard output cannot be written (No space left on device); free space there\n"
        )


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full", ">/dev/null 2>&1"])
@pytest.mark.parametrize(
    ("command", "code"), [("status x", 0), ("logs x", 0), ("status y", 2), ("train train.epoch=3", 2)]
)
@pytest.mark.usefixtures("run")
def test_closed_streams_change_no_exit_code(command: str, code: int, closed: str) -> None:
    shell = f"{' '.join(SAMECURVE)} {command} {closed}"
    done = subprocess.run(shell, shell=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == code and b"Traceback" not in done.stderr and b"ignored" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16"])
def test_names_are_printed_in_any_encoding(encoding: str) -> None:
    make_run_folder("猫", ("finished", 3), {})
    for words in (["status"], ["status", "猫"], ["status", "--json"], ["status", "nosuch-猫"]):
        env = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run([*SAMECURVE, *words], capture_output=True, env=env, timeout=60, check=False)
        assert done.returncode == (2 if "nosuch-猫" in words else 0)
        shown = (done.stderr if done.returncode else done.stdout).decode(encoding)
        assert ("猫" if encoding == "utf-16" and "--json" not in words else "\\u732b") in shown
        assert b"Traceback" not in done.stderr


def test_three_hundred_odd_names_are_shown_as_text(samecurve: Samecurve) -> None:
    draw = random.Random(0)
    for number in range(300):
        name = odd_name(draw)
        folder = f"{name}{number}".replace("/", "_")
        path = make_run_folder(folder, None, {"host": name, "job": name})
        (path / "status.json").write_text(json.dumps({"state": "failed", "step": 3, "reason": name}))
        (path / "logs").mkdir()
        (path / "logs" / "rank-0.log").write_bytes(os.fsencode(f"first {name}\nlast {name}\n"))
        if number % 20 == 0:
            for words in (
                ["status", f"runs/{folder}"],
                ["logs", f"runs/{folder}"],
                ["logs", f"--root={folder}", folder],
            ):
                out, err = samecurve(*words, code=2 if words[1].startswith("--root") else 0)
                assert is_safe(out.replace("\t", "")) and is_safe(err), (name, out)
                assert "first" in out or words[0] == "status" or err.count("\n") == 1
    out, _ = samecurve("status")
    assert is_safe(out) and len(out.splitlines()) == 301
    rows = json.loads(samecurve("status", "--json")[0])
    assert len(rows) == 300


def test_status_table_and_json_keep_names(samecurve: Samecurve) -> None:
    make_run_folder("[cat]", ("finished", 3), {})
    make_run_folder("\x1b[31m\u202e", ("finished", 3), {"host": "h\x1b]0;x\a"})
    out, _ = samecurve("status")
    assert "[cat]" in out and "\\x1b[31m\\u202e" in out
    assert {run["name"] for run in json.loads(samecurve("status", "--json")[0])} == {"[cat]", "\x1b[31m\u202e"}
    assert "h\\x1b]0;x\\x07" in samecurve("status", "\x1b[31m\u202e")[0]


def test_logs_keep_lines_and_tabs_and_escape_the_rest(samecurve: Samecurve) -> None:
    path = make_run_folder("x", ("finished", 3), {})
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_bytes(b"a\tb\n\x1b[31mred\r\n" + "猫".encode() + b"\xff\xc2\x9b\n")
    assert samecurve("logs", "x")[0] == "a\tb\n\\x1b[31mred\\r\n猫\\xff\\x9b\n"
    assert "  a\tb\n  \\x1b[31mred\\r\n  猫\\xff\\x9b\n" in samecurve("status", "x")[0]


def test_files_with_odd_names_beside_the_logs_are_ignored(samecurve: Samecurve) -> None:
    path = make_run_folder("x", ("finished", 3), {}, {"log": "y" * 5000})
    (path / "logs").mkdir()
    for name in ("rank-x.log", "rank-\u0663.log", "rank-.log", "rank-2.log"):
        (path / "logs" / name).write_text("a line\n")
    assert "has the logs of rank 2" in samecurve("logs", "x", code=2)[1]
    for name in ("rank-2.log", "rank-\u0663.log"):
        (path / "logs" / name).unlink()
    assert "has no logs yet" in samecurve("logs", "x", code=2)[1]
    samecurve("status", "x")


def test_character_on_the_border_of_two_blocks_is_whole(samecurve: Samecurve) -> None:
    path = make_run_folder("x", ("finished", 3), {})
    (path / "logs").mkdir()
    text = "a" + "猫" * 50_000 + "\n"
    (path / "logs" / "rank-0.log").write_text(text)
    assert samecurve("logs", "x")[0] == text


@pytest.mark.parametrize(
    "words", [["status"], ["logs"], ["stop"], ["report"], ["export", "--to", "onnx"], ["predict", "y"]]
)
@pytest.mark.parametrize("name", ["x" * 5000, "~nosuch/x", "a/" * 3000, "\x1b[2J", "\u202e"])
def test_odd_name_of_a_run_is_refused_with_one_line(samecurve: Samecurve, words: list[str], name: str) -> None:
    make_run_folder("x", ("finished", 3), {})
    command, *rest = words
    out, err = samecurve(command, name, *rest, code=2)
    assert out == "" and err.startswith("samecurve: ") and err.count("\n") == 1 and is_safe(err) and len(err) < 600
    if command == "status":
        assert samecurve("status", "--root", name, code=2)[1].count("\n") == 1


def predictions(name: str) -> list[Prediction]:
    return [
        Prediction(name, (ClassProbability(name, 0.123456789), ClassProbability("b", 1e-9))),
        Prediction(name, (), name),
    ]


def test_three_hundred_odd_names_are_predicted_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    import csv

    draw = random.Random(1)
    for _ in range(300):
        name = odd_name(draw)
        for form in ("text", "csv", "json"):
            assert print_predictions(iter(predictions(name)), form, 2) == 1
            out = capsys.readouterr().out
            assert is_safe(out) or "\x7f" in out
            if form == "json":
                assert json.loads(out)[0]["top"][0]["class"] == name
            if form == "csv":
                rows = list(csv.reader(out.splitlines()))
                assert len(rows) == 4 and rows[1][1] == "1" and rows[1][3] == "0.123457" and rows[2][3] == "1e-09"
                assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for row in rows for cell in row)
                assert ',1,"' in out and ",0.123457," in out


def test_report_of_odd_names_shows_them_and_runs_nothing(tmp_path: Path) -> None:
    draw = random.Random(2)
    for number in range(15):
        name = odd_name(draw)
        path = make_run_folder(f"r{number}", ("failed", 3), {})
        (path / "config.yaml").write_text(
            to_yaml(load_config([], ["run.name=x"])).replace("name: x", f"name: {json.dumps(name)}", 1)
        )
        (path / "status.json").write_text(json.dumps({"state": name, "step": 3, "reason": name}))
        row = {"name": name, "precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
        (path / "evaluation.json").write_text(json.dumps({"step": 1, "classes": [row], "confusion": [[1]]}))
        write_report([path], path / "report.html")
        text = (path / "report.html").read_text(encoding="utf-8")
        assert all(character in "\n\t" or is_visible(character) for character in text)
        assert "<script>alert" not in text and HtmlPage(text).text
    write_report([Path(f"runs/r{number}") for number in range(5)], tmp_path / "all.html")
    assert "<script>alert" not in (tmp_path / "all.html").read_text(encoding="utf-8")
