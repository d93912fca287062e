"""Whole runs on a full, read-only or removed disk: training continues and loses nothing but checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import ENDLESS, SMALL, Ranks

from launch.verify.compare import read_rows
from trainer.run import checkpoint

RUN = [*SMALL, "run.name=x", "train.epochs=9999", "log.every_steps=1", "train.threads_per_rank=1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount(["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount a tmpfs: {error}")
    yield path
    while os.path.ismount(path):
        subprocess.run(["umount", "-l", str(path)], check=True)


def mount(arguments: list[str]) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def retry_for_a_minute(command: Callable[[], object]) -> None:
    """Repeats a command that a busy file system refuses."""
    deadline = time.monotonic() + 60
    while True:
        try:
            command()
            return
        except subprocess.CalledProcessError:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def fill_disk(folder: Path) -> Path:
    """Writes a file until the disk is full, and returns its path."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return filler
    return filler


def stop_run(ranks: Ranks, processes: list[Any], folder: Path) -> int:
    """Stops a run and returns its last step."""
    os.kill(processes[0].pid, signal.SIGTERM)
    assert ranks.join(processes) == [75], ranks.log.read_text()
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    return int(status["step"])


def test_training_continues_on_a_full_disk(ranks: Ranks, small_disk: Path) -> None:
    """After space is free again, only the checkpoints of that time are missing."""
    folder = small_disk / "x"
    settings = [*RUN, *ENDLESS, f"run.root={small_disk}", "checkpoint.every_steps=5", "log.tensorboard=true"]
    started = ranks.start(1, *settings)
    ranks.wait_for_step(folder, 50)
    filler = fill_disk(small_disk)
    ranks.wait_until(
        "a save that fails", lambda: "No space left on device); training continues" in ranks.log.read_text()
    )
    newest, messages = checkpoint.find_newest_valid(folder / "checkpoints")
    assert newest is not None and not messages  # the previous checkpoint is intact
    filler.unlink()
    ranks.wait_until("a save that succeeds", lambda: checkpoint.list_checkpoints(folder / "checkpoints")[0] != newest)
    step = stop_run(ranks, started, folder)
    assert [row["step"] for row in read_rows(folder) if row["split"] == "train"] == list(range(1, step + 1))
    assert checkpoint.find_newest_valid(folder / "checkpoints") == (
        folder / "checkpoints" / checkpoint.folder_name(step),
        [],
    )


def test_run_fails_if_its_last_rows_do_not_fit(ranks: Ranks, small_disk: Path) -> None:
    folder = small_disk / "x"
    settings = [*RUN, f"run.root={small_disk}", "checkpoint.every_steps=5", "train.max_steps=1500"]
    started = ranks.start(1, *settings)
    ranks.wait_for_step(folder, 20)
    fill_disk(small_disk)
    assert ranks.join(started) == [2]
    (line,) = [line for line in ranks.log.read_text().splitlines() if line.startswith("samecurve: ")]
    assert "cannot be written (No space left on device). Free space" in line
    path, messages = checkpoint.find_newest_valid(folder / "checkpoints")
    assert path is not None and not messages
    assert load_file(folder / "model.safetensors")  # room for the final weights was kept


@pytest.mark.parametrize("num_checkpoints", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_older_checkpoints_give_way_on_a_full_disk(ranks: Ranks, small_disk: Path, num_checkpoints: int) -> None:
    """With one checkpoint on the disk no other one fits, and this one stays: unless the last one is still being written
    when the room for the final weights is released."""
    folder = small_disk / "x"
    settings = [*RUN, f"run.root={small_disk}", "checkpoint.every_steps=100", "checkpoint.every_epochs=0"]
    last = [*settings, "checkpoint.keep=3", "log.every_steps=100", "train.max_steps=600"]
    started = ranks.start(1, *last, fault="")
    path = folder / "checkpoints" / f"step-{100 * num_checkpoints:08}"
    ranks.wait_until("a checkpoint", path.is_dir)
    checkpoint_bytes = sum(file.stat().st_blocks * 512 for file in path.iterdir())
    filler = fill_disk(small_disk)
    with filler.open("r+b") as file:  # room for the small files, but not for a checkpoint
        file.truncate(filler.stat().st_size - checkpoint_bytes // 4)
    assert ranks.join(started) == [0], ranks.log.read_text()
    output = ranks.log.read_text()
    assert ("training continues" in output) is (num_checkpoints == 1)
    newest, *older = checkpoint.list_checkpoints(folder / "checkpoints")
    assert not checkpoint.find_damage(newest) and len(older) == num_checkpoints - 1
    has_last = newest.name == "step-00000600"
    assert ("the disk is full; removed the older checkpoint" in output) is has_last
    if not has_last:
        assert num_checkpoints == 1 and newest.name == "step-00000100"
        assert f"the run is complete without it; a longer run would continue from {newest.name}" in output
        filler.unlink()
        assert "is finished (600 steps); nothing was trained" in ranks.run(1, *last)
        assert "resuming x at step 100" in ranks.run(1, *last, "train.max_steps=610")
        return
    weights = load_file(newest / "model.safetensors")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    assert not list(folder.glob(".*.partial"))


def test_training_continues_while_the_disk_is_read_only(ranks: Ranks, small_disk: Path) -> None:
    folder = small_disk / "x"
    started = ranks.start(1, *RUN, *ENDLESS, f"run.root={small_disk}", "checkpoint.every_steps=5")
    ranks.wait_for_step(folder, 20)
    checkpoints = str(folder / "checkpoints")
    mount(["--bind", checkpoints, checkpoints])
    retry_for_a_minute(lambda: mount(["-o", "remount,bind,ro", checkpoints]))  # refused during a save
    ranks.wait_until(
        "a save that fails", lambda: "(Read-only file system); training continues" in ranks.log.read_text()
    )
    newest = checkpoint.list_checkpoints(folder / "checkpoints")[0]
    mount(["-o", "remount,bind,rw", checkpoints])
    ranks.wait_until("a save that succeeds", lambda: checkpoint.list_checkpoints(folder / "checkpoints")[0] != newest)
    step = stop_run(ranks, started, folder)
    retry_for_a_minute(lambda: subprocess.run(["umount", checkpoints], check=True))
    assert [row["step"] for row in read_rows(folder) if row["split"] == "train"] == list(range(1, step + 1))


def test_removed_run_folder_is_created_again(ranks: Ranks) -> None:
    folder = Path("runs/x")
    started = ranks.start(1, *RUN, "run.root=runs", "checkpoint.every_steps=5", "train.max_steps=1000")
    ranks.wait_for_step(folder, 50)
    first_files = {name: (folder / name).read_bytes() for name in ("data.json", "starts.jsonl")}
    first_files |= {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "data").iterdir()}
    folder.rename("moved")  # a rename is atomic; the run still writes into the folder
    shutil.rmtree("moved")
    ranks.wait_until("room for the final weights", (folder / ".reserve.partial").is_file)
    assert ranks.join(started) == [0], ranks.log.read_text()
    assert "was removed during the run; created it again" in ranks.log.read_text()
    assert (folder / "config.yaml").is_file() and (folder / "summary.json").is_file()
    assert {name: (folder / name).read_bytes() for name in first_files} == first_files and len(first_files) == 4
    assert read_rows(folder)[-1]["step"] == 1000
    ranks.run(1, *RUN, "run.root=runs", "train.max_steps=1000")
    assert "is finished" in ranks.log.read_text()
