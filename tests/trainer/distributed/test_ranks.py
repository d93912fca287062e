"""DDP on 1, 2 and 3 real ranks, under real launchers: the same training curve."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, CommandResult, Ranks, free_port, torchrun

MULTI_CPU = ["--config_file", str(REPOSITORY / "launch" / "accelerate" / "multi_cpu.yaml")]
# Neither 2 nor 3 ranks divide 53. The last batch of an epoch has 2 samples, so one of 3 ranks has none. At a higher
# learning rate training is unstable and amplifies rounding differences.
SETTINGS = [
    *SMALL, "data.global_batch_size=53", "train.max_steps=100", "log.every_steps=1", "eval.batch_size=100",
    "data.augment=[flip,crop,cutout]", "run.root=runs", "optim.lr=0.02",
]  # fmt: skip


def read_run(name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns a run's training rows and its summary."""
    folder = Path("runs") / name
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"], json.loads((folder / "summary.json").read_text())


def test_training_curve_is_the_same_on_any_number_of_ranks(launch: Callable[..., CommandResult]) -> None:
    accelerate = [*ACCELERATE, *MULTI_CPU, "--num_processes", "3", "--main_process_port", str(free_port()), MAIN]
    commands = {"python-1": [sys.executable, MAIN], "torchrun-2": torchrun(2, MAIN), "accelerate-3": accelerate}
    for name, command in commands.items():
        result = launch([*command, *SETTINGS, f"run.name={name}"])
        assert result.code == 0, result.err
        assert result.out.count("test set, by class") == 1  # only rank 0 prints
    expected_rows, expected_summary = read_run("python-1")
    assert [row["step"] for row in expected_rows] == list(range(1, 101))
    assert expected_rows[27]["samples"] - expected_rows[26]["samples"] == 1433 % 53 == 2
    expected_weights = load_file("runs/python-1/model.safetensors")
    for name, size in (("torchrun-2", 2), ("accelerate-3", 3)):
        rows, summary = read_run(name)
        assert summary["world_size"] == size
        for row, expected in zip(rows, expected_rows, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), (name, row["step"])
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3), (name, row["step"])
            # The schedule advances once per step, not once per rank.
            assert row["lr"] == expected["lr"] and row["samples"] == expected["samples"]
        assert summary["test"]["accuracy"] == pytest.approx(expected_summary["test"]["accuracy"], abs=1.5 / 364)
        assert summary["test"]["num_samples"] == 364
        assert summary["test"]["loss"] == pytest.approx(expected_summary["test"]["loss"], rel=1e-3)
        for key, tensor in load_file(f"runs/{name}/model.safetensors").items():
            torch.testing.assert_close(tensor, expected_weights[key], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_paths_may_differ_between_machines_and_other_settings_may_not(ranks: Ranks) -> None:
    Path("paths.yaml").write_text("data: {root: '${oc.env:RANK}'}")
    Path("names.yaml").write_text("run: {name: 'rank-${oc.env:RANK}'}")
    settings = [*SMALL, "train.max_steps=2", "run.root=runs"]
    ranks.run(2, *settings, "--config", "paths.yaml", "run.name=paths")
    output = ranks.run(2, *settings, "--config", "names.yaml", code=2)
    assert "rank 1 differs from rank 0 in its settings" in output
