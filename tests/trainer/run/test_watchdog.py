"""A rank that hangs, is stopped or is gone: the others name it, write the report and end in time."""

import os
import signal
from pathlib import Path

import pytest
from support.processes import ENDLESS, SMALL, Ranks

from trainer.build import build_components
from trainer.config.load import load_config
from trainer.distributed.world import World
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.run.watchdog import NullWatchdog
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
def test_frozen_store_ends_the_other_ranks(ranks: Ranks) -> None:
    started = ranks.start(2, *QUICK)
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGSTOP)  # its store neither answers nor refuses a connection
    assert ranks.join([started[1]]) == [1]
    assert "the store on rank 0 has not answered" in failure_reason()


def test_killed_rank_0_is_named_by_the_others(ranks: Ranks) -> None:
    started = ranks.start(2, *RUN)
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGKILL)
    assert ranks.join(started) == [-9, 1]
    assert failure_reason().startswith("rank 0")
    assert "samecurve: rank 1: rank 0" in ranks.log.read_text() and "Traceback" not in ranks.log.read_text()


@pytest.mark.slow
def test_stopped_process_is_named(ranks: Ranks) -> None:
    started = ranks.start(2, *QUICK)
    ranks.wait_for_step(Path("runs/x"), 5)
    os.kill(started[1].pid, signal.SIGSTOP)
    assert ranks.join([started[0]]) == [1]
    assert f"late: rank 1, which does not answer (process {started[1].pid}: it is stopped)" in failure_reason()
    assert "it is stopped" in REPORT.read_text()
    assert "loop.py" in REPORT.read_text()  # the stack of rank 0


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
