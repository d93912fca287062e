"""Networks: one file a family; MODELS lists them.

A builder takes (settings, number of classes, input channels, image size) and returns a module that maps normalized
float images [B, channels, image_size, image_size] to logits [B, number of classes].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.config.plugins import MODELS, load_plugin
from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.models import speedrun, torchvision
from trainer.models.inspect import find_module

_FITTED_IMAGES = 5000


def fit_to_data(module: nn.Module, images: Tensor, std: Sequence[float]) -> None:
    """What a network takes from the training set before it is trained: whitening, for those that have it.

    images: uint8 [N, C, H, W]; std: of each channel's values in [0, 1].
    """
    for layer in module.modules():
        if isinstance(layer, speedrun.Whitening):
            some = images[:: -(-len(images) // _FITTED_IMAGES)]  # from all over: it may be sorted by class
            layer.fit(some.cpu(), torch.tensor(std))


def build_model(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """The network that the settings name; `torchvision/NAME` is any of torchvision's classifiers.

    Raises ConfigError for an unknown one, or an input that the network cannot take.
    """
    builder = load_plugin(MODELS, model.name) if model.name in MODELS else torchvision.torchvision_model
    network: nn.Module = builder(model, num_classes, channels, image_size)
    return network


def freeze(net: nn.Module, frozen: Sequence[str]) -> None:
    """What has these names, and all under it, is not trained. A module of them is in evaluation mode for good: its
    BatchNorm neither looks at a batch nor moves its statistics, its dropout drops nothing.

    Raises ConfigError for a name that is not there, or when nothing is left to train.
    """
    for name in frozen:
        part = find_module(net, name, f"model.freeze={list(frozen)}")
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            part.eval()
    if frozen and not any(weight.requires_grad for weight in net.parameters()):
        raise ConfigError(f"model.freeze={list(frozen)} leaves nothing to train; leave out what is to learn")
