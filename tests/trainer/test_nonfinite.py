"""Losses and gradients that are not finite: all ranks skip the step, and train.max_bad_steps limits their number."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks

from launch.verify.compare import read_rows
from trainer.data.sampler import BatchSampler
from trainer.nonfinite import SkippedSteps
from trainer.run import checkpoint
from trainer.step import ShardResult, StepOutcome

RUN = [*SMALL, "run.root=runs", "log.every_steps=1", "train.max_steps=60", "train.threads_per_rank=1"]


def bad_steps(run: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path("runs") / run / "bad_steps.jsonl").read_text().splitlines()]


def steps_with_sample_7(num_steps: int) -> list[int]:
    """Returns the steps in which the faults "nan_image" and "infinite_loss" take effect."""
    batches = BatchSampler(1433, 64, seed=0)
    return [step for step in range(num_steps) if 7 in batches.sample_ids(step)]


@pytest.mark.parametrize("settings", [[], ["train.virtual_ranks=3"]], ids=["ddp", "virtual_ranks"])
def test_nan_image_skips_only_its_steps_on_any_number_of_ranks(ranks: Ranks, settings: list[str]) -> None:
    for size in (1, 2):
        output = ranks.run(size, *RUN, *settings, f"run.name=on-{size}", fault="nan_image")
        assert "skipped, 3 of at most 3" in output
    expected_steps = steps_with_sample_7(60)
    assert len(expected_steps) == 3
    for run in ("on-1", "on-2"):
        rows = bad_steps(run)
        assert [row["step"] for row in rows] == expected_steps
        sample_ids = BatchSampler(1433, 64, seed=0).sample_ids(expected_steps[0]).tolist()
        assert rows[0]["ids"] == sample_ids and rows[0]["loss_sum"] is None
        losses = [row["loss"] for row in read_rows(Path("runs") / run) if row["split"] == "train"]
        assert [step for step, loss in enumerate(losses) if loss is None] == expected_steps
        weights = load_file(Path("runs") / run / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())  # BatchNorm's statistics too
    if settings:
        assert read_rows(Path("runs/on-1")) == read_rows(Path("runs/on-2"))


@pytest.mark.parametrize("setting", ["train.virtual_ranks=null", "train.virtual_ranks=3", "train.clip_grad_norm=1.0"])
def test_infinite_loss_on_one_rank_skips_the_step_on_all_ranks(ranks: Ranks, setting: str) -> None:
    for size in (1, 2):
        ranks.run(size, *RUN, setting, "train.max_steps=25", f"run.name=on-{size}", fault="infinite_loss")
    expected_steps = steps_with_sample_7(25)
    assert expected_steps
    for run in ("on-1", "on-2"):
        assert [row["step"] for row in bad_steps(run)] == expected_steps


def test_nan_image_skips_the_step_on_a_rank_without_a_shard(ranks: Ranks) -> None:
    # 1,433 samples in batches of 358: the last batch of an epoch is one sample, so one rank has no shard.
    settings = [*RUN, "data.global_batch_size=358", "train.virtual_ranks=2", "train.max_steps=10", "data.shuffle=false"]
    for size in (1, 2):
        ranks.run(size, *settings, f"run.name=on-{size}", fault="nan_last_image")
        assert [row["step"] for row in bad_steps(f"on-{size}")] == [4, 9]
    assert read_rows(Path("runs/on-1")) == read_rows(Path("runs/on-2"))


def test_step_over_the_limit_ends_the_run_with_a_checkpoint_from_before_the_step(ranks: Ranks) -> None:
    output = ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=1", fault="nan_image", code=2)
    second = bad_steps("x")[1]["step"]
    (line,) = [line for line in output.splitlines() if line.startswith("samecurve: ")]
    assert f"step {second}: loss or gradient was not finite" in line and "raise train.max_bad_steps" in line
    status = json.loads(Path("runs/x/status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["reason"]
    newest, _ = checkpoint.find_newest_valid(Path("runs/x/checkpoints"))
    assert newest is not None and newest.name == f"step-{second:08}"


def test_run_over_the_limit_continues_only_with_a_higher_limit(ranks: Ranks) -> None:
    ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=1", fault="nan_image", code=2)
    output = ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=0", fault="nan_image", code=2)
    assert "more than train.max_bad_steps=0. Raise it" in output
    ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=1", fault="nan_image", code=2)  # fails at the same step
    ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=3", fault="nan_image")
    ranks.run(1, *RUN, "run.name=whole", "train.max_bad_steps=3", fault="nan_image")
    assert bad_steps("x") == bad_steps("whole")
    assert read_rows(Path("runs/x")) == read_rows(Path("runs/whole"))


def test_diverging_run_ends_with_advice(ranks: Ranks) -> None:
    output = ranks.run(1, *RUN, "run.name=x", "optim.lr=1e30", "schedule.warmup_epochs=0", fault="", code=2)
    assert "Lower optim.lr" in output and "NaN" not in Path("runs/x/metrics.jsonl").read_text()


def test_skipped_steps_are_reported_after_the_lag_and_all_at_the_end() -> None:
    skipped = SkippedSteps(torch.device("cpu"))
    for step in range(12):
        result = ShardResult(torch.tensor(step + 0.5), torch.zeros(1, 2), torch.zeros(1), 1.0)
        skipped.add(step, StepOutcome([result], torch.tensor(float(step in (2, 9)))))
        reported = [(number, float(outcome.loss_sum())) for number, outcome in skipped.pop_skipped(lag_steps=8)]
        assert reported == ([(2, 2.5)] if step == 10 else [])
    assert [number for number, _ in skipped.pop_skipped()] == [9] and not list(skipped.pop_skipped())


def test_steps_reported_with_a_lag_give_the_same_files_and_count_towards_the_limit(ranks: Ranks) -> None:
    settings = [*RUN, "log.every_steps=40"]
    ranks.run(2, *settings, "run.name=no-lag", fault="nan_image")
    ranks.run(2, *settings, "run.name=lag", fault="nan_image_reported_late")
    assert bad_steps("lag") == bad_steps("no-lag")
    assert read_rows(Path("runs/lag")) == read_rows(Path("runs/no-lag"))
    output = ranks.run(1, *settings, "run.name=ended", "train.max_bad_steps=0", fault="nan_image_reported_late", code=2)
    assert "after 0 skipped steps" in output and "not finite" in output
    newest, _ = checkpoint.find_newest_valid(Path("runs/ended/checkpoints"))
    assert newest is not None and checkpoint.load(newest).progress.bad_steps == 1
