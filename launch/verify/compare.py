"""Compares two finished runs: weights, optimizer state, metrics, TensorBoard curves and results."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Measurements of time and memory differ between two equal runs.
TIMING_KEYS = ("seconds", "samples_per_second", "data_wait_share", "communication_share", "gpu_memory_bytes")


@dataclass(frozen=True, slots=True)
class Difference:
    """How two runs differ. Each field describes one difference and is empty where the runs are equal."""

    weights: str
    optimizer: str
    metrics: str
    """metrics.jsonl and bad_steps.jsonl"""
    curves: str
    results: str
    """summary.json: losses, confusion matrix, scores of each class, best step"""

    def __bool__(self) -> bool:
        return any((self.weights, self.optimizer, self.metrics, self.curves, self.results))


def compare_runs(first: Path, second: Path) -> Difference:
    """Compares the folders of two finished runs bit by bit, except for measured times."""
    from trainer.run import checkpoint  # lazy import: torch takes 2 s

    checkpoints = [checkpoint.list_checkpoints(folder / "checkpoints")[0] for folder in (first, second)]
    bad_steps = _compare_rows(read_rows(first, "bad_steps.jsonl"), read_rows(second, "bad_steps.jsonl"))
    return Difference(
        weights=_compare_tensors(first / "model.safetensors", second / "model.safetensors"),
        optimizer=_compare_tensors(*(folder / "optimizer.safetensors" for folder in checkpoints)),
        metrics=_compare_rows(read_rows(first), read_rows(second)) or (bad_steps and f"bad_steps.jsonl: {bad_steps}"),
        curves=_compare_curves(read_curves(first), read_curves(second)),
        results=_compare_summaries(first, second),
    )


def read_rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl or bad_steps.jsonl without TIMING_KEYS; an empty list if the file is absent."""
    if not (folder / name).is_file():
        return []
    lines = (folder / name).read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMING_KEYS} for line in lines]


def read_curves(folder: Path) -> dict[str, list[tuple[int, float | None]]]:
    """Returns the (step, value) points that TensorBoard shows for each scalar tag, None for values that are not
    finite. Tags that end in one of TIMING_KEYS are left out."""
    if not (folder / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # lazy import: 1 s

    # It warns of points that a resumed run has replaced: that is intended.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value if math.isfinite(event.value) else None) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.rpartition("/")[2] not in TIMING_KEYS
    }


def largest_loss_difference(first: Path, second: Path) -> float:
    """Returns the largest difference between the training losses of equal steps, relative to the first run's loss.

    Infinite where only one of the two losses is a finite number.
    """
    first_losses, second_losses = _training_losses(first), _training_losses(second)
    largest = 0.0
    for step in first_losses.keys() & second_losses.keys():
        first_loss, second_loss = first_losses[step], second_losses[step]
        if first_loss is None or second_loss is None:
            largest = max(largest, 0.0 if first_loss == second_loss else math.inf)
        else:
            largest = max(largest, abs(second_loss - first_loss) / max(abs(first_loss), 1e-12))
    return largest


def _training_losses(folder: Path) -> dict[int, float | None]:
    return {row["step"]: row["loss"] for row in read_rows(folder) if row["split"] == "train"}


def _compare_summaries(first: Path, second: Path) -> str:
    """Compares summary.json without times, world size and state."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    for summary in summaries:
        summary["train"].pop("samples_per_second")
    keys = ("steps", "epochs", "train", "validation", "test", "best")
    differing = [key for key in keys if summaries[0].get(key) != summaries[1].get(key)]
    return f"{', '.join(differing)} differ" if differing else ""


def _has_same_bits(first: "Tensor", second: "Tensor") -> bool:
    """Compares bytes: 0.0 and -0.0 differ, a NaN equals itself."""
    same_type = first.shape == second.shape and first.dtype == second.dtype
    return same_type and first.numpy().tobytes() == second.numpy().tobytes()


def _compare_tensors(first_path: Path, second_path: Path) -> str:
    from safetensors.torch import load_file  # lazy import: torch takes 2 s

    first, second = load_file(first_path), load_file(second_path)
    if set(first) != set(second):
        return "the names of the tensors differ"
    differing = [name for name in first if not _has_same_bits(first[name], second[name])]
    if not differing:
        return ""
    if any(first[name].shape != second[name].shape for name in differing):
        return f"{len(differing)} of {len(first)} tensors differ, some in shape"
    largest = max(float((first[name].double() - second[name].double()).abs().max()) for name in differing)
    return f"{len(differing)} of {len(first)} tensors differ, by up to {largest:.1e}"


def _compare_rows(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} rows"
    differing = [row["step"] for row, second_row in zip(first, second, strict=True) if row != second_row]
    return f"{len(differing)} of {len(first)} rows differ, first at step {differing[0]}" if differing else ""


def _compare_curves(first: dict[str, Any], second: dict[str, Any]) -> str:
    differing = sorted(tag for tag in first.keys() | second.keys() if first.get(tag) != second.get(tag))
    return f"{', '.join(differing)} differ" if differing else ""
