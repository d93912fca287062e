"""RunRecord: reads each file of a run folder once, treats a missing file as empty, and names an unreadable one."""

import json
from pathlib import Path

import pytest

from trainer.errors import FolderError
from trainer.run.record import BestEvaluation, Job, RunRecord, modified_at

SESSION = {"step": 0, "total_steps": 9, "world_size": 2, "host": "a", "job": None}


@pytest.mark.parametrize(
    "attribute",
    [
        "status", "environment", "summary", "current_summary", "evaluation", "rows", "metric_names", "last_train_row",
        "last_test_row", "last_validation_row", "best",
        "sessions", "last_session", "restarts", "job", "job_file", "submitted_job", "wandb_id",
        "offline_wandb_sessions", "modified_at",
    ],
)  # fmt: skip
def test_missing_file_is_an_empty_part(attribute: str, tmp_path: Path) -> None:
    assert not getattr(RunRecord(tmp_path), attribute)


def test_settings_of_a_folder_without_a_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"is not a run folder: it has no config\.yaml"):
        _ = RunRecord(tmp_path).settings


@pytest.mark.parametrize(
    ("file", "content", "attribute"),
    [
        ("config.yaml", "run: [", "settings"),
        ("config.yaml", "3", "settings"),
        ("config.yaml", "{}", "settings"),
        ("config.yaml", "a: &a [*a]", "settings"),
        ("config.yaml", "[" * 5000, "settings"),
        ("summary.json", '{"test": {}}', "summary"),
        ("evaluation.json", '{"classes": 3}', "evaluation"),
        ("environment.json", '{"hosts": 3}', "environment"),
        ("config.yaml", "run: {name: x}", "wandb_project"),
        ("status.json", '{"state": "run', "status"),
        ("status.json", "[]", "status"),
        ("job.json", "[]", "job"),
        ("starts.jsonl", "{", "sessions"),
        ("starts.jsonl", "[]", "sessions"),
        ("starts.jsonl", '{"step": 1}', "sessions"),
        ("metrics.jsonl", "[]\n", "rows"),
        ("metrics.jsonl", '{"step": 1}\n', "metric_names"),
        ("metrics.jsonl", '{"split": "train", }\n', "last_train_row"),
    ],
)
def test_unreadable_file_is_named(file: str, content: str, attribute: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(FolderError, match=f"{file} cannot be read as a file of a run .*; repair it, or restore it"):
        getattr(RunRecord(tmp_path), attribute)


def test_file_that_the_system_refuses_to_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(FolderError, match=r"status\.json cannot be read .*Is a directory"):
        _ = RunRecord(tmp_path).status


def test_record_keeps_what_it_has_read(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "running", "step": 3}')
    assert record.status["step"] == 3
    (tmp_path / "status.json").write_text('{"state": "running", "step": 4}')
    assert record.status["step"] == 3 and RunRecord(tmp_path).status["step"] == 4


def test_name_is_the_run_name_unless_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {name: x}\noptim: {lr: 0.5}\n")
    assert RunRecord(tmp_path).name == "x" and RunRecord(tmp_path, "runs/x").name == "runs/x"
    assert RunRecord(tmp_path).settings == {"run.name": "x", "optim.lr": 0.5}


def test_summary_of_an_earlier_end_is_not_current(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"steps": 5}')
    for step, summary in ((5, {"steps": 5}), (6, {})):
        (tmp_path / "status.json").write_text(json.dumps({"step": step}))
        assert RunRecord(tmp_path).current_summary == summary


def test_row_that_a_kill_has_cut_off_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"split": "train", "step": 1, "epoch": 0.5, "loss": 2.0, "lr": null}\n'
        '{"split": "test", "step": 1, "epoch": 0.5, "accuracy": 0.5}\n'
        '{"split": "train", "st'
    )
    record = RunRecord(tmp_path)
    assert len(record.rows) == 2 and record.last_train_row["loss"] == 2.0 and record.last_test_row["accuracy"] == 0.5
    assert record.points("train", "loss") == [(0.5, 2.0)] and record.points("train", "lr") == []
    assert record.metric_names == {"train/epoch", "train/loss", "train/lr", "test/epoch", "test/accuracy"}


