"""Saving in the background: the copy is the state as it was; a disk in trouble costs a save and no more."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import ENDLESS, SMALL, Ranks
from torch import nn

from launch.verify.compare import rows
from trainer.config.load import load_config
from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter, Snapshot
from trainer.run.folder import RunFolder

RUN = [*SMALL, "run.name=x", "train.epochs=9999", "log.every_steps=1", "train.threads_per_rank=1"]


def state(step: int, elements: int = 4) -> TrainingState:
    net = nn.Linear(elements, 1)
    nn.init.constant_(net.weight, float(step))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, elements)).sum().backward()
    optimizer.step()
    return TrainingState(net.state_dict(), optimizer.state_dict(), {"scale": 2.0}, Progress(step))


def made(folder: RunFolder, keep: int, log: Callable[[str], object] = print) -> BackgroundCheckpointWriter:
    return BackgroundCheckpointWriter(folder, keep, Progress(), lambda: None, log)  # type: ignore[arg-type]


def steps(folder: RunFolder) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoint.list_checkpoints(folder.checkpoints)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    settings = load_config([], ["run.name=x", f"run.root={tmp_path}"])
    made = RunFolder(tmp_path / "x")
    made.check(settings)
    made.begin(settings, {})
    yield made
    made.release()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount(["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs: {error}")
    yield place
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def mount(arguments: list[str]) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def until_done(work: Callable[[], object]) -> None:
    """Tries again, for a while, what a busy file system refuses."""
    until = time.monotonic() + 60
    while True:
        try:
            work()
            return
        except subprocess.CalledProcessError:
            assert time.monotonic() < until
            time.sleep(0.001)


def fill(place: Path) -> Path:
    """A file that takes all that is left of a disk."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return filler
    return filler


def stopped(ranks: Ranks, started: list[Any], folder: Path) -> int:
    """Asks a run to stop; the step at which it has."""
    os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.end(started) == [75], ranks.log.read_text()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    return int(status["step"])


def test_a_copy_is_the_state_as_it_was() -> None:
    snapshot, now = Snapshot(), state(3)
    copied = snapshot.take(now)
    for tensor in (now.model["weight"], now.optimizer["state"][0]["momentum_buffer"]):
        tensor.fill_(99.0)
    now.progress.step, now.optimizer["param_groups"][0]["lr"] = 99, 99.0
    assert copied.model["weight"].max() < 4 and copied.optimizer["state"][0]["momentum_buffer"].max() < 4
    assert copied.progress.step == 3 and copied.optimizer["param_groups"][0]["lr"] == 0.1


def test_memory_for_the_copy_is_used_again() -> None:
    snapshot = Snapshot()
    places = [snapshot.take(state(step)).model["weight"].data_ptr() for step in (1, 2)]
    assert places[0] == places[1]


def test_the_loop_goes_on_while_it_is_written(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, saves = threading.Event(), checkpoint.save

    def slow(place: Path, what: TrainingState) -> Path:
        assert may_write.wait(60)
        return saves(place, what)

    monkeypatch.setattr(checkpoint, "save", slow)
    saver = made(folder, 2)
    saver.save(state(1), None)  # returns at once: nothing could have been written
    assert checkpoint.list_checkpoints(folder.checkpoints) == []
    may_write.set()
    saver.save(state(2), None)  # one in flight: waits for the first
    assert folder.checkpoints / "step-00000001" in checkpoint.list_checkpoints(folder.checkpoints)
    saver.finish()
    assert [path.name for path in checkpoint.list_checkpoints(folder.checkpoints)] == ["step-00000002", "step-00000001"]
    assert json.loads((folder.path / "status.json").read_text())["step"] == 2


def test_an_older_one_goes_only_when_the_new_one_reads_well(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    saver = made(folder, 1, said.append)
    saver.save(state(1), None)
    saver.finish()
    flushes = checkpoint._flush

    def rots(path: Path) -> None:
        flushes(path)
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"\0")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "_flush", rots)
        saver.save(state(2), None)
        with pytest.raises(FolderError, match=r"step 2 .*model\.safetensors is not what was written"):
            saver.finish()
    assert "training goes on" in said[0]
    assert checkpoint.newest_valid(folder.checkpoints)[0] == folder.checkpoints / "step-00000001"
    saver.save(state(3), None)
    saver.finish()
    assert steps(folder) == [3, 2]  # the damaged one is left for a person to look at


def spoil(folder: RunFolder, step: int) -> None:
    (folder.checkpoints / checkpoint.folder_name(step) / "model.safetensors").write_bytes(b"")


def test_damaged_ones_are_neither_counted_nor_removed(folder: RunFolder) -> None:
    first = made(folder, 9)
    for step in (100, 200, 300):
        first.save(state(step), None)
    first.finish()
    spoil(folder, 200)
    spoil(folder, 300)
    again = BackgroundCheckpointWriter(folder, 2, Progress(100), lambda: None, print)  # goes on from 100
    for step in (110, 120):
        again.save(state(step), None)
        again.finish()
    assert steps(folder) == [300, 200, 120, 110]
    assert checkpoint.newest_valid(folder.checkpoints)[0] == folder.checkpoints / "step-00000120"


def test_the_best_stays_when_a_better_one_could_not_be_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = made(folder, 1)
    saver.save(state(100), 100)
    saver.finish()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint, "save_file", full)
        saver.save(state(200), 200)
        with pytest.raises(FolderError):
            saver.finish()
    assert not list(folder.checkpoints.glob(".*"))  # what was half written does not keep the disk full
    for step, best in ((300, 200), (400, 200), (500, 500)):
        saver.save(state(step), best)
        saver.finish()
        assert steps(folder) == {300: [300, 100], 400: [400, 100], 500: [500]}[step]


