"""torchvision's classifiers, with or without ImageNet weights, and with a new or an extended head."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.config.schema import ModelSettings
from trainer.config.validate import check_pretrained_file
from trainer.data.normalization import Normalization
from trainer.errors import ConfigError, suggest_choice
from trainer.models.pretrained import UnusableWeightsError, load_pretrained
from trainer.text.escape import one_line

# Networks whose weights come from TensorFlow and expect values in [-1, 1]. When torchvision loads these weights, it
# converts ImageNet's normalization to that range in the first layer (`transform_input`). Both have auxiliary heads.
_TENSORFLOW_MODELS = ("googlenet", "inception_v3")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Image size and normalization that pretrained weights expect."""

    image_size: int
    """Side in pixels."""
    normalization: Normalization


def vgg16(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Returns torchvision's VGG16, with 134 million weights. (Simonyan and Zisserman, arXiv 1409.1556.)

    Raises ConfigError as torchvision_model does.
    """
    return _build("vgg16", model, num_classes, channels, image_size)


def torchvision_model(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """Returns the classifier of torchvision that `torchvision/NAME` names.

    Raises ConfigError for an unknown name, images that the network cannot take, or an unusable file of weights.
    """
    return _build(_torchvision_name(model.name), model, num_classes, channels, image_size)


def pretrained_preprocessing(model: ModelSettings) -> Preprocessing:
    """Returns the preprocessing for the weights in model.pretrained, which the name of torchvision's file identifies.

    A file of another name gets the preprocessing of torchvision's default weights.
    """
    import torchvision

    name = _torchvision_name(model.name)
    file_name = Path(model.pretrained or "").name
    known_weights: Any = torchvision.models.get_model_weights(name)
    weights = next((known for known in known_weights if Path(known.url).name == file_name), known_weights.DEFAULT)
    transforms = weights.transforms()
    if name in _TENSORFLOW_MODELS:
        return Preprocessing(transforms.crop_size[0], Normalization((0.5,) * 3, (0.5,) * 3))
    return Preprocessing(transforms.crop_size[0], Normalization(tuple(transforms.mean), tuple(transforms.std)))


def pretrained_file(model: ModelSettings) -> Path:
    """Returns the path of the weights in model.pretrained, which must be set. Raises ConfigError for a missing file."""
    source = model.pretrained or ""
    path = _hub_file(_torchvision_name(model.name)) if source == "hub" else Path(source).expanduser()
    check_pretrained_file(model, path)
    return path


def _torchvision_name(model_name: str) -> str:
    """Returns a model's name in torchvision. Raises ConfigError for a name that torchvision does not have."""
    import torchvision  # lazy import: 2 s

    name = model_name.removeprefix("torchvision/")
    known_names = torchvision.models.list_models(module=torchvision.models)
    if name not in known_names:
        raise ConfigError(
            f"model.name={model_name}: torchvision has no classifier '{name}'; {suggest_choice(name, known_names)}"
        )
    return name


def _build(name: str, model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    import torchvision

    if channels != 3:
        raise ConfigError(f"model.name={model.name} takes 3 channels, the data set has {channels}; set data.channels=3")
    options: dict[str, Any] = {"weights": None}
    if name in _TENSORFLOW_MODELS:  # with auxiliary heads they would return more than logits
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):  # their position embedding depends on the image size
        options |= {"image_size": image_size}
    try:
        network: nn.Module = torchvision.models.get_model(name, **options)
    except AssertionError as error:
        raise ConfigError(
            f"model.name={model.name} cannot take data.image_size={image_size} ({error}); try 224"
        ) from None
    if model.pretrained:
        _load_weights(network, name, model.pretrained, pretrained_file(model))
    _change_head(network, model.head, num_classes)
    _check_image_size(network, model.name, image_size)
    return network


def _load_weights(network: nn.Module, name: str, source: str, path: Path) -> None:
    """Loads ImageNet weights from a file without executing code in it. Ignores weights of auxiliary heads.

    Raises ConfigError for a file that does not contain weights of this network.
    """
    try:
        load_pretrained(path, network)
    except UnusableWeightsError as error:
        # The position embedding has another shape if the weights are for another image size.
        fix = "set data.image_size=auto" if "pos_embedding has the shape" in str(error) else "choose another file"
        raise ConfigError(
            f"model.pretrained={source}: {path} does not contain weights of {name}: {error}; {fix}"
        ) from None


def _hub_file(name: str) -> Path:
    """Returns the path where torch.hub stores torchvision's default weights of a model."""
    import torchvision

    weights: Any = torchvision.models.get_model_weights(name)
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.DEFAULT.url).name


def _change_head(network: nn.Module, head: str, num_classes: int) -> None:
    """Replaces the last linear layer by a new one, or appends a new one to it: the tutorials teach both."""
    name, last = _last_classifying_layer(network)
    parent_name, _, child_name = name.rpartition(".")
    parent = network.get_submodule(parent_name)
    if isinstance(last, nn.Conv2d):  # SqueezeNet classifies with a 1x1 convolution
        if head == "append":
            raise ConfigError("model.head=append: this model's last layer is a convolution; use model.head=replace")
        setattr(parent, child_name, nn.Conv2d(last.in_channels, num_classes, kernel_size=1))
    elif head == "replace":
        setattr(parent, child_name, nn.Linear(last.in_features, num_classes, bias=last.bias is not None))
    elif isinstance(parent, nn.Sequential) and list(parent.children())[-1] is last:
        parent.add_module("add_linear", nn.Linear(last.out_features, num_classes))
    else:
        setattr(parent, child_name, nn.Sequential(last, nn.Linear(last.out_features, num_classes)))


def _last_classifying_layer(network: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Returns name and module of the layer with ImageNet's 1,000 outputs."""
    layers = [
        (name, module)
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == 1000)
        or (isinstance(module, nn.Conv2d) and module.out_channels == 1000)
    ]
    return layers[-1]


def _check_image_size(network: nn.Module, name: str, image_size: int) -> None:
    """Runs one image through the network before the data is read. Raises ConfigError if the image is too small."""
    is_training = network.training
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:  # networks raise different errors for small images
        reason = one_line(error)
        raise ConfigError(f"model.name={name} cannot take data.image_size={image_size} ({reason}); try 224") from None
    network.train(is_training)
