"""The same curve on 1, 2 and 3 real ranks: processes of one machine, each with a time limit."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, Done, Ranks, free_port, torchrun

MULTI_CPU = ["--config_file", str(REPOSITORY / "launch" / "accelerate" / "multi_cpu.yaml")]
# An odd batch size that neither 2 nor 3 divide, and an epoch whose last batch has 2 samples: fewer than 3 ranks.
CURVE = [*SMALL, "data.global_batch_size=53", "train.max_steps=100", "log.every_steps=1", "eval.batch_size=100"]
# Where training itself is on the brink, it multiplies what differs in rounding: a rate at which it is not.
CURVE += ["data.augment=[flip,crop,cutout]", "run.root=runs", "optim.lr=0.02"]


def result(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    folder = Path("runs") / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"], json.loads((folder / "summary.json").read_text())


def test_the_curve_is_the_same_on_any_number_of_ranks(launch: Callable[..., Done]) -> None:
    commands = {
        "alone": [sys.executable, MAIN],
        "torchrun-2": torchrun(2, MAIN),
        "accelerate-3": [
            *ACCELERATE,
            *MULTI_CPU,
            "--num_processes",
            "3",
            "--main_process_port",
            str(free_port()),
            MAIN,
        ],
    }
    for name, command in commands.items():
        done = launch([*command, *CURVE, f"run.name={name}"])
        assert done.code == 0, done.err
        assert done.out.count("test set, by class") == 1  # rank 0 alone speaks
    rows, summary = result("alone")
    assert [row["step"] for row in rows] == list(range(1, 101))
    assert rows[27]["samples"] - rows[26]["samples"] == 1433 % 53 == 2
    weights = load_file("runs/alone/model.safetensors")
    for name, size in (("torchrun-2", 2), ("accelerate-3", 3)):
        others, other = result(name)
        assert other["world_size"] == size
        for row, same in zip(rows, others, strict=True):
            near = 1e-5
            assert same["loss"] == pytest.approx(row["loss"], rel=near), (name, row["step"])
            assert same["lr"] == row["lr"] and same["samples"] == row["samples"]  # once a step, not once a rank
        assert other["test"]["accuracy"] == pytest.approx(summary["test"]["accuracy"], abs=1.5 / 364)
        assert other["test"]["num_samples"] == 364
        assert other["test"]["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-3)
        for key, tensor in load_file(f"runs/{name}/model.safetensors").items():
            torch.testing.assert_close(tensor, weights[key], rtol=1e-2, atol=1e-3)


def test_the_curve_is_the_same_on_ranks_that_share_no_memory(ranks: Ranks) -> None:
    """As on GPUs and on several machines: through DDP, one of whose ranks has no sample of the epoch's last batch."""
    ranks.run(1, *CURVE, "run.name=alone", plant="")
    ranks.run(3, *CURVE, "run.name=apart", plant="")
    (rows, _), (others, other) = result("alone"), result("apart")
    assert other["world_size"] == 3 and len(rows) == len(others) == 100
    for row, same in zip(rows, others, strict=True):
        for name in ("loss", "grad_norm"):
            assert same[name] == pytest.approx(row[name], rel=1e-5 if name == "loss" else 1e-3), row["step"]
