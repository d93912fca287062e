"""Temporary folders are removed at the end, or at a later start if their owner was killed; others stay."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from trainer.process import temporary
from trainer.process.temporary import LauncherFolder, remove_stale_folders, temporary_folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "temp"
    root.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root))
    return root


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def torchrun_folder(root: Path, monkeypatch: pytest.MonkeyPatch, name: str = "torchelastic_a1") -> Path:
    """Returns the folder that torchrun would make for its ranks."""
    rank_folder = root / name / "none_x" / "attempt_0" / "0"
    rank_folder.mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(rank_folder / "error.json"))
    return root / name


def test_own_folder_is_removed_at_the_end(root: Path) -> None:
    with temporary_folder() as folder:
        (folder / "outcome.json").write_text("{}")
        remove_stale_folders()
        assert (folder / "outcome.json").exists() and folder.parent == root
    assert not list(root.iterdir())


def test_folders_of_killed_owners_are_removed_and_others_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("samecurve-dead", "samecurve-live", "samecurve-unknown", "torchelastic_unknown", "other"):
        (root / name / "logs").mkdir(parents=True)
    temporary._write_owner(root / "samecurve-dead", dead_pid())
    temporary._write_owner(root / "samecurve-live", os.getpid())
    temporary._write_owner(root / "other", dead_pid())
    (root / "samecurve-link").symlink_to(root / "other")
    (root / "samecurve-with-logs" / "0").mkdir(parents=True)
    (root / "samecurve-with-logs" / "0" / "stdout.log").write_text("a log that somebody asked for")
    temporary._write_owner(root / "samecurve-with-logs", dead_pid())
    remove_stale_folders()
    assert {path.name for path in root.iterdir()} == {
        "samecurve-live", "samecurve-unknown", "samecurve-link", "samecurve-with-logs", "torchelastic_unknown", "other",
    }  # fmt: skip


def test_rank_removes_the_folder_of_torchrun(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = torchrun_folder(root, monkeypatch)
    LauncherFolder(os.getpid()).remove()
    assert not folder.exists()


def test_folder_of_a_killed_torchrun_is_removed_at_the_next_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = torchrun_folder(root, monkeypatch)
    LauncherFolder(dead_pid())
    assert folder.exists()
    remove_stale_folders()
    assert not folder.exists()


def test_folder_of_samecurve_train_and_of_the_user_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torchrun_folder(root, monkeypatch, "samecurve-a")
    temporary._write_owner(ours, os.getppid())  # `samecurve train`, the parent of torchrun
    LauncherFolder(os.getpid()).remove()
    assert ours.exists()
    users = torchrun_folder(root, monkeypatch, "my-logs")
    LauncherFolder(os.getpid()).remove()
    assert users.exists() and not list(users.glob("*.json"))
    torchrun_folder(root, monkeypatch, "torchelastic_b")
    LauncherFolder(0).remove()  # not a rank of a launcher
    assert (root / "torchelastic_b").exists()
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    LauncherFolder(os.getpid()).remove()


def test_links_that_lead_nowhere_and_vanishing_files_do_not_keep_a_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("samecurve-a", "samecurve-b"):
        (root / name).mkdir()
        (root / name / "link").symlink_to(root / "nowhere")
        temporary._write_owner(root / name, dead_pid())
    monkeypatch.setattr(temporary.os, "walk", lambda folder: [(str(folder), [], ["link", "gone"])])
    remove_stale_folders()
    assert not list(root.iterdir())
