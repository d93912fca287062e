"""Writing a run folder: no run overwrites another run, and files are complete."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trainer.config.changes import MAY_CHANGE
from trainer.config.load import load_config
from trainer.config.schema import RunConfig, settings_by_name
from trainer.errors import FolderError
from trainer.run.files import disk_errors_as_user_errors
from trainer.run.folder import RunFolder
from trainer.run.lock import FolderLock
from trainer.run.record import RunRecord, read_json
from trainer.run.sessions import append_session, describe_environment
from trainer.tracking.jsonl import JsonLines


def config(*overrides: str) -> RunConfig:
    return load_config([], ["run.name=x", *overrides])


@pytest.fixture
def started_folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "x")
    assert not folder.try_acquire(config())
    folder.write_settings(config(), describe_environment() | {"world_size": 1})
    yield folder
    folder.release()


def test_new_folder_contains_settings_and_environment(started_folder: RunFolder) -> None:
    assert load_config([started_folder.path / "config.yaml"], []) == config()
    environment = RunRecord(started_folder.path).environment
    assert environment["world_size"] == 1 and environment["packages"]["torch"] and environment["command"]


def test_same_settings_and_settings_that_may_change_are_accepted(started_folder: RunFolder) -> None:
    assert not started_folder.try_acquire(config())
    assert not started_folder.try_acquire(config("train.epochs=99", "log.every_steps=3", "train.threads_per_rank=1"))


def test_changed_settings_are_refused_with_both_values(started_folder: RunFolder) -> None:
    with pytest.raises(FolderError, match=r"optim\.lr was 0\.1, now 0\.2.*another run\.name"):
        started_folder.try_acquire(config("optim.lr=0.2"))


def test_resume_never_refuses_a_started_run(started_folder: RunFolder) -> None:
    with pytest.raises(FolderError, match=r"run\.resume=never"):
        started_folder.try_acquire(config("run.resume=never"))


def test_setting_missing_in_old_config_has_its_default(started_folder: RunFolder) -> None:
    path = started_folder.path / "config.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "nesterov" not in line))
    assert not started_folder.try_acquire(config())
    with pytest.raises(FolderError, match="nesterov"):
        started_folder.try_acquire(config("optim.nesterov=true"))


@pytest.mark.parametrize("content", ["train: [", "3", "train: 3"])
def test_unreadable_config_is_refused_and_not_overwritten(started_folder: RunFolder, content: str) -> None:
    (started_folder.path / "config.yaml").write_text(content)
    with pytest.raises(FolderError, match=r"config\.yaml cannot be read as a file of a run"):
        started_folder.try_acquire(config())
    assert (started_folder.path / "config.yaml").read_text() == content


def test_folder_that_cannot_be_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"cannot be written .*set run\.root"):
        RunFolder(tmp_path / "file" / "x").try_acquire(config())


def test_settings_that_may_change_exist() -> None:
    assert set(settings_by_name()) > MAY_CHANGE


def test_killed_write_leaves_the_old_file(started_folder: RunFolder) -> None:
    started_folder.write_status("running", 3)

    def write_half(path: Path) -> None:
        path.write_text('{"state": "fin')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        started_folder.write_file("status.json", write_half)
    assert RunRecord(started_folder.path).status == {"state": "running", "step": 3, "reason": ""}


def test_rows_after_the_resumed_step_are_removed(started_folder: RunFolder) -> None:
    rows = [{"split": "train", "step": step} for step in (10, 20, 30)]
    started_folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"split": "tr')
    for step in (15, 20, 25):
        bad_steps = JsonLines(started_folder.bad_steps, print)
        bad_steps.write({"step": step, "ids": [1]})
        bad_steps.close()
    assert started_folder.remove_rows_after(20, print) == set()
    assert [json.loads(line)["step"] for line in started_folder.metrics.read_text().splitlines()] == [10, 20]
    # metrics.jsonl counts steps taken; bad_steps.jsonl has the index of the bad step.
    assert [json.loads(line)["step"] for line in started_folder.bad_steps.read_text().splitlines()] == [15]


@pytest.mark.parametrize("line", [b"5", b"[1]", b"null", b'{"step":"x"}', b'{"step": true}', b"{" * 9999, b"\xff\xfe"])
def test_damaged_rows_are_removed_with_a_line_for_the_user(started_folder: RunFolder, line: bytes) -> None:
    row = json.dumps({"split": "train", "step": 1}).encode()
    bad_step = json.dumps({"step": 0, "ids": [1]}).encode()
    for path, sound in ((started_folder.metrics, row), (started_folder.bad_steps, bad_step)):
        path.write_bytes(sound + b"\n" + line + b"\n" + sound + b"\n")
        lines: list[str] = []
        started_folder.remove_rows_after(1, lines.append)
        assert path.read_bytes() == (sound + b"\n") * 2
        assert len(lines) == 1 and lines[0].startswith(f"{path}: removed 1 line that is no row (")
    assert RunRecord(started_folder.path).rows


def test_new_session_keeps_the_damaged_bytes_of_earlier_ones(started_folder: RunFolder) -> None:
    damaged = b'{"step": 0, "host": "\xff\n'
    (started_folder.path / "starts.jsonl").write_bytes(damaged)
    append_session(started_folder, 3, 9, 1)
    content = (started_folder.path / "starts.jsonl").read_bytes()
    assert content.startswith(damaged) and json.loads(content.splitlines()[1])["step"] == 3


def test_wandb_key_is_not_written(started_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    started_folder.write_settings(config(), {})
    assert all("k" * 40 not in path.read_text() for path in started_folder.path.iterdir() if path.is_file())
    assert os.environ["WANDB_API_KEY"]


def test_folder_in_use_is_refused_until_it_is_released(started_folder: RunFolder) -> None:
    second = RunFolder(started_folder.path)
    holder = second.try_acquire(config())
    assert holder.startswith(f"process {os.getpid()} on ")
    assert f"in use by {holder}; wait" in str(second.in_use_error(holder))
    started_folder.release()
    assert not second.try_acquire(config())
    second.release()


def test_disk_errors_become_user_errors() -> None:
    for error in (OSError(28, "No space left"), SafetensorError("File too large")):
        with (
            pytest.raises(FolderError, match=r"the file cannot be written .*Free space"),
            disk_errors_as_user_errors("the file"),
        ):
            raise error


def test_nan_and_infinity_are_written_as_null(started_folder: RunFolder) -> None:
    started_folder.write_json("x.json", {"loss": float("nan"), "rows": [(float("inf"), 1.5)]})
    assert read_json(started_folder.path / "x.json") == {"loss": None, "rows": [[None, 1.5]]}


def test_run_inside_or_around_another_run_is_refused(started_folder: RunFolder, tmp_path: Path) -> None:
    started_folder.write_status("running", 0)
    for inner in ("y", "a/b"):
        with pytest.raises(FolderError, match=r"lies inside the run .*x; choose another run\.name"):
            RunFolder(started_folder.path / inner).try_acquire(config())
    with pytest.raises(FolderError, match=r"contains the run .*x; choose another run\.name"):
        RunFolder(tmp_path / "runs").check_settings(config())
    with pytest.raises(FolderError, match=r"contains the run .*x; choose another run\.name"):
        RunFolder(tmp_path).check_settings(config())
    assert sorted(path.name for path in started_folder.path.iterdir() if not path.name.startswith(".lease-")) == [
        ".lock", "config.yaml", "environment.json", "status.json",
    ]  # fmt: skip


def test_released_folder_without_a_run_is_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new" / "runs" / "x")
    assert not folder.try_acquire(config())
    folder.release()
    assert not (tmp_path / "new").exists()


def test_folder_that_existed_or_has_files_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    folder = RunFolder(tmp_path / "runs" / "x")
    assert not folder.try_acquire(config())
    (folder.path / "notes.txt").write_text("of a person")
    folder.release()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]
    assert not folder.try_acquire(config())
    folder.release()
    assert (folder.path / "notes.txt").exists()


def test_start_that_cannot_be_locked_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_nothing(lock: FolderLock) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FolderLock, "_write_lease", write_nothing)
    folder = RunFolder(tmp_path / "new" / "runs" / "x")
    with pytest.raises(FolderError, match="No space left on device"):
        folder.try_acquire(config())
    folder.release()
    assert not (tmp_path / "new").exists()


def test_forked_worker_does_not_remove_the_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    assert not folder.try_acquire(config())
    if (worker := os.fork()) == 0:
        os._exit(0)
    os.waitpid(worker, 0)
    assert (folder.path / ".lock").exists() and folder.is_in_use()
    folder.release()


def test_undecodable_bytes_of_a_command_are_escaped_in_json(started_folder: RunFolder) -> None:
    started_folder.write_json("environment.json", {"command": "a \udcff 猫"})
    assert RunRecord(started_folder.path).environment["command"] == "a \udcff 猫"
    assert "猫" in (started_folder.path / "environment.json").read_text()
