"""Builds summary.json and writes the final weights of a finished run."""

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
    """Returns the content of summary.json.

    samples_per_second: mean training speed over all ranks.
    results: last evaluation of each split.
    """
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
        **{split: asdict(evaluation) for split, evaluation in results.items()},
        "best": asdict(progress.best) if progress.best else None,
    }


def write_final_weights(path: Path, components: Components) -> None:
    """Writes the weights as safetensors, with metadata to rebuild the network and its input.

    Raises OSError or SafetensorError.
    """
    weights = {
        name: tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in components.module.state_dict().items()
    }
    save_file(weights, path, components.model_metadata.to_file_metadata())
