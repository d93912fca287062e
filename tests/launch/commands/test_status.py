"""`samecurve status`, `logs` and `stop`, on real runs: what they say, what they do, and when they come to an end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.processes import REPOSITORY, SMALL, Ranks, Samecurve
from support.run_folders import fake_squeue, make

from launch.runs import table

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]
RUN = [*SMALL, "run.root=runs", "run.name=sweep/x", "train.epochs=9999", "log.every_steps=1"]


def follow(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*SAMECURVE, "logs", "sweep/x", "--follow", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_run_is_shown_followed_and_stopped_and_shown_again(ranks: Ranks, samecurve: Samecurve) -> None:
    folder = Path("runs/sweep/x")
    started = ranks.start(2, *RUN)
    ranks.until_step(folder, 3)

    out, _ = samecurve("status")
    titles, cells = (line.split() for line in out.splitlines())
    shown = dict(zip(titles, cells, strict=True))
    assert shown["run"] == "sweep/x" and shown["state"] == "running" and shown["ranks"] == "2"
    assert shown["step"].endswith("/229,977") and int(shown["step"].partition("/")[0].replace(",", "")) >= 3
    assert {"epoch", "images/s", "left"} <= set(titles)

    followers = [follow(), follow("--rank", "1"), follow("--lines", "0")]
    for follower in followers:
        assert select.select([follower.stdout], [], [], 90)[0]  # it has begun to follow
    out, _ = samecurve("stop", "sweep/x", "--wait")
    assert "saves after the step in hand" in out and "sweep/x: stopped (the file `stop` in the run folder) at" in out
    assert ranks.end(started) == [75, 75] and not (folder / "stop").exists()
    texts = [follower.communicate(timeout=90) for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0, 0]
    assert texts[0][0] == (folder / "logs" / "rank-0.log").read_text() and "stopped by the file" in texts[0][0]
    # The run is over when rank 0 has left it; the last line of rank 1 may come after that.
    assert texts[1][0] and (folder / "logs" / "rank-1.log").read_text().startswith(texts[1][0])
    assert texts[2][0] and texts[0][0].endswith(texts[2][0]) and "at step 0" not in texts[2][0]
    assert all("samecurve: sweep/x: stopped" in text[1] for text in texts)

    out, _ = samecurve("status", "sweep/x")
    assert out.startswith("sweep/x: stopped (the file `stop` in the run folder)") and "rank 0 ends" in out
    assert f"go on: samecurve train --ranks 2 {' '.join(RUN)}" in out and "2 on " in out
    assert "nothing to stop" in samecurve("stop", "runs/sweep/x")[0] and not (folder / "stop").exists()

    started = ranks.start(1, *RUN)  # goes on, on another number of ranks, and dies
    ranks.until_step(folder, json.loads((folder / "status.json").read_text())["step"] + 2)
    os.kill(started[0].pid, signal.SIGKILL)
    ranks.end(started)
    (found,) = json.loads(samecurve("status", "sweep", "--json")[0])
    assert found["state"] == "died" and found["restarts"] == 1 and found["is_over"] and found["world_size"] == 1
    assert found["step"] > 3 and found["seconds_left"] is None and found["path"] == "runs/sweep/x"
    assert "go on: trainer" not in samecurve("status", "sweep/x")[0]
    assert f"{sys.executable} trainer/main.py {' '.join(RUN)}" in samecurve("status", "sweep/x")[0]
    assert "nothing to stop" in samecurve("stop", "sweep/x")[0]


def test_a_wrong_name_is_one_line(samecurve: Samecurve) -> None:
    make("digits", ("finished", 3), {})
    for command in ("status", "logs", "stop"):
        out, err = samecurve(command, "digit", code=2)
        assert out == "" and err == "samecurve: no run 'digit' under runs; did you mean digits?\n"
    assert "there is no folder nowhere" in samecurve("status", "--root", "nowhere", code=2)[1]
    assert "--rnk" in samecurve("logs", "digits", "--rnk", "3", code=2)[1]


def test_logs_say_which_there_are(samecurve: Samecurve) -> None:
    path = make("x", ("failed", 3), {})
    assert "x is failed (why failed) and has no logs yet" in samecurve("logs", "x", code=2)[1]
    (path / "logs").mkdir()
    for rank in (0, 2, 10):
        (path / "logs" / f"rank-{rank}.log").write_text(f"of {rank}\n")
    assert samecurve("logs", "x", "--rank", "2") == ("of 2\n", "")
    assert (
        "rank 1 of x has no log; there are those of rank 0, 2, 10" in samecurve("logs", "x", "--rank", "1", code=2)[1]
    )
    (path / "logs" / "rank-0.log").write_text("a\nb\nc\n")
    assert samecurve("logs", "x", "--lines", "2")[0] == "b\nc\n"
    done = subprocess.run([*SAMECURVE, "logs", "x"], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"a\nb\nc\n"


def test_a_reader_that_has_seen_enough_is_no_mistake() -> None:
    path = make("x", ("finished", 3), {})
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_text("a line\n" * 100_000)
    done = subprocess.run(
        f"{' '.join(SAMECURVE)} logs x | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("a line\n", "")


def test_a_job_that_failed_before_training_shows_what_slurm_has(
    samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_squeue(monkeypatch, "")
    Path("slurm-7.out").write_text("samecurve: no such data\n")
    make("x", None, None, {"log": "slurm-7.out"})
    for words in ([], ["--follow"]):
        out, err = samecurve("logs", "x", *words)
        assert out == "samecurve: no such data\n" and "x has no logs of ranks yet; this is job 7's slurm-7.out" in err
    assert "samecurve: no such data" in samecurve("status", "x")[0]
    assert samecurve("status")[0].splitlines()[1].split() == ["x", "not", "started", "7"]


def test_a_job_that_waits_is_shown_and_cancelled(samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "[ -e cancelled ] || echo '7|5|3|PENDING|Resources'")
    scancel = Path("bin/scancel")  # no SLURM either: it notes what it was asked to do
    scancel.write_text('#!/bin/sh\necho "$@" > cancelled\n')
    scancel.chmod(0o755)
    make("x", ("stopped", 30), {}, {"job_id": "5", "array_task": 3})
    os.utime("runs/x/job.json", (time.time() + 9, time.time() + 9))
    out, _ = samecurve("status")
    assert out.splitlines()[1].split()[:3] == ["x", "queued", "30/90"] and "5_3" in out
    assert "x: queued (job 5_3 waits: Resources)" in samecurve("status", "x")[0]
    out, _ = samecurve("stop", "x", "--wait")
    assert Path("cancelled").read_text() == "5_3\n" and not Path("runs/x/stop").exists()
    assert "job 5_3 is cancelled; it has 30 steps" in out and "x: stopped" in out


def test_a_run_that_does_not_stop_is_told(samecurve: Samecurve) -> None:
    path = make("x", ("running", 3), {"host": "another"})
    _, err = samecurve("stop", "x", "--wait", "--timeout-seconds", "0.3", code=2)
    assert "x: running (on another" in err and "after 0.3 s" in err and (path / "stop").exists()


def test_a_file_left_by_an_earlier_request_is_told(samecurve: Samecurve) -> None:
    (make("x", ("failed", 3), {}) / "stop").touch()
    assert "left from an earlier request" in samecurve("stop", "x")[0]
    assert "would stop the next start at once" in samecurve("status", "x")[0]


ROWS = [("sweep/point-lr=0.1-seed=0", "running", "1/9", "", "7"), ("b", "died", "12/9", "", "")]
TITLES = ("run", "state", "step", "left", "job")


@pytest.mark.parametrize("width", [20, 34, 40, 60, None])
def test_a_table_is_as_wide_as_its_place(width: int | None) -> None:
    lines = table.lines(TITLES, ROWS, width, keep=("run", "state"))
    assert len({len(line) for line in lines}) == 1 and "left" not in lines[0]
    assert width is None or width < 34 or len(lines[0]) <= width
    assert ("job" in lines[0]) == (width is None or width >= 34) and "running" in lines[1]
    assert ("sweep/point-lr=0.1-seed=0" in lines[1]) == (width is None or width >= 60)
    assert lines[1].startswith("sweep") and "…" not in lines[2]


def test_each_of_many_runs_has_a_line() -> None:
    for number in range(50):
        make(f"sweep/point-{number}", ("finished", 9), {})
    done = subprocess.run([*SAMECURVE, "status"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 51


def test_neither_torch_nor_what_is_slow_is_imported() -> None:
    rooms = "launch.commands.status, launch.commands.logs, launch.commands.stop"
    slow = "{'torch', 'omegaconf', 'yaml', 'rich', 'safetensors', 'numpy'}"
    code = f"import sys, {rooms}; print(*{slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
