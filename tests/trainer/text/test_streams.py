"""Nothing that is printed ends a process: closed pipes, full disks, closed streams, small encodings."""

import io
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
from support.processes import REPOSITORY

from trainer.text import streams

PRINT_EVERYTHING = """
import logging, sys, warnings
from trainer.text.streams import protect_streams, stdout_error, take_lost_text
protect_streams()
for number in range(2000):
    print("line", number, "\\u732b \\udcff \\x1b")
print("now", flush=True)
print("to stderr \\u732b \\udcff", file=sys.stderr)
warnings.warn("a warning")
logging.warning("a log record")
open("lost", "wb").write(take_lost_text())
open("error", "w").write(str(stdout_error()))
"""
READER_ONLY = """
from trainer.text.streams import protect_streams
import sys
protect_streams(ends_on_closed_pipe=True)
try:
    while True:
        print("line")
except BrokenPipeError:
    sys.exit(141)
"""
STREAMS = ["pipe", "closed pipe", "/dev/full", "closed", "read only"]


def run(script: str, stdout: str, stderr: str, stdin: str = "pipe", **env: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a script with streams of these kinds: pipe, closed pipe, closed, read only, or a path."""
    closed = {number for number, kind in enumerate((stdin, stdout, stderr)) if kind == "closed"}

    def close_streams() -> None:
        for number in closed:
            os.close(number)

    with ExitStack() as files:
        return subprocess.run(
            [sys.executable, "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=open_stream(stdout, files),
            stderr=open_stream(stderr, files),
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | env,
            preexec_fn=close_streams,
            timeout=60,
            check=False,
        )


def open_stream(kind: str, files: ExitStack) -> IO[bytes] | int:
    if kind == "closed pipe":
        read_end, write_end = os.pipe()
        os.close(read_end)
        return files.enter_context(os.fdopen(write_end, "wb"))
    if kind == "read only":
        return files.enter_context(Path(os.devnull).open("rb"))
    return files.enter_context(Path(kind).open("wb", buffering=0)) if kind.startswith("/") else subprocess.PIPE


def lost() -> str:
    return Path("lost").read_text(encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("stderr", STREAMS)
@pytest.mark.parametrize("stdout", STREAMS)
def test_no_stream_ends_the_process(stdout: str, stderr: str) -> None:
    unbuffered = "1" if STREAMS.index(stdout) % 2 else ""
    done = run(PRINT_EVERYTHING, stdout, stderr, "closed" if stdout == stderr else "pipe", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 0
    shown = (done.stderr or b"").decode()
    texts = ("to stderr 猫 \\udcff\n", "UserWarning: a warning", "a log record\n")
    if stderr == "pipe":
        assert all(text in shown for text in texts) and lost() == "" and "Exception ignored" not in shown
    else:
        assert all(text in lost() for text in texts)
    if stdout == "pipe":
        assert done.stdout.decode().splitlines()[:2] == ["line 0 猫 \\udcff \x1b", "line 1 猫 \\udcff \x1b"]
    assert ("No space left" in Path("error").read_text()) == (stdout == "/dev/full")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "cp1252", "ascii:strict"])
def test_character_that_the_encoding_lacks_is_escaped(encoding: str) -> None:
    done = run(PRINT_EVERYTHING, "pipe", "pipe", PYTHONIOENCODING=encoding)
    name = encoding.partition(":")[0]
    assert done.returncode == 0
    assert ("猫" if name == "utf-16" else "\\u732b") in done.stdout.decode(name) and "\\udcff" in done.stderr.decode(
        name
    )


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    script = "from trainer.text.streams import protect_streams; protect_streams()\nfile = open('x', 'w')\n"
    script += "import os, sys; os.write(1, b'a C library prints'); os.write(2, b'too')\n"
    script += "file.write(f'{file.fileno()} {sys.stdin.read()!r}')"
    assert run(script, "closed", "closed", "closed").returncode == 0
    number, read = Path("x").read_text().split()
    assert int(number) > 2 and read == "''"


def test_closed_pipe_ends_a_process_that_only_prints_without_a_word() -> None:
    done = run(READER_ONLY, "closed pipe", "pipe")
    assert (done.returncode, done.stderr) == (141, b"")


def test_full_non_blocking_pipe_is_waited_for() -> None:
    script = (
        "import os; os.set_blocking(1, False)\nfrom trainer.text.streams import protect_streams; protect_streams()\n"
    )
    script += "print('x' * 1_000_000, flush=True)"
    assert len(run(script, "pipe", "pipe").stdout) == 1_000_001


def test_lost_text_is_bounded() -> None:
    script = PRINT_EVERYTHING.partition("for")[0] + "import sys\nfor _ in range(9999): print('x', file=sys.stderr)\n"
    script += "open('lost', 'wb').write(take_lost_text())"
    assert run(script, "pipe", "/dev/full").returncode == 0
    assert 0 < len(lost()) <= 2000


def test_streams_of_another_kind_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(sys, "stderr", text)
    streams.protect_streams()
    assert sys.stdout is text and sys.stderr is text and streams.stdout_error() is None
