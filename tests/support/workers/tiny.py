"""trainer/main.py with a network of BatchNorm and dropout in LeNet's place, small enough for tests."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (3, 2)]

from torch import Tensor, nn

from trainer import main
from trainer.config.plugins import MODELS
from trainer.config.schema import ModelSettings
from trainer.models.small import lenet

BRIGHT = 0.15  # of the digits' normalized means


def tiny(model: object, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """[B, channels, 32, 32] -> [B, num_classes]."""
    layers = [nn.Conv2d(channels, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4 * 8 * 8, num_classes))


class Idle(nn.Module):
    """LeNet, and two layers: `idle` takes no part in a loss, `seldom` in that of bright samples. Files named `bright`
    and `dim` tell that shards with and without any have been trained on."""

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
