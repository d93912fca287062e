"""The tutorials' own small networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError


class LeNet(nn.Module):
    """Two convolutions, three linear layers: "Net" of the PyTorch tutorials, after LeCun et al. 1998.

    [B, channels, 32, 32] -> [B, num_classes]; channels is 3, or 1 as in the tutorial's grey one.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # The tutorials have ReLU before pooling, of four times as many values: the same numbers and gradients.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class Tudui(nn.Module):
    """Three convolutions, each pooled, and two linear layers, with no nonlinearity but the pooling: as taught.

    [B, channels, 32, 32] -> [B, num_classes].
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.model1 = nn.Sequential(
            nn.Conv2d(channels, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(1024, 64),
            nn.Linear(64, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model1(x)
        return logits


def lenet(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    _only_32(model.name, image_size)
    return LeNet(num_classes, channels)


def tudui(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    _only_32(model.name, image_size)
    return Tudui(num_classes, channels)


def _only_32(name: str, image_size: int) -> None:
    if image_size != 32:
        raise ConfigError(
            f"model.name={name} takes images of 32 pixels, got data.image_size={image_size}; set it to 32"
        )
