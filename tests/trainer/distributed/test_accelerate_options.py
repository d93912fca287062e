"""Tests what becomes of the options of `accelerate launch`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import ACCELERATE, MAIN, SMALL, CommandResult

from trainer.config.schema import TrainSettings
from trainer.distributed.accelerate_options import read_accelerate_options
from trainer.distributed.device import resolve_precision
from trainer.errors import WorldError


def test_without_accelerate_no_option_is_set() -> None:
    options = read_accelerate_options(TrainSettings())
    assert (options.precision, options.use_cpu, options.ignored) == (None, False, ())


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", r"FSDP \(--use_fsdp\)"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism"),
    ],
)
def test_other_ways_to_train_are_refused(variable: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(WorldError, match=f"{message}.*data parallelism"):
        read_accelerate_options(TrainSettings())
    monkeypatch.setenv(variable, "false")
    read_accelerate_options(TrainSettings())


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8", "expected no, bf16 or fp16"),
        ("ACCELERATE_USE_CPU", "perhaps", "expected true or false"),
    ],
)
def test_unknown_values_are_refused(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(WorldError, match=message):
        read_accelerate_options(TrainSettings())


def test_options_that_equal_the_settings_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    options = read_accelerate_options(TrainSettings(precision="bf16", compile=True))
    assert options.ignored == ()


def test_fp16_of_accelerate_on_a_cpu_is_refused_by_its_name() -> None:
    with pytest.raises(WorldError, match="accelerate launch --mixed_precision fp16: a CPU has no fp16 training"):
        resolve_precision("auto", on_gpu=False, launcher_precision="fp16")


@pytest.mark.slow
def test_accelerate_launch_options_are_obeyed_or_named(launch: Callable[..., CommandResult]) -> None:
    settings = [word for word in SMALL if not word.startswith("train.precision")]
    options = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "4", "--num_processes", "1", "--cpu"]
    result = launch([*ACCELERATE, *options, MAIN, *settings, "train.max_steps=2"])
    assert result.code == 0, result.err
    assert json.loads(Path("runs/digits/environment.json").read_text())["precision"] == "bf16"
    assert "--gradient_accumulation_steps '4' is ignored" in result.err