def test_long_metrics_file_keeps_some_train_rows_and_all_others(tmp_path: Path) -> None:
    train, test = (json.dumps({"split": split, "step": 1, "text": 60 * "x"}) + "\n" for split in ("train", "test"))
    (tmp_path / "metrics.jsonl").write_text(100_000 * train + 5 * test)
    splits = [row["split"] for row in RunRecord(tmp_path).rows]
    assert splits.count("test") == 5 and 20_000 < splits.count("train") < 60_000


def test_restarts_are_the_sessions_after_the_first(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(SESSION | {"step": step}) + "\n" for step in (0, 4, 7)))
    record = RunRecord(tmp_path)
    assert record.restarts == 2 and record.last_session["step"] == 7


def test_submitted_job_is_read_from_job_json(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"job_id": "5", "array_task": 3, "log": "logs/5_3.log", "attempts": 2}')
    record = RunRecord(tmp_path)
    assert record.job == record.submitted_job == Job("5", 3, "logs/5_3.log") and str(record.job) == "5_3"
    assert record.job_file["attempts"] == 2


def test_offline_wandb_sessions_exclude_uploaded_ones(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        (tmp_path / "wandb" / f"offline-run-{number}").mkdir(parents=True)
    (tmp_path / "wandb" / "offline-run-1" / "run-abc.wandb.synced").touch()
    (tmp_path / "wandb" / "run-id").write_text("abc\n")
    (tmp_path / "config.yaml").write_text("log: {project: p}\n")
    record = RunRecord(tmp_path)
    assert record.wandb_id == "abc" and record.wandb_project == "p"
    assert [folder.name for folder in record.offline_wandb_sessions] == ["offline-run-2", "offline-run-3"]


def test_modified_at_is_the_newest_change(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    assert RunRecord(tmp_path).modified_at == modified_at(tmp_path / "job.json") > 0


def test_best_is_the_first_evaluation_with_the_highest_accuracy_on_the_validation_part(tmp_path: Path) -> None:
    rows = [("test", 1, 0.9), ("test", 2, 0.95), ("test", 3, 0.95)]
    lines = [json.dumps({"split": split, "step": step, "epoch": step / 2, "accuracy": a}) for split, step, a in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert RunRecord(tmp_path).best == BestEvaluation(2, 1.0, 0.95, "test")
    assert RunRecord(tmp_path).last_validation_row == {}
    lines.insert(1, json.dumps({"split": "validation", "step": 1, "epoch": 0.5, "accuracy": 0.5}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert RunRecord(tmp_path).best == BestEvaluation(1, 0.5, 0.5, "validation")
    assert RunRecord(tmp_path).last_validation_row["accuracy"] == 0.5


def test_lines_that_are_no_rows_are_skipped_and_named(tmp_path: Path) -> None:
    good = '{"split": "train", "step": 1, "epoch": 0.5, "loss": 2.0}'
    bad = ['{"split": "train", "step": "2"}', "<<<<<<< HEAD", "\0\0\0", '{"step": 1}', "[1]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join([bad[0], good, *bad]) + "\n")
    record = RunRecord(tmp_path)
    assert len(record.rows) == 1 and record.points("train", "loss") == [(0.5, 2.0)]
    (problem,) = record.problems
    assert problem.startswith(f"{tmp_path / 'metrics.jsonl'}: 6 lines are skipped (expected a whole number as step")
    record = RunRecord(tmp_path)
    assert record.last_train_row["step"] == 1 and "1 line is skipped" in record.problems[0]


def test_damaged_bytes_make_one_line_unreadable(tmp_path: Path) -> None:
    good = b'{"split": "train", "step": 1, "epoch": 0.5, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"split": "test", \xff\xfe\n' + good)
    assert len(RunRecord(tmp_path).rows) == 2 and RunRecord(tmp_path).last_train_row["loss"] == 2.0


def test_values_too_large_to_draw_are_left_out_of_curves(tmp_path: Path) -> None:
    rows = [{"split": "train", "step": 1, "epoch": 0.5, "loss": loss} for loss in (1e300, 2.0, None)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert RunRecord(tmp_path).points("train", "loss") == [(0.5, 2.0)]
