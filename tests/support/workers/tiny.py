"""Small networks for tests, in place of LeNet. Run as a script: trainer/main.py with `tiny`."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (3, 2)]

import torch.nn.functional as F
from torch import Tensor, nn

from trainer import main
from trainer.config.plugins import MODELS
from trainer.config.schema import ModelSettings
from trainer.models.small import lenet

BRIGHT = 0.15  # a threshold for the means of normalized digits


def tiny(model: object, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """[B, channels, 32, 32] -> [B, num_classes], with BatchNorm and dropout."""
    return _tiny(nn.Dropout(0.5), num_classes, channels)


def with_named_dropout(model: object, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Like `tiny`, with a dropout module of its own class."""
    return _tiny(Noise(), num_classes, channels)


def _tiny(dropout: nn.Module, num_classes: int, channels: int) -> nn.Module:
    layers = [nn.Conv2d(channels, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), dropout]
    return nn.Sequential(*layers, nn.Linear(4 * 8 * 8, num_classes))


class Noise(nn.Module):
    """Dropout that no search for nn.Dropout finds."""

    def forward(self, features: Tensor) -> Tensor:
        return F.dropout(features, 0.5, self.training)


class IdleWeights(nn.Module):
    """LeNet and two layers: `idle` never influences the loss, `seldom` influences it for bright samples only.

    Creates the files `bright` and `dim` when it trains on a shard with and without bright samples.
    """

    def __init__(self, model: ModelSettings, num_classes: int, channels: int, image_size: int) -> None:
        super().__init__()
        self.idle = nn.Linear(4, 4)
        self.net = lenet(model, num_classes, channels, image_size)
        self.seldom = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        means = images.mean(dim=(2, 3))
        (bright,) = (means[:, 0] > BRIGHT).nonzero(as_tuple=True)
        if self.training:
            Path("bright" if len(bright) else "dim").touch()
        if len(bright):
            logits = logits.index_add(0, bright, self.seldom(means[bright]))
        return logits


if __name__ == "__main__":
    MODELS["lenet"] = "support.workers.tiny:tiny"
    sys.exit(main.main())
