"""BatchNorm statistics on several ranks without virtual ranks: each rank sees its slice, and all slices count."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from support.processes import SMALL, Ranks


def test_batchnorm_statistics_are_averaged_over_ranks(ranks: Ranks) -> None:
    # At a learning rate that changes no weight, the mean of equal slices' means is the mean of the whole batch.
    for size in (1, 2):
        ranks.run(size, *SMALL, "optim.lr=1e-20", "train.max_steps=3", "run.root=runs", f"run.name=on-{size}")
    on_1, on_2 = (load_file(f"runs/on-{size}/model.safetensors") for size in (1, 2))
    torch.testing.assert_close(on_2["1.running_mean"], on_1["1.running_mean"], rtol=1e-5, atol=1e-6)
    assert (on_1["1.running_mean"] != 0).all() and on_2["1.num_batches_tracked"] == 3
    summaries = [json.loads(Path(f"runs/on-{size}/summary.json").read_text()) for size in (1, 2)]
    assert summaries[0]["test"]["confusion"] == summaries[1]["test"]["confusion"]
