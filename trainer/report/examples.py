"""A split and what was predicted of it in, the images that a person wants to see out: the surest mistakes, some of each
class. Kept in the run folder, so that a report can be made without the data set."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.splits import TensorSplit
from trainer.inference.evaluation import Predictions

EXAMPLES_FILE = "examples.safetensors"
_MISTAKES = 24
_OF_A_CLASS = 8
_CLASSES = 20
_LARGEST = 96  # pixels: as large as they are shown


def write(path: Path, part: TensorSplit, found: Predictions, classes: tuple[str, ...], split: str, step: int) -> None:
    """images uint8 [n, H, W, C], 96 pixels at most; label, predicted int64 [n]; probability float32 [n]. Metadata: the
    classes, the split, the step; mistakes, how many of the first ones are the surest mistakes. The others are some of
    each class, right or wrong."""
    labels = part.labels.cpu()
    mistakes = surest_mistakes(labels, found)
    chosen = torch.cat([mistakes, samples_of_each_class(labels, min(len(classes), _CLASSES))])
    images = part.images[chosen.to(part.images.device)].cpu()
    if images.shape[2] > _LARGEST:
        scaled = F.interpolate(images.float(), (_LARGEST, _LARGEST), mode="bilinear", antialias=True)
        images = scaled.round().to(torch.uint8)
    tensors = {
        "images": images.permute(0, 2, 3, 1).contiguous(),
        "label": labels[chosen],
        "predicted": found.labels[chosen],
        "probability": found.confidence[chosen],
    }
    about = {"classes": classes, "split": split, "step": step, "mistakes": len(mistakes)}
    save_file(tensors, path, {"samecurve": json.dumps(about)})


def surest_mistakes(labels: Tensor, found: Predictions) -> Tensor:
    """Their places, the surest first: int64 [n]."""
    wrong = (found.labels != labels).nonzero().squeeze(1)
    order = found.confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order[:_MISTAKES]]


def samples_of_each_class(labels: Tensor, num_classes: int) -> Tensor:
    """Places of samples of each class, from all over the split: int64 [n]."""
    places = []
    for label in range(num_classes):
        members = (labels == label).nonzero().squeeze(1)
        stride = max(1, len(members) // _OF_A_CLASS)
        places.append(members[::stride][:_OF_A_CLASS])
    return torch.cat(places)
