"""`samecurve status`, `logs` and `stop`, on real runs and on prepared run folders."""

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
from support.run_folders import fake_squeue, make_run_folder

from launch.commands.logs import _GrowingFile
from launch.runs import table

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]
RUN = [*SMALL, "run.root=runs", "run.name=sweep/x", "train.epochs=9999", "log.every_steps=1"]


def follow_logs(*options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*SAMECURVE, "logs", "sweep/x", "--follow", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_status_logs_and_stop_of_a_training_run(ranks: Ranks, samecurve: Samecurve) -> None:
    folder = Path("runs/sweep/x")
    started = ranks.start(2, *RUN)
    ranks.wait_for_step(folder, 3)

    out, _ = samecurve("status")
    titles, cells = (line.split() for line in out.splitlines())
    row = dict(zip(titles, cells, strict=True))
    assert row["run"] == "sweep/x" and row["state"] == "running" and row["ranks"] == "2"
    assert row["step"].endswith("/229,977") and int(row["step"].partition("/")[0].replace(",", "")) >= 3
    assert {"epoch", "images/s", "left"} <= set(titles)

    followers = [follow_logs(), follow_logs("--rank", "1"), follow_logs("--lines", "0")]
    for follower in followers:
        assert select.select([follower.stdout], [], [], 90)[0]  # it has printed a line
    out, _ = samecurve("stop", "sweep/x", "--wait")
    assert "saves after the current step" in out and "sweep/x: stopped (the file `stop` in the run folder) at" in out
    assert ranks.join(started) == [75, 75] and not (folder / "stop").exists()
    texts = [follower.communicate(timeout=90) for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0, 0]
    assert texts[0][0] == (folder / "logs" / "rank-0.log").read_text() and "stopped by the file" in texts[0][0]
    # The run is over when rank 0 has ended. Rank 1 may write its last line after that.
    assert texts[1][0] and (folder / "logs" / "rank-1.log").read_text().startswith(texts[1][0])
    assert texts[2][0] and texts[0][0].endswith(texts[2][0]) and "at step 0" not in texts[2][0]
    assert all("samecurve: sweep/x: stopped" in text[1] for text in texts)

    out, _ = samecurve("status", "sweep/x")
    assert out.startswith("sweep/x: stopped (the file `stop` in the run folder)") and "rank 0 ends" in out
    assert f"continue: samecurve train --ranks 2 {' '.join(RUN)}" in out and "2 on " in out
    assert "nothing to stop" in samecurve("stop", "runs/sweep/x")[0] and not (folder / "stop").exists()

    started = ranks.start(1, *RUN)  # resumes on another world size, and is killed
    ranks.wait_for_step(folder, json.loads((folder / "status.json").read_text())["step"] + 2)
    os.kill(started[0].pid, signal.SIGKILL)
    ranks.join(started)
    (run,) = json.loads(samecurve("status", "sweep", "--json")[0])
    assert run["state"] == "died" and run["restarts"] == 1 and run["is_over"] and run["world_size"] == 1
    assert run["step"] > 3 and run["seconds_left"] is None and run["path"] == "runs/sweep/x"
    assert "continue: trainer" not in samecurve("status", "sweep/x")[0]
    assert f"{sys.executable} trainer/main.py {' '.join(RUN)}" in samecurve("status", "sweep/x")[0]
    assert "nothing to stop" in samecurve("stop", "sweep/x")[0]


def test_unknown_run_is_one_line_with_a_similar_name(samecurve: Samecurve) -> None:
    make_run_folder("digits", ("finished", 3), {})
    for command in ("status", "logs", "stop"):
        out, err = samecurve(command, "digit", code=2)
        assert out == "" and err == "samecurve: no run 'digit' under runs; did you mean digits?\n"
    assert "folder nowhere does not exist" in samecurve("status", "--root", "nowhere", code=2)[1]
    assert "--rnk" in samecurve("logs", "digits", "--rnk", "3", code=2)[1]


def test_logs_of_a_missing_rank_names_the_ranks_with_logs(samecurve: Samecurve) -> None:
    path = make_run_folder("x", ("failed", 3), {})
    assert "x is failed (why failed) and has no logs yet" in samecurve("logs", "x", code=2)[1]
    (path / "logs").mkdir()
    for rank in (0, 2, 10):
        (path / "logs" / f"rank-{rank}.log").write_text(f"of {rank}\n")
    assert samecurve("logs", "x", "--rank", "2") == ("of 2\n", "")
    assert (
        "rank 1 of x has no log; runs/x/logs has the logs of rank 0, 2, 10"
        in samecurve("logs", "x", "--rank", "1", code=2)[1]
    )
    (path / "logs" / "rank-0.log").write_text("a\nb\nc\n")
    assert samecurve("logs", "x", "--lines", "2")[0] == "b\nc\n"
    done = subprocess.run([*SAMECURVE, "logs", "x"], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"a\nb\nc\n"


def test_closed_pipe_is_no_error() -> None:
    path = make_run_folder("x", ("finished", 3), {})
    (path / "logs").mkdir()
    (path / "logs" / "rank-0.log").write_text("a line\n" * 100_000)
    done = subprocess.run(
        f"{' '.join(SAMECURVE)} logs x | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("a line\n", "")


def test_logs_shows_the_job_output_if_no_rank_has_logged(samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "")
    Path("slurm-7.out").write_text("samecurve: no such data\n")
    make_run_folder("x", None, None, {"log": "slurm-7.out"})
    for words in ([], ["--follow"]):
        out, err = samecurve("logs", "x", *words)
        assert (
            out == "samecurve: no such data\n"
            and "x has no logs of ranks yet; this is the output of job 7, slurm-7.out" in err
        )
    assert "samecurve: no such data" in samecurve("status", "x")[0]
    assert samecurve("status")[0].splitlines()[1].split() == ["x", "not", "started", "7"]


def test_waiting_job_is_shown_and_cancelled(samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_squeue(monkeypatch, "[ -e cancelled ] || echo '7|5|3|PENDING|Resources'")
    scancel = Path("bin/scancel")  # a fake that records its arguments
    scancel.write_text('#!/bin/sh\necho "$@" > cancelled\n')
    scancel.chmod(0o755)
    make_run_folder("x", ("stopped", 30), {}, {"job_id": "5", "array_task": 3})
    os.utime("runs/x/job.json", (time.time() + 9, time.time() + 9))
    out, _ = samecurve("status")
    assert out.splitlines()[1].split()[:3] == ["x", "queued", "30/90"] and "5_3" in out
    assert "x: queued (job 5_3 waits: Resources)" in samecurve("status", "x")[0]
    out, _ = samecurve("stop", "x", "--wait")
    assert Path("cancelled").read_text() == "5_3\n" and not Path("runs/x/stop").exists()
    assert "job 5_3 is cancelled; it has 30 steps" in out and "x: stopped" in out


def test_stop_times_out_if_the_run_does_not_end(samecurve: Samecurve) -> None:
    path = make_run_folder("x", ("running", 3), {"host": "another"})
    _, err = samecurve("stop", "x", "--wait", "--timeout-seconds", "0.3", code=2)
    assert "x: running (on another" in err and "after 0.3 s" in err and (path / "stop").exists()


def test_leftover_stop_file_is_reported(samecurve: Samecurve) -> None:
    (make_run_folder("x", ("failed", 3), {}) / "stop").touch()
    assert "left from an earlier request" in samecurve("stop", "x")[0]
    assert "would stop the next session at once" in samecurve("status", "x")[0]


ROWS_WITH_VALIDATION = "".join(
    json.dumps({"split": split, "step": step, "epoch": step / 10, "accuracy": accuracy}) + "\n"
    for split, step, accuracy in (
        ("validation", 10, 0.75),
        ("test", 10, 0.5),
        ("validation", 20, 0.625),
        ("test", 20, 1),
    )
)


def test_status_shows_the_validation_accuracy_and_the_best_of_a_stopped_run(samecurve: Samecurve) -> None:
    make_run_folder("x", ("stopped", 20), {}, rows=ROWS_WITH_VALIDATION)
    titles, cells = (line.split() for line in samecurve("status")[0].splitlines())
    row = dict(zip(titles, cells, strict=True))
    assert row["validation"] == "62.50%" and row["test"] == "100.00%"
    out, _ = samecurve("status", "x")
    assert "best so far          75.00% validation accuracy at step 10\n" in out


def test_status_names_what_cannot_be_read_and_shows_the_rest(samecurve: Samecurve) -> None:
    (make_run_folder("bad", ("failed", 3), {}) / "status.json").write_text('{"state": "failed", "step": "x"}')
    make_run_folder(
        "lines", ("finished", 3), {}, rows='{"split": "test", "step": 3, "accuracy": "x"}\n' * 2 + ROWS_WITH_VALIDATION
    )
    path = make_run_folder("half", ("finished", 3), {}, rows=ROWS_WITH_VALIDATION + '{"split": "test", "step": []}\n')
    out, err = samecurve("status")
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert states == {"bad": "unreadable", "lines": "finished", "half": "finished"}
    assert "samecurve: runs/bad/status.json cannot be read as a file of a run (expected a whole number as step" in err
    assert f"samecurve: {path}/metrics.jsonl: 1 line is skipped (expected a whole number as step, got list)" in err
    assert "runs/lines" not in err, "older lines are not read"
    runs = json.loads(samecurve("status", "--json")[0])
    assert [len(run["problems"]) for run in runs if run["name"] == "half"] == [1]


def test_status_of_a_folder_of_runs_takes_its_path_too(samecurve: Samecurve) -> None:
    for name in ("sweep/a", "sweep/b", "c"):
        make_run_folder(name, ("finished", 1), {})
    for name in ("sweep", "runs/sweep", str(Path("runs/sweep").resolve())):
        out, err = samecurve("status", name)
        assert len(out.splitlines()) == 3 and "is a folder with 2 runs" in err


ROWS = [("sweep/point-lr=0.1-seed=0", "running", "1/9", "", "7"), ("b", "died", "12/9", "", "")]
TITLES = ("run", "state", "step", "left", "job")


@pytest.mark.parametrize("width", [20, 34, 40, 60, None])
def test_table_fits_the_terminal(width: int | None) -> None:
    lines = table.format_table(TITLES, ROWS, width, keep=("run", "state"))
    assert len({len(line) for line in lines}) == 1 and "left" not in lines[0]
    assert width is None or width < 34 or len(lines[0]) <= width
    assert ("job" in lines[0]) == (width is None or width >= 34) and "running" in lines[1]
    assert ("sweep/point-lr=0.1-seed=0" in lines[1]) == (width is None or width >= 60)
    assert lines[1].startswith("sweep") and "…" not in lines[2]


def test_narrow_table_omits_columns_from_the_right() -> None:
    rows = [("a", "running", "11/99", "3:07:55", "12345")]
    assert table.format_table(TITLES, rows, 29, keep=("run", "state"))[0].split() == ["run", "state", "step", "left"]


def test_log_that_was_replaced_or_shortened_is_printed_from_its_start(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "log"
    log = _GrowingFile(path, None)
    log.print_new()  # the file does not exist yet
    for text, printed in (("one\n", "one\n"), ("one\ntwo\n", "two\n"), ("new\n", "new\n")):
        path.write_text(text)
        log.print_new()
        assert capfdbinary.readouterr().out.decode() == printed
    (tmp_path / "other").write_text("a longer file\n")
    (tmp_path / "other").replace(path)
    log.print_new()
    assert capfdbinary.readouterr().out.decode() == "a longer file\n"


def test_status_prints_a_line_for_each_run() -> None:
    for number in range(50):
        make_run_folder(f"sweep/point-{number}", ("finished", 9), {})
    done = subprocess.run([*SAMECURVE, "status"], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 51


def test_status_logs_and_stop_import_nothing_slow() -> None:
    modules = "launch.commands.status, launch.commands.logs, launch.commands.stop"
    slow = "{'torch', 'omegaconf', 'yaml', 'rich', 'safetensors', 'numpy', 'PIL'}"
    code = f"import sys, {modules}; print(*{slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
