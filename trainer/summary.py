"""What a finished run says of itself: summary.json, and its final weights."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer.build import Components
from trainer.inference.evaluation import Evaluation
from trainer.run.checkpoint import Progress


def build_summary(
    progress: Progress,
    steps_per_epoch: int,
    world_size: int,
    samples_per_second: float,
    results: dict[str, Evaluation],
) -> dict[str, Any]:
    """summary.json; results: the last evaluation of each split."""
    return {
        "state": "finished",
        "steps": progress.step,
        "epochs": progress.step / steps_per_epoch,
        "world_size": world_size,
        "seconds": progress.seconds,
        "train": {
            "loss": progress.last_line["loss"],
            "accuracy": progress.last_line["accuracy"],
            "samples_per_second": samples_per_second,
        },
        **{split: asdict(found) for split, found in results.items()},
        "best": asdict(progress.best) if progress.best else None,
    }


def write_final_weights(path: Path, parts: Components) -> None:
    """The final weights, with enough beside them to build the network and to feed it."""
    weights = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in parts.module.state_dict().items()
    }
    save_file(weights, path, parts.about.metadata())