def test_one_that_is_there_is_left_as_it_is(folder: RunFolder) -> None:
    saver = made(folder, 1)
    saver.save(state(7), None)
    saver.finish()
    before = (folder.checkpoints / "step-00000007").stat().st_ino
    again = made(folder, 1)
    again.save(state(7), None)
    again.finish()
    assert (folder.checkpoints / "step-00000007").stat().st_ino == before


def test_rows_that_cannot_be_written_keep_a_checkpoint_from_being_believed(folder: RunFolder) -> None:
    # A run that went on from it would not write them again.
    def full() -> None:
        raise OSError(28, "No space left on device")

    saver = BackgroundCheckpointWriter(folder, 1, Progress(), full, print)
    saver.save(state(1), None)
    with pytest.raises(FolderError, match="No space left"):
        saver.finish()
    assert steps(folder) == []


def test_a_folder_that_another_process_has_taken_is_told_each_time(folder: RunFolder) -> None:
    said: list[str] = []
    saver = made(folder, 1, said.append)
    shutil.rmtree(folder.path)
    other = RunFolder(folder.path)
    other._take_hold()
    for step in (1, 2):
        saver.save(state(step), None)
        with pytest.raises(FolderError, match="in use by another process"):
            saver.finish()
    assert len(said) == 2
    other.release()


def test_a_defect_in_the_thread_is_raised(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(checkpoint, "save", broken)
    saver = made(folder, 1)
    saver.save(state(1), None)
    with pytest.raises(ZeroDivisionError):
        saver.save(state(2), None)


class TestDisks:
    def test_a_full_one(self, ranks: Ranks, small_disk: Path) -> None:
        """Training goes on, and when there is room again nothing is missing but the checkpoints that were not saved."""
        folder = small_disk / "x"
        settings = [*RUN, *ENDLESS, f"run.root={small_disk}", "checkpoint.every_steps=5", "log.tensorboard=true"]
        started = ranks.start(1, *settings)
        ranks.until_step(folder, 50)
        filler = fill(small_disk)
        ranks.until("a save that fails", lambda: "No space left on device); training goes on" in ranks.log.read_text())
        kept, damaged = checkpoint.newest_valid(folder / "checkpoints")
        assert kept is not None and not damaged  # the one before is intact
        filler.unlink()
        ranks.until("a save that succeeds", lambda: checkpoint.list_checkpoints(folder / "checkpoints")[0] != kept)
        step = stopped(ranks, started, folder)
        assert [row["step"] for row in rows(folder) if row["split"] == "train"] == list(range(1, step + 1))
        assert checkpoint.newest_valid(folder / "checkpoints") == (
            folder / "checkpoints" / checkpoint.folder_name(step),
            [],
        )

    def test_one_that_stays_full(self, ranks: Ranks, small_disk: Path) -> None:
        folder = small_disk / "x"
        settings = [*RUN, f"run.root={small_disk}", "checkpoint.every_steps=5", "train.max_steps=1500"]
        started = ranks.start(1, *settings)
        ranks.until_step(folder, 20)
        fill(small_disk)
        assert ranks.end(started) == [2]
        (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
        assert "cannot be written (No space left on device); make room there" in line
        place, damaged = checkpoint.newest_valid(folder / "checkpoints")
        assert place is not None and not damaged

    def test_one_that_is_read_only_for_a_while(self, ranks: Ranks, small_disk: Path) -> None:
        folder = small_disk / "x"
        started = ranks.start(1, *RUN, *ENDLESS, f"run.root={small_disk}", "checkpoint.every_steps=5")
        ranks.until_step(folder, 20)
        checkpoints = str(folder / "checkpoints")
        mount(["--bind", checkpoints, checkpoints])
        until_done(lambda: mount(["-o", "remount,bind,ro", checkpoints]))  # refused while a save is at it
        ranks.until("a refusal", lambda: "(Read-only file system); training goes on" in ranks.log.read_text())
        kept = checkpoint.list_checkpoints(folder / "checkpoints")[0]
        mount(["-o", "remount,bind,rw", checkpoints])
        ranks.until("a save that succeeds", lambda: checkpoint.list_checkpoints(folder / "checkpoints")[0] != kept)
        step = stopped(ranks, started, folder)
        until_done(lambda: subprocess.run(["umount", checkpoints], check=True))
        assert [row["step"] for row in rows(folder) if row["split"] == "train"] == list(range(1, step + 1))

    def test_a_run_folder_that_is_removed(self, ranks: Ranks) -> None:
        folder = Path("runs/x")
        started = ranks.start(1, *RUN, "run.root=runs", "checkpoint.every_steps=5", "train.max_steps=1000")
        ranks.until_step(folder, 50)
        folder.rename("moved")  # at once, as one cannot remove what is being written to
        shutil.rmtree("moved")
        assert ranks.end(started) == [0], ranks.log.read_text()
        assert "had been removed while the run was on; it is made anew" in ranks.log.read_text()
        assert (folder / "config.yaml").is_file() and (folder / "summary.json").is_file()
        assert rows(folder)[-1]["step"] == 1000
        ranks.run(1, *RUN, "run.root=runs", "train.max_steps=1000")
        assert "is finished" in ranks.log.read_text()
