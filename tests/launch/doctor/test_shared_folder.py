"""The check that all nodes share the run folder."""

from pathlib import Path

import pytest

from launch.doctor import shared_folder
from launch.doctor.node import server
from launch.doctor.shared_folder import SharedFolder

NO_PROBLEM = {"unreachable": {}, "shared_problem": "", "has_own_flock": False}


def test_nodes_that_see_the_token_answer_and_nothing_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "SHARED_SECONDS", 0.0)
    shared = SharedFolder(tmp_path / "new" / "runs")
    assert server._answer_token({"folder": str(shared.folder), "token": shared.token}, 1) == ""
    reach = {0: NO_PROBLEM | {"shared_problem": "read-only"}, 1: NO_PROBLEM, 2: NO_PROBLEM}
    assert shared.problem == "" and shared.answered_nodes(reach) == {1}
    shared.remove()
    assert not (tmp_path / "new").exists()


def test_remove_keeps_a_folder_that_another_process_uses(tmp_path: Path) -> None:
    shared = SharedFolder(tmp_path / "new" / "runs")
    (tmp_path / "new" / "runs" / "run").mkdir()
    shared.remove()
    assert list((tmp_path / "new" / "runs").iterdir()) == [tmp_path / "new" / "runs" / "run"]


def test_answer_reports_missing_and_different_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SHARED_SECONDS", 0.0)
    folder = tmp_path / ".doctor"
    request = {"folder": str(folder), "token": "expected"}
    assert "does not see the first node's file" in server._answer_token(request, 1)
    folder.mkdir()
    (folder / "token").write_text("different")
    assert "sees another file" in server._answer_token(request, 1)


def test_root_that_cannot_be_created_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert SharedFolder(tmp_path / "file" / "runs").problem == f"{tmp_path}/file/runs: Not a directory"


def test_flock_of_the_first_node_must_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = SharedFolder(tmp_path)
    token = shared.folder / "token"
    assert not server._has_own_flock(token)
    monkeypatch.setattr(server.fcntl, "flock", lambda file, operation: None)  # each node has locks of its own
    assert server._has_own_flock(token) and not server._has_own_flock(tmp_path / "missing")
    shared.remove()
