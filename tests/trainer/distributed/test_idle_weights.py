"""Weights that take no part in the loss of a step: left alone, momentum and decay too, on any number of ranks."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks

from launch.verify.compare import compare

SAME = [*SMALL, "run.root=runs", "train.threads_per_rank=1", "log.every_steps=1", "data.augment=[flip,crop]"]
# Of an epoch's last batch a third rank has no sample. Decay and momentum would move what has a gradient of zero.
CURVE = [*SAME, "data.global_batch_size=53", "train.max_steps=60", "optim.lr=0.02", "optim.weight_decay=0.1"]


def test_they_are_left_alone_on_any_number_of_ranks(ranks: Ranks) -> None:
    runs = Path("runs")
    ranks.run(1, *CURVE, "run.name=plain", plant="idle")
    for size in (1, 2, 3):
        ranks.run(size, *CURVE, f"run.name=idle-{size}", "train.virtual_ranks=3", plant="idle")
    assert Path("bright").exists() and Path("dim").exists()
    alone = load_file(runs / "plain" / "model.safetensors")
    found = load_file(runs / "idle-1" / "model.safetensors")
    assert torch.equal(found["idle.weight"], alone["idle.weight"])
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, alone[key], rtol=1e-2, atol=1e-3)
    for name in ("idle-2", "idle-3"):
        assert not compare(runs / "idle-1", runs / name)


def test_a_step_by_ddp_that_lacks_a_gradient_is_refused(ranks: Ranks) -> None:
    said = ranks.run(2, *CURVE, "run.name=ddp", plant="idle", code=2)
    (line,) = {line for line in said.splitlines() if "took no part in the loss" in line}
    assert "idle.weight, idle.bias" in line and "train.virtual_ranks=2" in line
