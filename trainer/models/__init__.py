"""Networks: one file a family; MODELS lists them.

A builder takes (settings, number of classes, input channels, image size) and returns a module that maps normalized
float images [B, channels, image_size, image_size] to logits [B, number of classes].
"""

from collections.abc import Callable

from torch import nn

from trainer.models import imagenet, resnet, small
from trainer.settings import Model

Builder = Callable[[Model, int, int, int], nn.Module]

# To add a model, write it in its family's file, list it here, and name it in trainer/config.py.
MODELS: dict[str, Builder] = {
    "lenet": small.lenet,
    "tudui": small.tudui,
    "resnet18": resnet.resnet18,
    "vgg16": imagenet.vgg16,
}


def build(model: Model, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """The network that the settings name; `torchvision/NAME` is any of torchvision's classifiers.

    Raises ConfigError for an unknown one, or an input that the network cannot take.
    """
    builder = MODELS.get(model.name, imagenet.torchvision_model)
    return builder(model, num_classes, channels, image_size)
