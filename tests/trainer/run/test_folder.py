"""A run's folder: nothing in it is written over, everything in it is whole."""

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
from trainer.tracking.jsonl import JsonLines


def config(*overrides: str) -> RunConfig:
    return load_config([], ["run.name=x", *overrides])


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.check(config())
    folder.begin(config(), {"world_size": 1})
    yield folder
    folder.release()


def test_a_new_folder_is_made_and_described(begun: RunFolder) -> None:
    assert load_config([begun.path / "config.yaml"], []) == config()
    described = begun.read_json("environment.json")
    assert described["world_size"] == 1 and described["packages"]["torch"] and described["command"]


def test_the_same_settings_may_go_on(begun: RunFolder) -> None:
    begun.check(config())
    begun.check(config("train.epochs=99", "log.every_steps=3", "train.threads_per_rank=1"))


def test_other_settings_are_refused_and_shown(begun: RunFolder) -> None:
    with pytest.raises(FolderError, match=r"optim\.lr was 0\.1, now 0\.2.*another run\.name"):
        begun.check(config("optim.lr=0.2"))


def test_resume_never_refuses_a_begun_run(begun: RunFolder) -> None:
    with pytest.raises(FolderError, match=r"run\.resume=never"):
        begun.check(config("run.resume=never"))


def test_a_run_of_an_older_version_has_the_defaults_of_newer_settings(begun: RunFolder) -> None:
    path = begun.path / "config.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "nesterov" not in line))
    begun.check(config())
    with pytest.raises(FolderError, match="nesterov"):
        begun.check(config("optim.nesterov=true"))


@pytest.mark.parametrize("content", ["train: [", "3", "train: 3"])
def test_a_foreign_config_is_not_written_over(begun: RunFolder, content: str) -> None:
    (begun.path / "config.yaml").write_text(content)
    with pytest.raises(FolderError, match="not readable as the settings of a run"):
        begun.check(config())
    assert (begun.path / "config.yaml").read_text() == content


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"cannot be written .*set run\.root"):
        RunFolder(tmp_path / "file" / "x").check(config())


def test_what_may_change_are_settings() -> None:
    assert set(settings_by_name()) > MAY_CHANGE


def test_a_file_is_replaced_whole(begun: RunFolder) -> None:
    begun.status("running", 3)

    def killed(path: Path) -> None:
        path.write_text('{"state": "fin')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begun.write_file("status.json", killed)
    assert begun.read_json("status.json") == {"state": "running", "step": 3, "reason": ""}


def test_metrics_are_rewound_to_a_step(begun: RunFolder) -> None:
    rows = [{"split": "train", "step": step} for step in (10, 20, 30)]
    begun.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"split": "tr')
    for step in (15, 20, 25):
        bad_steps = JsonLines(begun.bad_steps, print)
        bad_steps.write({"step": step, "ids": [1]})
        bad_steps.close()
    assert begun.rewind(20) == set()
    assert [json.loads(line)["step"] for line in begun.metrics.read_text().splitlines()] == [10, 20]
    # A row of metrics is written after its step, a bad step is named by the step that it would have been.
    assert [json.loads(line)["step"] for line in begun.bad_steps.read_text().splitlines()] == [15]


def test_no_key_is_written_down(begun: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    begun.begin(config(), {})
    assert all("k" * 40 not in path.read_text() for path in begun.path.iterdir() if path.is_file())
    assert os.environ["WANDB_API_KEY"]


def test_two_processes_cannot_use_one_folder(begun: RunFolder) -> None:
    second = RunFolder(begun.path)
    with pytest.raises(FolderError, match="in use by another process"):
        second.check(config())
    begun.release()
    second.check(config())
    second.release()


def test_a_disk_that_is_full_is_one_line() -> None:
    for error in (OSError(28, "No space left"), SafetensorError("File too large")):
        with (
            pytest.raises(FolderError, match=r"that cannot be written .*make room"),
            disk_errors_as_user_errors("that"),
        ):
            raise error


def test_numbers_that_json_has_no_word_for_are_null(begun: RunFolder) -> None:
    begun.write_json("x.json", {"loss": float("nan"), "rows": [(float("inf"), 1.5)]})
    assert begun.read_json("x.json") == {"loss": None, "rows": [[None, 1.5]]}
