"""A loss or a gradient that is not finite: agreed by all ranks, named, skipped so often and no more."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks
from torch import nn

from launch.verify.compare import rows
from trainer.config.schema import OptimSettings
from trainer.data.sampler import BatchSampler
from trainer.distributed.buffers import Buffers
from trainer.nonfinite import SkippedSteps
from trainer.optim.optimizers import build_optimizer, set_learning_rates
from trainer.run import checkpoint
from trainer.step import ShardResult, StepOutcome

RUN = [*SMALL, "run.root=runs", "log.every_steps=1", "train.max_steps=60", "train.threads_per_rank=1"]


def bad_steps(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path("runs") / name / "bad_steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", [[], ["train.virtual_ranks=3"]], ids=["plain", "virtual"])
def test_a_bad_sample_costs_its_batch_alone_on_any_number_of_ranks(ranks: Ranks, mode: list[str]) -> None:
    for size in (1, 2):
        text = ranks.run(size, *RUN, *mode, f"run.name=on-{size}", plant="poisoned")
        assert "skipped, 3 of at most 3" in text
    batches = BatchSampler(1433, 64, seed=0)
    wanted = [step for step in range(60) if 7 in batches.ids(step)]
    assert len(wanted) == 3
    for name in ("on-1", "on-2"):
        found = bad_steps(name)
        assert [row["step"] for row in found] == wanted
        assert found[0]["ids"] == batches.ids(wanted[0]).tolist() and found[0]["loss_sum"] is None
        losses = [row["loss"] for row in rows(Path("runs") / name) if row["split"] == "train"]
        assert [step for step, loss in enumerate(losses) if loss is None] == wanted
        weights = load_file(Path("runs") / name / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())  # BatchNorm's statistics too
    if mode:
        assert rows(Path("runs/on-1")) == rows(Path("runs/on-2"))


@pytest.mark.parametrize("mode", ["train.virtual_ranks=null", "train.virtual_ranks=3", "train.clip_grad_norm=1.0"])
def test_a_loss_that_is_infinite_on_one_rank_alone_is_heard_by_all(ranks: Ranks, mode: str) -> None:
    for size in (1, 2):
        ranks.run(size, *RUN, mode, "train.max_steps=25", f"run.name=on-{size}", plant="infinite_loss")
    batches = BatchSampler(1433, 64, seed=0)
    wanted = [step for step in range(25) if 7 in batches.ids(step)]
    assert wanted and all([row["step"] for row in bad_steps(name)] == wanted for name in ("on-1", "on-2"))


def test_a_rank_without_a_shard_hears_of_a_bad_sample_too(ranks: Ranks) -> None:
    # 1,433 samples in batches of 358: the last one of an epoch is a single sample, and one rank has none of it.
    alone = [*RUN, "data.global_batch_size=358", "train.virtual_ranks=2", "train.max_steps=10", "data.shuffle=false"]
    for size in (1, 2):
        ranks.run(size, *alone, f"run.name=on-{size}", plant="poisoned_last")
        assert [row["step"] for row in bad_steps(f"on-{size}")] == [4, 9]
    assert rows(Path("runs/on-1")) == rows(Path("runs/on-2"))


def test_one_too_many_ends_the_run_with_a_checkpoint_from_before(ranks: Ranks) -> None:
    text = ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=1", plant="poisoned", code=2)
    second = bad_steps("x")[1]["step"]
    (line,) = [line for line in text.splitlines() if line.startswith("samecurve: ")]
    assert f"step {second}: loss or gradient was not finite" in line and "raise train.max_bad_steps" in line
    status = json.loads(Path("runs/x/status.json").read_text())
    assert status["state"] == "failed" and "not finite" in status["reason"]
    place, _ = checkpoint.newest_valid(Path("runs/x/checkpoints"))
    assert place is not None and place.name == f"step-{second:08}"
    text = ranks.run(
        1, *RUN, "run.name=x", "train.max_bad_steps=0", plant="poisoned", code=2
    )  # lowered: still too many
    # It fails again at the same step, and goes on from there when more are allowed: as if it had never stopped.
    ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=1", plant="poisoned", code=2)
    ranks.run(1, *RUN, "run.name=x", "train.max_bad_steps=3", plant="poisoned")
    ranks.run(1, *RUN, "run.name=whole", "train.max_bad_steps=3", plant="poisoned")
    assert bad_steps("x") == bad_steps("whole") and rows(Path("runs/x")) == rows(Path("runs/whole"))


def test_a_recipe_that_diverges_is_told(ranks: Ranks) -> None:
    text = ranks.run(1, *RUN, "run.name=x", "optim.lr=1e30", "schedule.warmup_epochs=0", plant="", code=2)
    assert "Lower optim.lr" in text and "NaN" not in Path("runs/x/metrics.jsonl").read_text()


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_skipped_step_changes_nothing_without_the_host_being_asked(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    settings = OptimSettings(name=name, weight_decay=0.1)  # type: ignore[arg-type]
    made, buffers = build_optimizer(net, settings), Buffers(net)

    def take(bad: float) -> dict[str, torch.Tensor]:
        buffers.begin()
        net(torch.randn(5, 4)).square().sum().backward()
        if bad:
            for weight in net.parameters():
                assert weight.grad is not None
                weight.grad.fill_(torch.nan)
        set_learning_rates(made, settings, 0.7)
        made.found_inf = torch.tensor(bad)  # type: ignore[attr-defined]
        made.step()
        buffers.rewind(where=torch.tensor(bad))
        made.zero_grad()
        state = {f"{n}.{key}": value for n, entry in made.state_dict()["state"].items() for key, value in entry.items()}
        return {key: value.clone() for key, value in (net.state_dict() | state).items()}

    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert all(torch.equal(value, take(1.0)[key]) for key, value in before.items())  # the first step too
    good = take(0.0)
    assert not torch.equal(good["0.weight"], before["0.weight"])
    bad = take(1.0)
    assert all(torch.equal(value, bad[key]) for key, value in good.items())
    assert torch.isfinite(take(0.0)["0.weight"]).all()


def test_a_gpu_is_heard_some_steps_later_and_wholly_at_the_end() -> None:
    skipped = SkippedSteps(torch.device("cpu"))
    for step in range(12):
        result = ShardResult(torch.tensor(step + 0.5), torch.zeros(1, 2), torch.zeros(1), 1.0)
        skipped.add(step, StepOutcome([result], torch.tensor(float(step in (2, 9)))))
        heard = [(number, float(outcome.loss_sum())) for number, outcome in skipped.heard(lag_steps=8)]
        assert heard == ([(2, 2.5)] if step == 10 else [])
    assert [number for number, _ in skipped.heard()] == [9] and not list(skipped.heard())


def test_steps_that_are_heard_of_late_are_counted_and_the_run_so_far_is_kept(
    ranks: Ranks,
) -> None:
    seldom = [*RUN, "log.every_steps=40"]
    ranks.run(2, *seldom, "run.name=at-once", plant="poisoned")
    ranks.run(2, *seldom, "run.name=late", plant="poisoned_late")
    assert bad_steps("late") == bad_steps("at-once")
    assert rows(Path("runs/late")) == rows(Path("runs/at-once"))
    text = ranks.run(1, *seldom, "run.name=ended", "train.max_bad_steps=0", plant="poisoned_late", code=2)
    assert "after 0 steps skipped" in text and "not finite" in text
    place, _ = checkpoint.newest_valid(Path("runs/ended/checkpoints"))
    assert place is not None and checkpoint.load(place).progress.bad_steps == 1


def test_an_overflow_of_fp16_is_not_that_but_a_loss_without_a_number_is() -> None:
    # fp16 is refused on a CPU; its loss scale works there all the same.
    from accelerate import Accelerator

    from trainer.step import Step

    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    accelerator.scaler.scale(torch.zeros(1))  # its state is made at first use
    step = Step.__new__(Step)
    step._accelerator, step._clip_grad_norm, step._world_size = accelerator, None, 1
    step._optimizer = accelerator.prepare_optimizer(build_optimizer(net, OptimSettings(lr=0.1, momentum=0.0)))
    step._parameters, step._buffers = list(net.parameters()), Buffers(net)
    step._unscaled, step._gradient_must_tell = torch.ones(()), False

    def update(result: ShardResult) -> tuple[bool, float]:
        """Whether the step was skipped, and the norm of its gradient."""
        is_bad, norm = step._look_at_gradient([result], is_looked_at=True)
        assert norm is not None
        return bool(step._update([result], is_bad)), float(norm)

    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images = torch.tensor([[torch.inf, 1.0], [2.0, 1.0]])
    for scale, loss, expected, scale_after in (
        (65536.0, 1.0, True, 32768.0),  # an overflow: skipped by the scaler, which lowers the scale
        (65536.0, torch.nan, False, 65536.0),  # the loss itself
        (1.0, 1.0, False, 1.0),  # no scale is left to lower
    ):
        accelerator.scaler.update(scale)
        step._buffers.begin()
        accelerator.backward(net(images).sum())
        result = ShardResult(torch.tensor(loss), torch.zeros(2, 2), torch.zeros(2), 1.0)
        skipped, norm = update(result)
        assert skipped is not expected and not math.isfinite(norm)
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        assert accelerator.scaler.get_scale() == scale_after
        step._optimizer.zero_grad()
    # A step that is taken is taken by the true gradient, not by the scaled one.
    accelerator.scaler.update(1024.0)
    accelerator.backward(net(images.nan_to_num(posinf=3.0))[:, 0].sum())
    scaled = [weight.grad.clone() for weight in net.parameters() if weight.grad is not None]
    old = [weight.detach().clone() for weight in net.parameters()]
    skipped, norm = update(ShardResult(torch.tensor(1.0), torch.zeros(2, 2), torch.zeros(2), 1.0))
    wanted = torch.cat([gradient.flatten() for gradient in scaled]).norm() / 1024
    assert not skipped and norm == pytest.approx(float(wanted))
    for weight, before_it, gradient in zip(net.parameters(), old, scaled, strict=True):
        torch.testing.assert_close(weight.detach(), before_it - 0.1 * gradient / 1024)
