"""BatchNorm on several ranks: each sees its slices, and none of what they saw is lost."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import SMALL, Done, torchrun
from safetensors.torch import load_file


def test_batchnorm_statistics_are_those_of_all_ranks(launch: Callable[..., Done]) -> None:
    # At a learning rate that moves nothing, equal slices give the mean of their means: that of the whole batch.
    worker = str(Path(__file__).parent / "workers" / "tiny.py")
    settings = [*SMALL, "optim.lr=1e-20", "train.max_steps=3", "run.root=runs"]
    for name, command in (("one", [sys.executable, worker]), ("two", torchrun(2, worker))):
        done = launch([*command, *settings, f"run.name={name}"])
        assert done.code == 0, done.err
    one, two = (load_file(f"runs/{name}/model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(two["1.running_mean"], one["1.running_mean"], rtol=1e-5, atol=1e-6)
    assert (one["1.running_mean"] != 0).all() and two["1.num_batches_tracked"] == 3
    summaries = [json.loads(Path(f"runs/{name}/summary.json").read_text()) for name in ("one", "two")]
    assert summaries[0]["test"]["confusion"] == summaries[1]["test"]["confusion"]
