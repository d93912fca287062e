"""trainer/main.py with a network of BatchNorm and dropout in LeNet's place, small enough for tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import nn

from trainer import main, models


def tiny(model: object, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """[B, channels, 32, 32] -> [B, num_classes]."""
    layers = [nn.Conv2d(channels, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4 * 8 * 8, num_classes))


if __name__ == "__main__":
    models.MODELS["lenet"] = tiny
    sys.exit(main.main())
