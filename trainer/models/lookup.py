"""Builds the network that the settings name.

To add a network, write a builder and list it in MODELS in config/plugins.py. A builder takes (settings, number of
classes, input channels, image size) and returns a module that maps normalized float images [B, channels, image_size,
image_size] to logits [B, number of classes]. It raises ConfigError for an input that the network cannot take.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from trainer.config.plugins import MODELS, load_plugin
from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.models import torchvision
from trainer.models.inspect import find_module


@runtime_checkable
class _FittedToData(Protocol):
    """A module that computes some of its weights from the training images."""

    def fit_to_data(self, images: Tensor, std: Sequence[float]) -> None: ...


def build_model(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Returns the network with fresh or pretrained weights. `torchvision/NAME` names any classifier of torchvision.

    Raises ConfigError for an unknown name, or an input that the network cannot take.
    """
    builder = load_plugin(MODELS, model.name) if model.name in MODELS else torchvision.torchvision_model
    network: nn.Module = builder(model, num_classes, channels, image_size)
    return network


def fit_to_data(network: nn.Module, images: Tensor, std: Sequence[float]) -> None:
    """Calls `fit_to_data(images, std)` of every module that has this method. Call it once, before training.

    images: all training images, uint8 [N, C, H, W]. std: standard deviation that each channel, in [0, 1], is divided
    by.
    """
    for module in network.modules():
        if isinstance(module, _FittedToData):
            module.fit_to_data(images, std)


def freeze(network: nn.Module, names: Sequence[str]) -> None:
    """Excludes the named modules and weights, and everything inside them, from training.

    A frozen module also stays in evaluation mode: its BatchNorm layers keep their statistics and normalize with them,
    and its dropout layers drop nothing.
    Raises ConfigError for an unknown name, or when no weight is left to train.
    """
    for name in names:
        target = find_module(network, name, f"model.freeze={list(names)}")
        target.requires_grad_(False)
        if isinstance(target, nn.Module):
            target.eval()
    if names and not any(weight.requires_grad for weight in network.parameters()):
        raise ConfigError(f"model.freeze={list(names)} leaves nothing to train; leave out at least one trainable layer")
