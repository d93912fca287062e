"""Two run folders in, what differs between the runs out: weights, optimizer state, metrics, TensorBoard curves."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from trainer.run import checkpoint

# What the clock and the memory say is no part of a run's result.
_OF_THE_CLOCK = ("seconds", "samples_per_second", "data_wait_share", "communication_share", "gpu_memory_bytes")


@dataclass(frozen=True, slots=True)
class Difference:
    """Nothing differs when every text is empty."""

    weights: str
    optimizer: str
    metrics: str
    """metrics.jsonl and bad_steps.jsonl"""
    curves: str
    results: str
    """what summary.json says: losses, confusion matrix, per-class scores, best"""

    def __bool__(self) -> bool:
        return any((self.weights, self.optimizer, self.metrics, self.curves, self.results))


def compare(one: Path, other: Path) -> Difference:
    """Both folders hold finished runs."""
    places = [checkpoint.list_checkpoints(path / "checkpoints")[0] for path in (one, other)]
    bad = _rows(rows(one, "bad_steps.jsonl"), rows(other, "bad_steps.jsonl"))
    return Difference(
        weights=_tensors(one / "model.safetensors", other / "model.safetensors"),
        optimizer=_tensors(*(place / "optimizer.safetensors" for place in places)),
        metrics=_rows(rows(one), rows(other)) or (bad and f"of bad_steps.jsonl: {bad}"),
        curves=_curves(curves(one), curves(other)),
        results=_results(one, other),
    )


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or bad_steps.jsonl, without what the clock says; none where there is no such file."""
    if not (folder / name).is_file():
        return []
    lines = (folder / name).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in _OF_THE_CLOCK} for line in lines]


def curves(folder: Path) -> dict[str, list[tuple[int, float | None]]]:
    """The points that TensorBoard shows of each scalar: step and value, None for one that is not finite."""
    if not (folder / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # late: 1 s

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # that points were taken back is as it should be
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value if math.isfinite(event.value) else None) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.rpartition("/")[2] not in _OF_THE_CLOCK
    }


def largest_loss_difference(one: Path, other: Path) -> float:
    """Of the lines of training that both have, relative to the first run's; infinite where one alone has a number."""
    losses = [{row["step"]: row["loss"] for row in rows(path) if row["split"] == "train"} for path in (one, other)]
    largest = 0.0
    for step in losses[0].keys() & losses[1].keys():
        first, second = losses[0][step], losses[1][step]
        if first is None or second is None:
            largest = max(largest, 0.0 if first == second else math.inf)
        else:
            largest = max(largest, abs(second - first) / max(abs(first), 1e-12))
    return largest


def _results(one: Path, other: Path) -> str:
    """The summaries, without the clock, the number of ranks and the state."""
    summaries = [json.loads((path / "summary.json").read_text()) for path in (one, other)]
    for summary in summaries:
        summary["train"].pop("samples_per_second")
    names = ("steps", "epochs", "train", "validation", "test", "best")
    differing = [name for name in names if summaries[0].get(name) != summaries[1].get(name)]
    return f"{', '.join(differing)} differ" if differing else ""


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """0.0 and -0.0 are not the same, a NaN is the same as itself."""
    same_kind = first.shape == second.shape and first.dtype == second.dtype
    return same_kind and first.numpy().tobytes() == second.numpy().tobytes()


def _tensors(one: Path, other: Path) -> str:
    first, second = load_file(one), load_file(other)
    if set(first) != set(second):
        return "not the same tensors"
    differing = [name for name in first if not _same_bits(first[name], second[name])]
    if not differing:
        return ""
    largest = max(float((first[name].double() - second[name].double()).abs().max()) for name in differing)
    return f"{len(differing)} of {len(first)} tensors differ, by up to {largest:.1e}"


def _rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} lines"
    differing = [row["step"] for row, other in zip(first, second, strict=True) if row != other]
    return f"{len(differing)} of {len(first)} lines differ, first at step {differing[0]}" if differing else ""


def _curves(first: dict[str, Any], second: dict[str, Any]) -> str:
    differing = sorted(tag for tag in first.keys() | second.keys() if first.get(tag) != second.get(tag))
    return f"{', '.join(differing)} differ" if differing else ""
