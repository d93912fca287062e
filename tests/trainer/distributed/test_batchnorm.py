"""BatchNorm on several plain ranks: each sees its slices, and none of what they saw is lost."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks


def test_batchnorm_statistics_are_those_of_all_ranks(ranks: Ranks) -> None:
    # At a learning rate that moves nothing, equal slices give the mean of their means: that of the whole batch.
    for size in (1, 2):
        ranks.run(size, *SMALL, "optim.lr=1e-20", "train.max_steps=3", "run.root=runs", f"run.name=on-{size}")
    one, two = (load_file(f"runs/on-{size}/model.safetensors") for size in (1, 2))
    torch.testing.assert_close(two["1.running_mean"], one["1.running_mean"], rtol=1e-5, atol=1e-6)
    assert (one["1.running_mean"] != 0).all() and two["1.num_batches_tracked"] == 3
    summaries = [json.loads(Path(f"runs/on-{size}/summary.json").read_text()) for size in (1, 2)]
    assert summaries[0]["test"]["confusion"] == summaries[1]["test"]["confusion"]
