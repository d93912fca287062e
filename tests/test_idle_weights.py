"""Weights that take no part in the loss of a step: left alone, momentum and decay too, on any number of ranks."""

from pathlib import Path

import torch
from conftest import SMALL, Ranks
from safetensors.torch import load_file

from trainer.compare import compare

SAME = [*SMALL, "run.root=runs", "train.threads_per_rank=1", "log.every_steps=1", "data.augment=[flip,crop]"]
# Of an epoch's last batch a third rank has no sample. Decay and momentum would move what has a gradient of zero.
CURVE = [*SAME, "data.global_batch_size=53", "train.max_steps=60", "optim.lr=0.02", "optim.weight_decay=0.1"]


def test_they_are_left_alone_on_any_number_of_ranks(ranks: Ranks) -> None:
    runs = Path("runs")
    for size in (1, 2, 3):
        ranks.run(size, *CURVE, f"run.name=plain-{size}", plant="idle")
        for plant in ("idle", "idle_apart"):
            ranks.run(size, *CURVE, f"run.name={plant}-{size}", "train.virtual_ranks=3", plant=plant)
    alone = load_file(runs / "plain-1" / "model.safetensors")
    for size in (2, 3):
        for plant in ("idle", "idle_apart"):
            assert not compare(runs / "idle-1", runs / f"{plant}-{size}")
        found = load_file(runs / f"plain-{size}" / "model.safetensors")
        assert torch.equal(found["idle.weight"], alone["idle.weight"])
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-2, atol=1e-3)


def test_ddp_that_wants_all_is_not_begun_with(ranks: Ranks) -> None:
    said = ranks.run(2, *CURVE, "run.name=ddp", plant="idle_apart", code=2)
    (line,) = {line for line in said.splitlines() if "took no part in the loss" in line}
    assert "idle.weight, idle.bias" in line and "train.virtual_ranks=2" in line
