"""The small networks of the tutorials, for images of 32 pixels."""

import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError


class LeNet(nn.Module):
    """Two convolutions and three linear layers: "Net" of the PyTorch tutorials. (After LeCun et al. 1998.)

    [B, channels, 32, 32] -> [B, num_classes]. The tutorials use 3 channels, and 1 for grey images.
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
        # The tutorials apply ReLU before pooling, to four times as many values. Outputs and gradients are the same.
        x = F.relu(self.pool(self.conv1(x)))
        x = F.relu(self.pool(self.conv2(x)))
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


class Tudui(nn.Module):
    """Three convolutions, each with max pooling, and two linear layers: the network of the Tudui tutorial.

    As in the tutorial, it has no activation functions: max pooling is its only nonlinearity.

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
    """Returns LeNet. Raises ConfigError for images that are not 32 pixels wide."""
    _check_image_size(model.name, image_size)
    return LeNet(num_classes, channels)


def tudui(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Returns Tudui. Raises ConfigError for images that are not 32 pixels wide."""
    _check_image_size(model.name, image_size)
    return Tudui(num_classes, channels)


def _check_image_size(name: str, image_size: int) -> None:
    if image_size != 32:
        raise ConfigError(
            f"model.name={name} takes images of 32 pixels, got data.image_size={image_size}; set it to 32"
        )
