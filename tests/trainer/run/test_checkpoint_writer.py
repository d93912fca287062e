"""Background checkpoints: the copy does not change during training, and disk errors only cost the current save."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.config.load import load_config
from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter, Snapshot
from trainer.run.folder import RunFolder


def state(step: int, elements: int = 4) -> TrainingState:
    net = nn.Linear(elements, 1)
    nn.init.constant_(net.weight, float(step))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, elements)).sum().backward()
    optimizer.step()
    return TrainingState(net.state_dict(), optimizer.state_dict(), {"scale": 2.0}, Progress(step))


def build_writer(folder: RunFolder, keep: int, log: Callable[[str], object] = print) -> BackgroundCheckpointWriter:
    return BackgroundCheckpointWriter(folder, keep, Progress(), lambda: None, log)  # type: ignore[arg-type]


def steps(folder: RunFolder) -> list[int]:
    return [int(path.name[-8:]) for path in checkpoint.list_checkpoints(folder.checkpoints)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    settings = load_config([], ["run.name=x", f"run.root={tmp_path}"])
    run_folder = RunFolder(tmp_path / "x")
    assert not run_folder.try_acquire(settings)
    run_folder.write_settings(settings, {})
    yield run_folder
    run_folder.release()


def test_snapshot_does_not_change_with_the_original() -> None:
    snapshot, original = Snapshot(), state(3)
    copied = snapshot.take(original)
    for tensor in (original.model["weight"], original.optimizer["state"][0]["momentum_buffer"]):
        tensor.fill_(99.0)
    original.progress.step, original.optimizer["param_groups"][0]["lr"] = 99, 99.0
    assert copied.model["weight"].max() < 4 and copied.optimizer["state"][0]["momentum_buffer"].max() < 4
    assert copied.progress.step == 3 and copied.optimizer["param_groups"][0]["lr"] == 0.1


def test_snapshot_reuses_its_memory() -> None:
    snapshot = Snapshot()
    addresses = [snapshot.take(state(step)).model["weight"].data_ptr() for step in (1, 2)]
    assert addresses[0] == addresses[1]


def test_save_returns_before_the_checkpoint_is_written(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, save = threading.Event(), checkpoint.save

    def slow_save(path: Path, training_state: TrainingState) -> Path:
        assert may_write.wait(60)
        return save(path, training_state)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    writer = build_writer(folder, 2)
    writer.save(state(1), None)  # returns at once: the thread still waits
    assert checkpoint.list_checkpoints(folder.checkpoints) == []
    may_write.set()
    writer.save(state(2), None)  # waits for the first save
    assert folder.checkpoints / "step-00000001" in checkpoint.list_checkpoints(folder.checkpoints)
    writer.finish()
    assert [path.name for path in checkpoint.list_checkpoints(folder.checkpoints)] == ["step-00000002", "step-00000001"]
    assert json.loads((folder.path / "status.json").read_text())["step"] == 2


def test_old_checkpoint_is_removed_only_after_the_new_one_is_verified(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    writer = build_writer(folder, 1, lines.append)
    writer.save(state(1), None)
    writer.finish()
    flush = checkpoint._flush

    def flush_and_damage(path: Path) -> None:
        flush(path)
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"\0")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", flush_and_damage)
        writer.save(state(2), None)
        with pytest.raises(FolderError, match=r"step 2 .*model\.safetensors has changed since it was written"):
            writer.finish()
    assert "training continues" in lines[0]
    assert checkpoint.find_newest_valid(folder.checkpoints)[0] == folder.checkpoints / "step-00000001"
    writer.save(state(3), None)
    writer.finish()
    assert steps(folder) == [3, 2]  # the damaged one stays


def damage(folder: RunFolder, step: int) -> None:
    (folder.checkpoints / checkpoint.folder_name(step) / "model.safetensors").write_bytes(b"")


def test_damaged_checkpoints_are_neither_counted_nor_removed(folder: RunFolder) -> None:
    first = build_writer(folder, 9)
    for step in (100, 200, 300):
        first.save(state(step), None)
    first.finish()
    damage(folder, 200)
    damage(folder, 300)
    resumed = BackgroundCheckpointWriter(folder, 2, Progress(100), lambda: None, print)
    for step in (110, 120):
        resumed.save(state(step), None)
        resumed.finish()
    assert steps(folder) == [300, 200, 120, 110]
    assert checkpoint.find_newest_valid(folder.checkpoints)[0] == folder.checkpoints / "step-00000120"


def test_best_checkpoint_stays_if_a_better_one_could_not_be_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = build_writer(folder, 1)
    writer.save(state(100), 100)
    writer.finish()

    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", raise_disk_full)
        writer.save(state(200), 200)
        with pytest.raises(FolderError):
            writer.finish()
    assert not list(folder.checkpoints.glob(".*"))  # the partial checkpoint was removed
    for step, best in ((300, 200), (400, 200), (500, 500)):
        writer.save(state(step), best)
        writer.finish()
        assert steps(folder) == {300: [300, 100], 400: [400, 100], 500: [500]}[step]


@pytest.mark.parametrize("has_older", [True, False])
def test_older_checkpoint_stays_if_the_last_one_does_not_fit(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, has_older: bool
) -> None:
    lines: list[str] = []
    writer = build_writer(folder, 1, lines.append)
    if has_older:
        writer.save(state(100), None)
        writer.finish()

    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", raise_disk_full)
    writer.save(state(200), None)
    with pytest.raises(FolderError, match="No space left"):
        writer.finish()
    assert writer.is_last_saved
    writer.finish(has_final_weights=True)
    assert not writer.is_last_saved and steps(folder) == [100] * has_older
    newest = "step-00000100" if has_older else "the first step"
    assert lines[-1].endswith(f"the run is complete without it; a longer run would continue from {newest}")


def test_existing_valid_checkpoint_is_not_written_again(folder: RunFolder) -> None:
    writer = build_writer(folder, 1)
    writer.save(state(7), None)
    writer.finish()
    inode = (folder.checkpoints / "step-00000007").stat().st_ino
    second_writer = build_writer(folder, 1)
    second_writer.save(state(7), None)
    second_writer.finish()
    assert (folder.checkpoints / "step-00000007").stat().st_ino == inode


def test_no_checkpoint_is_written_if_the_rows_cannot_be_flushed(folder: RunFolder) -> None:
    # A run that resumes from the checkpoint would not write the rows again.
    def raise_disk_full() -> None:
        raise OSError(28, "No space left on device")

    writer = BackgroundCheckpointWriter(folder, 1, Progress(), raise_disk_full, print)
    writer.save(state(1), None)
    with pytest.raises(FolderError, match="No space left"):
        writer.finish()
    assert steps(folder) == []


def test_removed_folder_locked_by_another_process_fails_each_save(folder: RunFolder) -> None:
    lines: list[str] = []
    writer = build_writer(folder, 1, lines.append)
    shutil.rmtree(folder.path)
    other_folder = RunFolder(folder.path)
    assert other_folder._try_acquire_lock()
    for step in (1, 2):
        writer.save(state(step), None)
        with pytest.raises(FolderError, match="in use by process "):
            writer.finish()
    assert len(lines) == 2
    other_folder.release()


def test_defect_in_the_thread_is_raised_by_the_next_save(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_defect(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(checkpoint, "save", raise_defect)
    writer = build_writer(folder, 1)
    writer.save(state(1), None)
    with pytest.raises(ZeroDivisionError):
        writer.save(state(2), None)
