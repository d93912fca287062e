"""What a finished run says of itself: summary.json, and what stands in the head of model.safetensors."""

import json
from dataclasses import asdict
from typing import Any

from trainer.augment import Normalization
from trainer.checkpoint import Progress
from trainer.evaluation import Evaluation
from trainer.settings import RunConfig


def summary(
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


def about_weights(
    config: RunConfig, classes: tuple[str, ...], normalization: Normalization, channels: int
) -> dict[str, str]:
    """Enough to build the network and to feed it, as safetensors wants it: text by text."""
    return {
        "format": "pt",
        "model": json.dumps(asdict(config.model)),
        "classes": json.dumps(classes),
        "normalization": json.dumps(asdict(normalization)),
        "image_size": str(config.data.image_size),
        "channels": str(channels),
    }
