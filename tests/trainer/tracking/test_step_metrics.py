"""Tests metrics of training rows that real ranks measure: shares of the time, and the norm of the gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks

from launch.verify.compare import read_rows
from trainer.config.schema import DataSettings, ModelSettings
from trainer.data import digits
from trainer.data.sampler import BatchSampler
from trainer.models.lookup import build_model

RUN = [*SMALL, "train.threads_per_rank=1", "log.every_steps=3", "train.max_steps=8"]


def train_rows(run: str) -> list[dict[str, Any]]:
    text = (Path("runs") / run / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["split"] == "train"]


def grad_norms(run: str) -> list[float | None]:
    return [row["grad_norm"] for row in train_rows(run)]


@pytest.mark.slow
def test_time_shares_measure_waits_for_data_and_for_other_ranks(ranks: Ranks) -> None:
    for virtual_ranks in ("null", "2"):
        settings = [*RUN, f"train.virtual_ranks={virtual_ranks}"]
        for world_size, fault in ((1, "tiny"), (2, "tiny"), (2, "late"), (1, "slow_data")):
            run = f"{world_size}-{fault}-{virtual_ranks}"
            ranks.run(world_size, *settings, f"run.name={run}", fault=fault)
            data_seconds, communication_seconds = [], []
            for row, steps in zip(train_rows(run), (3, 3, 2), strict=True):
                assert 0 < row["data_wait_share"] < 1 and 0 <= row["communication_share"] < 1
                assert "gpu_memory_bytes" not in row
                seconds = 64 * steps / row["samples_per_second"]
                data_seconds.append(row["data_wait_share"] * seconds)
                communication_seconds.append(row["communication_share"] * seconds)
            # All batches arrive in one chunk, before the first step.
            assert (data_seconds[0] >= 2.5) == (fault == "slow_data") and max(data_seconds[1:]) < 2.5
            assert min(communication_seconds) > 0 if world_size == 2 else max(communication_seconds) == 0
            if fault == "late":  # rank 0 waits for the gradients of rank 1, which sleeps for 1.2 s in total
                assert sum(communication_seconds) > 0.3


def reference_gradient(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Computes LeNet's gradient of the mean loss over some digits, without the trainer's step."""
    net = build_model(ModelSettings(name="lenet"), 10, 1, 32)
    net.load_state_dict(weights)
    train = digits.load(DataSettings(name="digits")).train
    images = (torch.from_numpy(train.images)[ids].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    torch.nn.functional.cross_entropy(net(images), torch.from_numpy(train.labels)[ids]).backward()
    return torch.cat([weight.grad.flatten() for weight in net.parameters() if weight.grad is not None])


def test_grad_norm_is_the_norm_of_the_mean_gradient_before_clipping(ranks: Ranks) -> None:
    plain = [*RUN, "log.every_steps=1", "train.max_steps=4", "data.augment=[]", "data.normalize=half"]
    plain += ["optim.weight_decay=0.1", "data.global_batch_size=53", "checkpoint.every_steps=1"]
    ranks.run(1, *plain, "run.name=one-rank", "checkpoint.keep=9", fault="")
    sampler = BatchSampler(1433, 53, seed=0)
    for step in (1, 2, 3):
        weights = load_file(Path("runs/one-rank/checkpoints") / f"step-{step:08}" / "model.safetensors")
        expected = float(reference_gradient(weights, sampler.sample_ids(step)).norm())
        assert grad_norms("one-rank")[step] == pytest.approx(expected, rel=1e-4)
    ranks.run(2, *plain, "run.name=two-ranks", fault="")
    ranks.run(1, *plain, "run.name=clipped", "train.clip_grad_norm=0.001", fault="")
    first_norm = grad_norms("one-rank")[0]
    assert first_norm is not None and first_norm > 0.01, "clipping has an effect"
    assert grad_norms("two-ranks")[0] == pytest.approx(first_norm, rel=1e-4)
    assert grad_norms("clipped")[0] == pytest.approx(first_norm, rel=1e-6)
    ranks.run(1, *plain, "log.every_steps=3", "train.clip_grad_norm=0.001", "run.name=every-third-step", fault="")
    assert grad_norms("every-third-step") == grad_norms("clipped")[2:], "a row has the norm of its last step"
    for world_size in (1, 2):
        ranks.run(world_size, *plain, f"run.name=virtual-{world_size}", "train.virtual_ranks=3", fault="")
    assert grad_norms("virtual-1") == grad_norms("virtual-2")
    assert grad_norms("virtual-1")[0] == pytest.approx(first_norm, rel=1e-4)
    assert read_rows(Path("runs/virtual-1")) == read_rows(Path("runs/virtual-2"))


@pytest.mark.parametrize("fault", ["nan_image", "infinite_loss"])
def test_skipped_step_has_no_grad_norm(ranks: Ranks, fault: str) -> None:
    sampler = BatchSampler(1433, 64, seed=0)
    bad_steps = [step for step in range(23) if 7 in sampler.sample_ids(step)]
    for virtual_ranks in ("null", "2"):
        settings = ["log.every_steps=1", "train.max_steps=23", f"train.virtual_ranks={virtual_ranks}"]
        ranks.run(1, *RUN, *settings, f"run.name={virtual_ranks}", fault=fault)
        assert [step for step, norm in enumerate(grad_norms(virtual_ranks)) if norm is None] == bad_steps
