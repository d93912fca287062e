"""A rank that is stuck, stopped or gone: named within the stated time, with every rank's stacks; nobody waits on."""

import json
import os
import signal
from pathlib import Path

import pytest
from support.processes import ENDLESS, SMALL, Ranks

from trainer import loop
from trainer.build import build_components
from trainer.config.load import load_config
from trainer.distributed.world import World
from trainer.run.folder import RunFolder
from trainer.run.watchdog import NullWatchdog

RUN = [*SMALL, "run.root=runs", "run.name=x", *ENDLESS, "log.every_steps=1"]
QUICK = [*RUN, "train.hang_timeout_seconds=4"]
REPORT = Path("runs/x/hang-report.txt")


def reason() -> str:
    found = json.loads(Path("runs/x/status.json").read_text())
    assert found["state"] == "failed"
    return str(found["reason"])


@pytest.mark.slow
def test_a_stuck_rank_is_named_with_all_stacks(ranks: Ranks) -> None:
    started = ranks.start(3, *QUICK, plant="stuck")
    assert ranks.end(started) == [1, 1, 1], ranks.log.read_text()
    assert "late: rank 1, in step 5, forward pass" in reason()
    text = REPORT.read_text()
    parts = text.split("== rank ")
    assert len(parts) == 4 and "time.sleep(600)" in parts[2]  # the line where it sleeps, in its own part
    assert all("backward pass" in part and "step.py" in part for part in (parts[1], parts[3]))
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "late: rank 1" in line and str(REPORT) in line


@pytest.mark.slow
def test_an_upload_at_the_end_may_take_longer_than_a_step(ranks: Ranks) -> None:
    ranks.run(2, *QUICK, "train.hang_timeout_seconds=6", "train.max_steps=3", plant="slow_result")
    assert not REPORT.exists()


@pytest.mark.slow
def test_a_frozen_store_is_noticed(ranks: Ranks) -> None:
    started = ranks.start(2, *QUICK)
    ranks.until_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGSTOP)  # the store is its: the other one is told nothing, and refused nothing
    assert ranks.end([started[1]]) == [1]
    assert "the ranks' meeting point, with rank 0, has been silent" in reason()


def test_rank_0_gone_is_told_by_the_others(ranks: Ranks) -> None:
    started = ranks.start(2, *RUN)
    ranks.until_step(Path("runs/x"), 5)
    os.kill(started[0].pid, signal.SIGKILL)
    assert ranks.end(started) == [-9, 1]
    assert reason().startswith("rank 0")
    assert "samecurve: rank 1: rank 0" in ranks.log.read_text() and "Traceback" not in ranks.log.read_text()


@pytest.mark.slow
def test_a_stopped_process_is_named(ranks: Ranks) -> None:
    started = ranks.start(2, *QUICK)
    ranks.until_step(Path("runs/x"), 5)
    os.kill(started[1].pid, signal.SIGSTOP)
    assert ranks.end([started[0]]) == [1]
    assert f"late: rank 1, which does not answer (process {started[1].pid}: it is stopped)" in reason()
    assert "it is stopped" in REPORT.read_text()
    assert "loop.py" in REPORT.read_text()  # rank 0's stack, wherever in its step it waits


def test_a_killed_rank_ends_the_others_at_once(ranks: Ranks) -> None:
    started = ranks.start(3, *RUN)
    ranks.until_step(Path("runs/x"), 5)
    os.kill(started[2].pid, signal.SIGKILL)
    assert ranks.end(started) == [1, 1, -9]  # not in the half hour of an exchange's own limit
    assert f"rank 2 (process {started[2].pid}) is gone" in reason()
    assert "the same command goes on" in ranks.log.read_text()


@pytest.mark.parametrize(
    ("status", "told"), [('{"state": "failed"}', True), ('{"state": "running"}', False), ("{", False), (None, False)]
)
def test_what_rank_0_has_told_is_not_written_over(tmp_path: Path, status: str | None, told: bool) -> None:
    if status is not None:
        (tmp_path / "status.json").write_text(status)
    trainer = loop.Trainer.__new__(loop.Trainer)
    trainer.folder = RunFolder(tmp_path)
    assert trainer._has_told_failure() is told


def test_without_a_limit_there_is_no_watch(ranks: Ranks) -> None:
    ranks.run(2, *SMALL, "run.root=runs", "train.max_steps=3", "train.hang_timeout_seconds=0")


def test_a_rank_without_a_shard_is_where_it_waits_for_the_others() -> None:
    """Else it would look as if it were the late one."""
    seen: list[tuple[int, str]] = []

    class Kept(NullWatchdog):
        def heartbeat(self, step: int, place: str) -> None:
            seen.append((step, place))

    config = load_config([], ["data.name=digits", "train.virtual_ranks=2", "train.device=cpu", "train.precision=fp32"])
    made = build_components(config, World(config.train), None, Kept(), print)
    made.step([], step=3, epoch=0, global_size=1, num_shards=1)
    assert seen == [(3, "backward pass")]
