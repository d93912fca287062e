"""A killed or stopped run continues with the same bits, with virtual ranks on any number of ranks."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from support.processes import ENDLESS, Ranks, last_step, signal_all
from support.runs import RUN, VIRTUAL, difference_between, read_status

from trainer.run.lock import FolderLock


def test_run_killed_and_resumed_on_other_world_sizes_has_the_same_bits(ranks: Ranks) -> None:
    broken = Path("runs/broken")
    for world_size, signal_number in ((2, signal.SIGKILL), (3, signal.SIGTERM), (1, signal.SIGKILL)):
        target_step = last_step(broken) + 25
        started = ranks.start(world_size, *VIRTUAL, *ENDLESS, "run.name=broken")
        ranks.wait_for_step(broken, target_step)
        signal_all(started, signal_number)
        codes = ranks.join(started)
        assert codes == [-9 if signal_number == signal.SIGKILL else 75] * world_size, ranks.log.read_text()
        if signal_number == signal.SIGTERM:
            broken_status = read_status("broken")
            assert broken_status["state"] == "stopped" and broken_status["reason"] == "SIGTERM"
            # The checkpoint is of this step, not of the next scheduled one.
            assert (broken / "checkpoints" / f"step-{broken_status['step']:08}").is_dir()
    length = [*ENDLESS, f"train.max_steps={last_step(broken) + 20}"]
    assert "resuming broken" in ranks.run(2, *VIRTUAL, *length, "run.name=broken")
    ranks.run(1, *VIRTUAL, *length, "run.name=whole")
    assert not difference_between("whole", "broken")


@pytest.mark.slow
def test_run_without_virtual_ranks_resumes_bitwise_on_the_same_world_size(ranks: Ranks) -> None:
    # Each rank's BatchNorm sees other samples, and the run stops at a step without a scheduled checkpoint.
    started = ranks.start(2, *RUN, *ENDLESS, "run.name=broken")
    ranks.wait_for_step(Path("runs/broken"), 30)
    os.kill(started[1].pid, signal.SIGUSR1)  # only one rank gets the signal; all stop
    assert ranks.join(started) == [75, 75], ranks.log.read_text()
    broken_status = read_status("broken")
    assert broken_status["reason"] == "SIGUSR1"
    length = [*ENDLESS, f"train.max_steps={int(str(broken_status['step'])) + 40}"]
    for name in ("broken", "whole"):
        ranks.run(2, *RUN, *length, f"run.name={name}")
    assert not difference_between("whole", "broken")


def test_stop_file_time_limit_and_job_end_stop_a_run(ranks: Ranks) -> None:
    run = [*RUN, *ENDLESS]
    job_end = int(time.time()) + 20
    # With steps of 2 s it must stop more than 3 s before the end.
    job = ranks.start(1, *run, "run.name=job", fault="slow_steps", SLURM_JOB_END_TIME=str(job_end))
    limit = ranks.start(1, *run, "run.name=limit", "train.time_limit=15s")
    file = ranks.start(1, *run, "run.name=file")
    ranks.wait_for_step(Path("runs/file"), 6)
    Path("runs/file/stop").touch()
    assert ranks.join([*file, *limit, *job]) == [75, 75, 75], ranks.log.read_text()
    assert read_status("file")["reason"] == "the file `stop` in the run folder" and not Path("runs/file/stop").exists()
    assert read_status("limit")["reason"] == "the time limit" and int(str(read_status("limit")["step"])) > 1
    assert read_status("job")["reason"] == "the end of the SLURM job" and int(str(read_status("job")["step"])) > 1
    assert max(path.stat().st_mtime for path in Path("runs/job/checkpoints").rglob("*")) < job_end  # saved in time


def test_second_ctrl_c_exits_at_once(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, *ENDLESS, "run.name=x", fault="endless_step")
    ranks.wait_until("an endless step", Path("asleep").exists)
    start = time.monotonic()
    os.kill(rank.pid, signal.SIGINT)
    ranks.wait_until("the answer", lambda: "Ctrl-C again exits at once" in ranks.log.read_text())
    if time.monotonic() - start < 0.5:  # later it would count as a second Ctrl-C
        os.kill(rank.pid, signal.SIGINT)  # the launcher's copy of the same Ctrl-C does not count
    time.sleep(1.5)
    assert rank.is_alive()
    os.kill(rank.pid, signal.SIGINT)
    assert ranks.join([rank]) == [130]
    assert ranks.log.read_text().count("Ctrl-C again exits at once") == 1


def test_data_loader_workers_ignore_signals(ranks: Ranks) -> None:
    started = ranks.start(1, *RUN, *ENDLESS, "run.name=x", "data.workers=2")
    ranks.wait_for_step(Path("runs/x"), 6)
    workers = psutil.Process(started[0].pid).children()
    assert len(workers) == 2
    for process in workers:  # SLURM and a terminal signal all processes, in any order
        process.send_signal(signal.SIGTERM)
    os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.join(started) == [75], ranks.log.read_text()
    assert "worker" not in ranks.log.read_text()


def test_signal_before_training_ends_the_process(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, "run.name=x", fault="slow_start")
    ranks.wait_until("the data set", Path("started").exists)
    os.kill(rank.pid, signal.SIGTERM)
    assert ranks.join([rank]) == [128 + signal.SIGTERM]
    assert not Path("runs/x/status.json").exists()


def test_stopped_run_exits_with_0_if_torchrun_would_restart_it(ranks: Ranks) -> None:
    settings = [*ENDLESS, "train.time_limit=1s", "run.name=x"]
    restart_variables = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1"}
    restart_variables |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    ranks.run(1, *RUN, *settings, code=0, **restart_variables)
    assert read_status("x")["state"] == "stopped"


def test_start_waits_for_a_process_that_still_holds_the_folder(ranks: Ranks) -> None:
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    holder = FolderLock(folder)
    assert holder.try_acquire(lambda event, detail: None)
    started = ranks.start(2, *RUN, "run.name=x", "train.max_steps=3")
    ranks.wait_until("the line", lambda: "is in use by" in ranks.log.read_text())
    holder.release()
    assert ranks.join(started) == [0, 0], ranks.log.read_text()
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert f"runs/x is in use by process {os.getpid()} on " in line and "waiting up to 60 s" in line


def test_folder_that_stays_held_is_refused_with_its_holder(ranks: Ranks) -> None:
    folder = Path("runs/x")
    folder.mkdir(parents=True)
    holder = FolderLock(folder)
    assert holder.try_acquire(lambda event, detail: None)
    started = ranks.start(1, *RUN, "run.name=x", "train.hang_timeout_seconds=1", fault="short_wait")
    assert ranks.join(started) == [2], ranks.log.read_text()
    holder.release()
    waiting, refused = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "waiting up to 2 s" in waiting and f"in use by process {os.getpid()} on " in refused
    assert "since 20" in refused and not (folder / "status.json").exists()


@pytest.mark.slow
def test_renamed_run_folder_stops_the_run_with_all_its_files(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, *ENDLESS, "run.name=x", "log.tensorboard=false")
    ranks.wait_for_step(Path("runs/x"), 12)
    Path("runs/x").rename("runs/y")
    assert ranks.join([rank]) == [75], ranks.log.read_text()
    assert not Path("runs/x").exists() and "rename it back to runs/x" in ranks.log.read_text()
    status = read_status("y")
    assert status["state"] == "stopped" and status["reason"] == "a new name of the run folder"
    assert (Path("runs/y/checkpoints") / f"step-{status['step']:08}").is_dir()
    Path("runs/y").rename("runs/x")
    length = [*ENDLESS, f"train.max_steps={int(str(status['step'])) + 20}"]
    for name in ("x", "whole"):
        ranks.run(1, *RUN, *length, f"run.name={name}", "log.tensorboard=false")
    assert not difference_between("whole", "x")
