"""Weights that do not influence the loss of a step get no update, not even momentum or decay, on any world size."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks

from launch.verify.compare import compare_runs

# The last batch of an epoch has 2 samples, so a third rank has none. Decay and momentum would change a weight whose
# gradient is zero instead of None.
SETTINGS = [
    *SMALL, "run.root=runs", "train.threads_per_rank=1", "log.every_steps=1", "data.augment=[flip,crop]",
    "data.global_batch_size=53", "train.max_steps=60", "optim.lr=0.02", "optim.weight_decay=0.1",
]  # fmt: skip


def test_idle_weights_are_not_updated_on_any_number_of_ranks(ranks: Ranks) -> None:
    runs = Path("runs")
    ranks.run(1, *SETTINGS, "run.name=plain", fault="idle_weights")
    for size in (1, 2, 3):
        ranks.run(size, *SETTINGS, f"run.name=virtual-{size}", "train.virtual_ranks=3", fault="idle_weights")
    assert Path("bright").exists() and Path("dim").exists()
    plain = load_file(runs / "plain" / "model.safetensors")
    virtual = load_file(runs / "virtual-1" / "model.safetensors")
    assert torch.equal(virtual["idle.weight"], plain["idle.weight"])
    for key, tensor in virtual.items():
        torch.testing.assert_close(tensor, plain[key], rtol=1e-2, atol=1e-3)
    for name in ("virtual-2", "virtual-3"):
        assert not compare_runs(runs / "virtual-1", runs / name)


@pytest.mark.slow
def test_ddp_step_with_a_missing_gradient_is_refused(ranks: Ranks) -> None:
    output = ranks.run(2, *SETTINGS, "run.name=ddp", fault="idle_weights", code=2)
    (line,) = {line for line in output.splitlines() if "the loss does not depend on" in line}
    assert "idle.weight, idle.bias" in line and "train.virtual_ranks=2" in line
