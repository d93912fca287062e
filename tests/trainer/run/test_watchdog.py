"""A rank that hangs or is gone: the others name it, write the report and end in time. A suspended one is waited for."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from support import forked
from support.processes import ENDLESS, SMALL, Ranks, last_step
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.build import build_components
from trainer.config.load import load_config
from trainer.distributed.world import World
from trainer.process.identity import process_state
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.run.stop import LAUNCHER_END, StopSignals
from trainer.run.watchdog import NullWatchdog, RankWatchdog
from trainer.session import Session

RUN = [*SMALL, "run.root=runs", "run.name=x", *ENDLESS, "log.every_steps=1"]
QUICK = [*RUN, "train.hang_timeout_seconds=4"]
REPORT = Path("runs/x/hang-report.txt")


def failure_reason() -> str:
    status = RunRecord(Path("runs/x")).status
    assert status["state"] == "failed"
    return str(status["reason"])


@pytest.mark.slow
def test_hanging_rank_is_named_with_all_stacks(ranks: Ranks) -> None:
    started = ranks.start(3, *QUICK, fault="stuck_rank")
    assert ranks.join(started) == [1, 1, 1], ranks.log.read_text()
    assert "late: rank 1, in step 5, forward pass" in failure_reason()
    text = REPORT.read_text()
    sections = text.split("== rank ")
    assert len(sections) == 4 and "time.sleep(600" in sections[2]  # the stack of rank 1 ends at this line
    assert all("backward pass" in section and "step.py" in section for section in (sections[1], sections[3]))
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "late: rank 1" in line and str(REPORT) in line


@pytest.mark.slow
def test_slow_upload_at_the_end_is_no_hang(ranks: Ranks) -> None:
    ranks.run(2, *QUICK, "train.hang_timeout_seconds=6", "train.max_steps=3", fault="slow_result")
    assert not REPORT.exists()


@pytest.mark.slow
@pytest.mark.parametrize("suspended", [[0], [1], [0, 1]])
def test_suspended_ranks_are_waited_for(ranks: Ranks, suspended: list[int]) -> None:
    """Rank 0 has the store: while it is suspended, the store neither answers nor refuses a connection."""
    folder = Path("runs/x")
    started = ranks.start(2, *QUICK, "train.hang_timeout_seconds=2")
    ranks.wait_for_step(folder, 5)
    for rank in suspended:
        os.kill(started[rank].pid, signal.SIGSTOP)
    time.sleep(7)
    for rank in suspended:
        os.kill(started[rank].pid, signal.SIGCONT)
    ranks.wait_for_step(folder, last_step(folder) + 50)
    os.kill(started[1].pid, signal.SIGTERM)
    assert ranks.join(started) == [75, 75], ranks.log.read_text()
    assert ("is suspended; the run waits for it" in ranks.log.read_text()) is (len(suspended) == 1)


@pytest.mark.slow
def test_hang_after_a_suspension_is_reported(ranks: Ranks) -> None:
    started = ranks.start(2, *QUICK, fault="stuck_rank")
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGSTOP)
    time.sleep(6)
    os.kill(started[0].pid, signal.SIGCONT)
    start = time.monotonic()
    assert ranks.join(started) == [1, 1]
    assert time.monotonic() - start < 10 and "late: rank 1, in step 5, forward pass" in failure_reason()


def test_suspended_single_process_goes_on(ranks: Ranks) -> None:
    folder = Path("runs/x")
    (rank,) = ranks.start(1, *RUN, "train.hang_timeout_seconds=1")
    ranks.wait_for_step(folder, 5)
    os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(rank.pid, signal.SIGCONT)
    ranks.wait_for_step(folder, last_step(folder) + 10)
    os.kill(rank.pid, signal.SIGTERM)
    assert ranks.join([rank]) == [75], ranks.log.read_text()


def test_single_process_in_an_endless_step_ends_with_a_line(ranks: Ranks) -> None:
    start = time.monotonic()
    started = ranks.start(1, *RUN, "train.hang_timeout_seconds=1", fault="endless_step")
    assert ranks.join(started) == [1] and time.monotonic() - start < 30
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "rank 0 has been in step 1, forward pass, for " in line and "train.hang_timeout_seconds" in line
    assert "time.sleep(600" in REPORT.read_text() and failure_reason() in line


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_that_never_comes_ends_a_single_process(ranks: Ranks, workers: int) -> None:
    settings = ["train.hang_timeout_seconds=1", f"data.workers={workers}"]
    started = ranks.start(1, *RUN, *settings, fault="no_batch")
    assert ranks.join(started) == [1], ranks.log.read_text()
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "waiting for data, for " in line and "set data.workers=0 if a data worker is stuck" in line


@pytest.mark.slow  # five seconds of patience, then five for the end of the worker
def test_stop_while_a_batch_does_not_come_saves_a_checkpoint(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, "data.workers=1", fault="no_batch")
    ranks.wait_until("the wait for data", Path("waiting").exists)
    os.kill(rank.pid, signal.SIGTERM)
    assert ranks.join([rank], timeout_seconds=30) == [75], ranks.log.read_text()
    status = RunRecord(Path("runs/x")).status
    assert status["state"] == "stopped" and status["reason"] == "SIGTERM"
    assert (Path("runs/x/checkpoints") / f"step-{status['step']:08}").is_dir()


def test_killed_data_worker_ends_the_run_with_a_line(ranks: Ranks) -> None:
    (rank,) = ranks.start(1, *RUN, "data.workers=2")
    ranks.wait_for_step(Path("runs/x"), 5)
    psutil.Process(rank.pid).children()[0].kill()
    assert ranks.join([rank], timeout_seconds=30) == [1], ranks.log.read_text()
    assert "Traceback" not in ranks.log.read_text()
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "a data worker is gone (DataLoader worker (pid" in line and failure_reason() in line


def test_ranks_of_a_killed_launcher_save_and_end(ranks: Ranks) -> None:
    """Each rank has a launcher of its own, as on two machines. The launcher of rank 1 is killed; both ranks stop."""
    folder = Path("runs/x")
    launchers = ranks.call(2, forked.run_rank_of_launcher, RUN, "tiny")
    ranks.wait_for_step(folder, 5)
    launchers[1].kill()
    assert ranks.join([launchers[0]], timeout_seconds=30) == [75], ranks.log.read_text()
    pid = int(Path("pid-1").read_text())
    ranks.wait_until("the end of rank 1", lambda: process_state(pid) in ("gone", "Z"))
    status = RunRecord(folder).status
    assert status["state"] == "stopped" and status["reason"] == LAUNCHER_END
    assert (folder / "checkpoints" / f"step-{status['step']:08}").is_dir()


def test_killed_launcher_ends_a_start_before_training(ranks: Ranks) -> None:
    (launcher,) = ranks.call(1, forked.run_rank_of_launcher, RUN, "slow_start")
    ranks.wait_until("the data set", Path("started").exists)
    launcher.kill()
    pid = int(Path("pid-0").read_text())
    ranks.wait_until("the end of the rank", lambda: process_state(pid) in ("gone", "Z"), timeout_seconds=10)
    assert "has ended before training" in ranks.log.read_text() and not Path("runs/x/status.json").exists()


def test_killed_rank_0_is_named_by_the_others(ranks: Ranks) -> None:
    started = ranks.start(2, *RUN)
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGKILL)
    assert ranks.join(started) == [-9, 1]
    assert failure_reason().startswith("rank 0")
    assert "samecurve: rank 1: rank 0" in ranks.log.read_text() and "Traceback" not in ranks.log.read_text()


def test_killed_rank_ends_the_others_at_once(ranks: Ranks) -> None:
    started = ranks.start(3, *RUN)
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[2].pid, signal.SIGKILL)
    assert ranks.join(started) == [1, 1, -9]  # not after gloo's timeout of 30 minutes
    assert f"rank 2 (process {started[2].pid}) is gone" in failure_reason()
    assert "run the same command again to continue" in ranks.log.read_text()


@pytest.mark.parametrize(
    ("status", "has_failed"),
    [('{"state": "failed"}', True), ('{"state": "running"}', False), ("{", False), (None, False)],
)
def test_failure_reason_of_rank_0_is_not_overwritten(tmp_path: Path, status: str | None, has_failed: bool) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    session = Session.__new__(Session)
    session.folder = RunFolder(tmp_path)
    assert session._is_failure_recorded() is has_failed


def test_hang_timeout_0_disables_the_watchdog(ranks: Ranks) -> None:
    ranks.run(2, *SMALL, "run.root=runs", "train.max_steps=3", "train.hang_timeout_seconds=0")


def test_suspended_ranks_of_two_machines_are_both_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watchdogs = []
    for rank in (0, 2):  # the first ranks of two machines with two ranks each
        for name, value in {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.port))
        signals = StopSignals.__new__(StopSignals)
        watchdogs.append(RankWatchdog(rank, 4, "a", 60.0, RunFolder(tmp_path), print, signals))
        watchdogs[-1]._store = watchdogs[-1]._connect()
    first, second = watchdogs
    for suspended_first, suspended_second in ([1], [3]), ([], [3]), ([], []):
        first._suspended_here, second._suspended_here = suspended_first, suspended_second
        first._send_heartbeat()
        second._send_heartbeat()
        expected = suspended_first + suspended_second
        assert first._suspended_ranks() == second._suspended_ranks() == expected


def test_rank_without_shards_reports_the_backward_pass() -> None:
    """It waits there for the others. In any earlier phase it would count as late."""
    heartbeats: list[tuple[int, str]] = []

    class RecordingWatchdog(NullWatchdog):
        def heartbeat(self, step: int, phase: str) -> None:
            heartbeats.append((step, phase))

    config = load_config([], ["data.name=digits", "train.virtual_ranks=2", "train.device=cpu", "train.precision=fp32"])
    components = build_components(config, World(config.train), None, RecordingWatchdog(), print)
    components.step([], step=3, epoch=0, global_batch_size=1, num_shards=1)
    assert heartbeats == [(3, "backward pass")]
