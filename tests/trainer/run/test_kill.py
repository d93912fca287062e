"""Runs that are killed or stopped at any moment go on bit for bit, on any number of ranks."""

import os
import signal
import time
from pathlib import Path

import psutil
from support.processes import ENDLESS, Ranks, last_step, tell
from support.runs import RUN, VIRTUAL, differing, status

RUN += ["train.max_steps=150", "checkpoint.every_steps=10", "data.augment=[flip,crop,cutout]", "schedule.name=constant"]


def test_killed_or_stopped_on_one_number_of_ranks_it_goes_on_on_another(ranks: Ranks) -> None:
    broken = Path("runs/broken")
    for size, number in ((2, signal.SIGKILL), (3, signal.SIGTERM), (1, signal.SIGKILL)):
        further = last_step(broken) + 25
        started = ranks.start(size, *VIRTUAL, *ENDLESS, "run.name=broken")
        ranks.until_step(broken, further)
        tell(started, number)
        codes = ranks.end(started)
        assert codes == [-9 if number == signal.SIGKILL else 75] * size, ranks.log.read_text()
        if number == signal.SIGTERM:
            found = status("broken")
            assert found["state"] == "stopped" and found["reason"] == "SIGTERM"
            assert list((broken / "checkpoints").glob(f"step-{found['step']:08}"))  # on that very step, not the one due
    length = [*ENDLESS, f"train.max_steps={last_step(broken) + 20}"]
    assert "going on with broken" in ranks.run(2, *VIRTUAL, *length, "run.name=broken")
    ranks.run(1, *VIRTUAL, *length, "run.name=whole")
    assert not differing("whole", "broken")


def test_plain_ranks_go_on_bitwise_on_as_many(ranks: Ranks) -> None:
    # Each rank's BatchNorm sees its own slices, and where it is stopped is no step at which it would have been saved.
    started = ranks.start(2, *RUN, *ENDLESS, "run.name=broken")
    ranks.until_step(Path("runs/broken"), 30)
    os.kill(started[1].pid, signal.SIGUSR1)  # one rank alone is told: all stop
    assert ranks.end(started) == [75, 75], ranks.log.read_text()
    found = status("broken")
    assert found["reason"] == "SIGUSR1"
    length = [*ENDLESS, f"train.max_steps={int(str(found['step'])) + 40}"]
    for name in ("broken", "whole"):
        ranks.run(2, *RUN, *length, f"run.name={name}")
    assert not differing("whole", "broken")


def test_other_ways_to_stop(ranks: Ranks) -> None:
    run = [*RUN, *ENDLESS]
    end = int(time.time()) + 20
    # Its steps of 2 s make it stop 3 s and more before the end; it has the others' time to get there.
    job = ranks.start(1, *run, "run.name=job", plant="slow", SLURM_JOB_END_TIME=str(end))
    limit = ranks.start(1, *run, "run.name=limit", "train.time_limit=15s")
    file = ranks.start(1, *run, "run.name=file")
    ranks.until_step(Path("runs/file"), 6)
    Path("runs/file/stop").touch()
    assert ranks.end([*file, *limit, *job]) == [75, 75, 75], ranks.log.read_text()
    assert status("file")["reason"] == "the file `stop` in the run folder" and not Path("runs/file/stop").exists()
    assert status("limit")["reason"] == "the time limit" and int(str(status("limit")["step"])) > 1
    assert status("job")["reason"] == "the end of the SLURM job" and int(str(status("job")["step"])) > 1
    assert max(path.stat().st_mtime for path in Path("runs/job/checkpoints").rglob("*")) < end  # saved in time


def test_a_second_ctrl_c_leaves_at_once(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, *ENDLESS, "run.name=x", plant="asleep")
    ranks.until("a step without end", Path("asleep").exists)
    began = time.monotonic()
    os.kill(rank.pid, signal.SIGINT)
    ranks.until("the answer", lambda: "Ctrl-C again leaves at once" in ranks.log.read_text())
    if time.monotonic() - began < 0.5:  # later it would be a second one
        os.kill(rank.pid, signal.SIGINT)  # a launcher passes on what the terminal has sent already: that is none
    time.sleep(1.5)
    assert rank.is_alive()
    os.kill(rank.pid, signal.SIGINT)
    assert ranks.end([rank]) == [130]
    assert ranks.log.read_text().count("Ctrl-C again leaves at once") == 1


def test_workers_of_the_loader_ignore_signals(ranks: Ranks) -> None:
    started = ranks.start(1, *RUN, *ENDLESS, "run.name=x", "data.workers=2")
    ranks.until_step(Path("runs/x"), 6)
    workers = psutil.Process(started[0].pid).children()
    assert len(workers) == 2
    for process in workers:  # as SLURM and a terminal do: to all of them, in any order
        process.send_signal(signal.SIGTERM)
    os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.end(started) == [75], ranks.log.read_text()
    assert "worker" not in ranks.log.read_text()


def test_a_signal_before_training_ends_the_process(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, "run.name=x", plant="slow_start")
    ranks.until("the data set's turn", Path("started").exists)
    os.kill(rank.pid, signal.SIGTERM)
    assert ranks.end([rank]) == [128 + signal.SIGTERM]
    assert not Path("runs/x/status.json").exists()


def test_a_stop_under_a_launcher_that_would_start_again_is_not_undone(ranks: Ranks) -> None:
    settings = [*ENDLESS, "train.time_limit=1s", "run.name=x"]
    again = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    ranks.run(1, *RUN, *settings, code=0, **again)
    assert status("x")["state"] == "stopped"
