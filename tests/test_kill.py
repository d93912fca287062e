"""Runs that are killed or stopped at any moment go on bit for bit, on any number of ranks."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
from conftest import SMALL, Ranks
from test_virtual_ranks import differing

RUN = [*SMALL, "run.root=runs", "log.tensorboard=true", "train.threads_per_rank=1", "log.every_steps=3"]
RUN += ["train.max_steps=150", "checkpoint.every_steps=10", "data.augment=[flip,crop,cutout]"]
VIRTUAL = [*RUN, "train.virtual_ranks=3"]


def status(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((Path("runs") / name / "status.json").read_text())
    return found


def test_killed_or_stopped_on_one_number_of_ranks_it_goes_on_on_another(ranks: Ranks) -> None:
    ranks.run(1, *VIRTUAL, "run.name=whole")
    broken = Path("runs/broken")
    for size, step, number in ((2, 25, signal.SIGKILL), (3, 60, signal.SIGTERM), (1, 90, signal.SIGKILL)):
        started = ranks.start(size, *VIRTUAL, "run.name=broken")
        ranks.until_step(broken, step)
        for process in started:
            os.kill(process.pid, number)
        codes = ranks.end(started)
        assert codes == [-9 if number == signal.SIGKILL else 75] * size, ranks.log.read_text()
        if number == signal.SIGTERM:
            found = status("broken")
            assert found["state"] == "stopped" and found["reason"] == "SIGTERM"
            assert list((broken / "checkpoints").glob(f"step-{found['step']:08}"))  # on that very step, not the one due
    assert "going on with broken" in ranks.run(2, *VIRTUAL, "run.name=broken")
    assert not differing("whole", "broken")


def test_plain_ranks_go_on_bitwise_on_as_many(ranks: Ranks) -> None:
    # Each rank's BatchNorm sees its own slices, and where it is stopped is no step at which it would have been saved.
    ranks.run(2, *RUN, "run.name=whole")
    started = ranks.start(2, *RUN, "run.name=broken")
    ranks.until_step(Path("runs/broken"), 30)
    os.kill(started[1].pid, signal.SIGUSR1)  # one rank alone is told: all stop
    assert ranks.end(started) == [75, 75], ranks.log.read_text()
    assert status("broken")["reason"] == "SIGUSR1"
    ranks.run(2, *RUN, "run.name=broken")
    assert not differing("whole", "broken")


def test_other_ways_to_stop(ranks: Ranks) -> None:
    (Path("runs/file")).mkdir(parents=True)
    started = ranks.start(1, *RUN, "run.name=file", "train.max_steps=100000", "train.epochs=99999")
    ranks.until_step(Path("runs/file"), 6)
    Path("runs/file/stop").touch()
    assert ranks.end(started) == [75]
    assert status("file")["reason"] == "the file `stop` in the run folder" and not Path("runs/file/stop").exists()
    ranks.run(1, *RUN, "run.name=limit", "train.epochs=99999", "train.max_steps=99999", "train.time_limit=6s", code=75)
    assert status("limit")["reason"] == "the time limit" and int(str(status("limit")["step"])) > 20
    end = str(int(time.time()) + 7)
    ranks.run(1, *RUN, "run.name=job", "train.epochs=99999", "train.max_steps=99999", code=75, SLURM_JOB_END_TIME=end)
    assert status("job")["reason"] == "the end of the SLURM job" and int(str(status("job")["step"])) > 20
    assert max(file.stat().st_mtime for file in Path("runs/job/checkpoints").rglob("*")) < int(end)  # saved in time


def test_a_second_ctrl_c_leaves_at_once(ranks: Ranks) -> None:
    settings = ["train.epochs=99999", "train.max_steps=99999", "run.name=x", "log.every_steps=1"]
    (rank,) = ranks.start(1, *RUN, *settings, plant="slow")
    ranks.until_step(Path("runs/x"), 1)
    for _ in range(2):  # a launcher passes on what the terminal has sent already: that is no second one
        os.kill(rank.pid, signal.SIGINT)
        time.sleep(0.1)
    time.sleep(1.0)
    assert rank.is_alive()  # deep in a step of some seconds
    os.kill(rank.pid, signal.SIGINT)
    assert ranks.end([rank], timeout_seconds=2) == [130]
    assert ranks.log.read_text().count("Ctrl-C again leaves at once") == 1


def test_workers_of_the_loader_ignore_signals(ranks: Ranks) -> None:
    started = ranks.start(1, *RUN, "train.epochs=99999", "train.max_steps=99999", "run.name=x", "data.workers=2")
    ranks.until_step(Path("runs/x"), 6)
    for process in (*psutil.Process(started[0].pid).children(), psutil.Process(started[0].pid)):
        process.send_signal(signal.SIGTERM)  # as SLURM and a terminal do: to all of them
    assert ranks.end(started) == [75], ranks.log.read_text()
    assert "worker" not in ranks.log.read_text()


def test_a_signal_before_training_ends_the_process(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, "run.name=x", plant="slow_start")
    until = time.monotonic() + 30
    while not Path("started").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(rank.pid, signal.SIGTERM)
    assert ranks.end([rank], timeout_seconds=5) == [128 + signal.SIGTERM]
    assert not Path("runs/x/status.json").exists()


def test_a_stop_under_a_launcher_that_would_start_again_is_not_undone(ranks: Ranks) -> None:
    settings = ["train.epochs=99999", "train.max_steps=99999", "train.time_limit=1s", "run.name=x"]
    again = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    ranks.run(1, *RUN, *settings, code=0, **again)
    assert status("x")["state"] == "stopped"
