"""Two run folders in, what differs between the runs out: weights, optimizer state, metrics, TensorBoard curves."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trainer import checkpoint

# What the clock says is no part of a run's result.
_OF_THE_CLOCK = ("seconds", "samples_per_second")


@dataclass(frozen=True, slots=True)
class Difference:
    """Nothing differs when every text is empty."""

    weights: str
    optimizer: str
    metrics: str
    curves: str

    def __bool__(self) -> bool:
        return any((self.weights, self.optimizer, self.metrics, self.curves))


def compare(one: Path, other: Path) -> Difference:
    """Both folders hold finished runs."""
    places = [checkpoint.found(path / "checkpoints")[0] for path in (one, other)]
    return Difference(
        weights=_tensors(one / "model.safetensors", other / "model.safetensors"),
        optimizer=_tensors(*(place / "optimizer.safetensors" for place in places)),
        metrics=_rows(rows(one), rows(other)),
        curves=_curves(curves(one), curves(other)),
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _OF_THE_CLOCK} for line in lines]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The points that TensorBoard shows of each scalar: step and value."""
    if not (folder / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # late: 1 s

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that points were taken back is as it should be
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.rpartition("/")[2] not in _OF_THE_CLOCK
    }


def largest_loss_difference(one: Path, other: Path) -> float:
    """Of the lines of training, relative to the first run's."""
    losses = [[row["loss"] for row in rows(path) if row["split"] == "train"] for path in (one, other)]
    pairs = zip(losses[0], losses[1], strict=True)
    return float(max(abs(second - first) / max(abs(first), 1e-12) for first, second in pairs))


def _tensors(one: Path, other: Path) -> str:
    first, second = load_file(one), load_file(other)
    if set(first) != set(second):
        return "not the same tensors"
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    if not differing:
        return ""
    largest = max(float((first[name].double() - second[name].double()).abs().max()) for name in differing)
    return f"{len(differing)} of {len(first)} tensors differ, by up to {largest:.1e}"


def _rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} lines"
    differing = [row["step"] for row, other in zip(first, second, strict=True) if row != other]
    return f"{len(differing)} of {len(first)} lines differ, first at step {differing[0]}" if differing else ""


def _curves(first: dict[str, list[tuple[int, float]]], second: dict[str, list[tuple[int, float]]]) -> str:
    differing = sorted(tag for tag in first.keys() | second.keys() if first.get(tag) != second.get(tag))
    return f"{', '.join(differing)} differ" if differing else ""
