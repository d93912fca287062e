"""Writes and reads examples.safetensors: images of the test set with their predictions, for reports and trackers.

The run folder keeps them so that a report needs no data set.
"""

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from trainer.run.record import unreadable_file
from trainer.tracking.example import Example

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.splits import TensorSplit
    from trainer.inference.evaluation import Predictions

EXAMPLES_FILE = "examples.safetensors"
MAX_CLASSES = 20
MAX_SAMPLES_PER_CLASS = 8
_MAX_MISTAKES = 24
_MAX_PIXELS = 96  # height and width; pages and trackers show images no larger


class Examples(NamedTuple):
    """The content of examples.safetensors."""

    mistakes: list[Example]
    """the most confident mistakes, most confident first"""
    samples: list[Example]
    """samples of each class, predicted correctly or not"""


def write_examples(
    path: Path,
    split: "TensorSplit",
    predictions: "Predictions",
    classes: tuple[str, ...],
    split_name: str,
    step: int,
) -> None:
    """Writes the most confident mistakes, then samples of each class, to a safetensors file. Raises OSError.

    Tensors: images uint8 [n, H, W, C] with H and W at most 96; label and predicted int64 [n]; probability float32 [n].
    The metadata's key "samecurve" is JSON: classes, split, step, and mistakes, the number of mistakes among the n.
    """
    import torch  # lazy import: reading needs no torch
    import torch.nn.functional as F
    from safetensors.torch import save_file

    labels = split.labels.cpu()
    mistakes = most_confident_mistakes(labels, predictions)
    positions = torch.cat([mistakes, samples_of_each_class(labels, min(len(classes), MAX_CLASSES))])
    pixels = split.images[positions.to(split.images.device)].cpu()
    if pixels.shape[2] > _MAX_PIXELS:
        scaled = F.interpolate(pixels.float(), (_MAX_PIXELS, _MAX_PIXELS), mode="bilinear", antialias=True)
        pixels = scaled.round().to(torch.uint8)
    tensors = {
        "images": pixels.permute(0, 2, 3, 1).contiguous(),
        "label": labels[positions],
        "predicted": predictions.labels[positions],
        "probability": predictions.confidence[positions],
    }
    metadata = {"classes": classes, "split": split_name, "step": step, "mistakes": len(mistakes)}
    save_file(tensors, path, {"samecurve": json.dumps(metadata)})


def read_examples(folder: Path) -> Examples:
    """Returns the examples in a run folder; none if there is no file. Raises FolderError if it cannot be read."""
    path = folder / EXAMPLES_FILE
    try:
        path.open("rb").close()  # safetensors reports a file without read permission as missing
        with safe_open(path, framework="np") as file:
            metadata = json.loads(file.metadata()["samecurve"])
            names = ("images", "label", "predicted", "probability")
            columns = [file.get_tensor(name) for name in names]
        classes = metadata["classes"]
        examples = [
            Example(_png(pixels), str(classes[label]), str(classes[predicted]), float(probability))
            for pixels, label, predicted, probability in zip(*columns, strict=True)
        ]
        return Examples(examples[: metadata["mistakes"]], examples[metadata["mistakes"] :])
    except FileNotFoundError:
        return Examples([], [])
    # SystemError: Pillow refuses an image without pixels.
    except (
        OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, SystemError, SafetensorError
    ) as error:  # fmt: skip
        raise unreadable_file(path, error) from None


def most_confident_mistakes(labels: "Tensor", predictions: "Predictions") -> "Tensor":
    """Returns the positions of at most 24 wrong predictions, most confident first: int64 [n]. labels: int64 [N]."""
    wrong = (predictions.labels != labels).nonzero().squeeze(1)
    order = predictions.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order[:_MAX_MISTAKES]]


def samples_of_each_class(labels: "Tensor", num_classes: int) -> "Tensor":
    """Returns the positions of at most 8 samples of each class, evenly spaced in the split: int64 [n]."""
    import torch

    positions = []
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        stride = max(1, len(members) // MAX_SAMPLES_PER_CLASS)
        positions.append(members[::stride][:MAX_SAMPLES_PER_CLASS])
    return torch.cat(positions)


def _png(pixels: NDArray[np.uint8]) -> str:
    """Returns base64 of a PNG file. pixels: uint8 [H, W, C]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
