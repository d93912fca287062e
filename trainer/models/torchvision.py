"""torchvision's classifiers, with or without ImageNet weights, their head replaced or one layer appended to it."""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from trainer.config.schema import ModelSettings
from trainer.config.validate import check_pretrained_file
from trainer.data.augment import Normalization
from trainer.errors import ConfigError, suggest_choice

# What a file that is cut off, foreign, or a pickle that would run code makes torch's and safetensors' loaders raise.
_BAD_FILE = (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError)
# Their weights were TensorFlow's and want values in [-1, 1]: torchvision's own networks turn ImageNet's normalization
# into that at their first layer when they load weights (`transform_input`). Both have auxiliary heads.
_OF_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What a network's weights were made for."""

    image_size: int
    """side in pixels"""
    normalization: Normalization


def vgg16(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """VGG16 as torchvision has it: 134 million weights. (Simonyan and Zisserman, arXiv 1409.1556.)"""
    return _with_head("vgg16", model, num_classes, channels, image_size)


def torchvision_model(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    """`torchvision/NAME`: any classifier of torchvision's registry."""
    return _with_head(_registered(model.name), model, num_classes, channels, image_size)


def preprocessing(model: ModelSettings) -> Preprocessing:
    """That of model.pretrained, if the file has the name that torchvision gave it; else of the default weights."""
    import torchvision

    file = Path(model.pretrained or "").name
    known: Any = torchvision.models.get_model_weights(_registered(model.name))
    weights = next((one for one in known if Path(one.url).name == file), known.DEFAULT)
    shown = weights.transforms()
    if _registered(model.name) in _OF_TENSORFLOW:
        return Preprocessing(shown.crop_size[0], Normalization((0.5,) * 3, (0.5,) * 3))
    return Preprocessing(shown.crop_size[0], Normalization(tuple(shown.mean), tuple(shown.std)))


def _registered(model_name: str) -> str:
    """A model's name in torchvision. Raises ConfigError for one that it does not have."""
    import torchvision  # late: 2 s

    name = model_name.removeprefix("torchvision/")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"model.name={model_name}: torchvision has no classifier '{name}'; {suggest_choice(name, known)}"
        )
    return name


def _with_head(name: str, model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    import torchvision

    if channels != 3:
        raise ConfigError(f"model.name={model.name} takes 3 channels, the data set has {channels}; set data.channels=3")
    options: dict[str, Any] = {"weights": None}
    if name in _OF_TENSORFLOW:  # their auxiliary heads would return more than logits
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):  # one weight for each place in the image
        options |= {"image_size": image_size}
    try:
        net: nn.Module = torchvision.models.get_model(name, **options)
    except AssertionError as error:
        raise ConfigError(f"model.name={model.name} cannot take data.image_size={image_size} ({error})") from None
    if model.pretrained:
        _load_weights(net, name, model.pretrained, pretrained_file(model))
    _change_head(net, model.head, num_classes)
    _check_input(net, model.name, image_size)
    return net


def pretrained_file(model: ModelSettings) -> Path:
    """Where model.pretrained, which is set, lies. Raises ConfigError when it does not."""
    source = model.pretrained or ""
    path = _hub_file(_registered(model.name)) if source == "hub" else Path(source).expanduser()
    check_pretrained_file(model, path)
    return path


def _load_weights(net: nn.Module, name: str, source: str, path: Path) -> None:
    """ImageNet weights from a file, without executing anything in it; auxiliary heads in it are left out."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise ValueError(f"it holds a {type(state).__name__} that is no state dict")
        net.load_state_dict(
            {_new_name(key): value for key, value in state.items() if not key.lower().startswith("aux")}
        )
    except _BAD_FILE as error:
        reason = " ".join(str(error).split())[:200]
        size = "; data.image_size=auto is the size that they are for" if "pos_embedding" in reason else ""
        raise ConfigError(
            f"model.pretrained={source}: {path} does not hold weights of {name} ({reason}){size}"
        ) from None


def _new_name(key: str) -> str:
    """torchvision's files of densenets still have `norm.1` where their layers are called `norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)


def _hub_file(name: str) -> Path:
    """Where torch.hub keeps torchvision's default weights of a model."""
    import torchvision

    weights: Any = torchvision.models.get_model_weights(name)
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.DEFAULT.url).name


def _change_head(net: nn.Module, head: str, num_classes: int) -> None:
    """The tutorials' two ways: the last linear layer gives way to a new one, or a new one comes after it."""
    name, last = _last_classifying_layer(net)
    parent_name, _, own_name = name.rpartition(".")
    parent = net.get_submodule(parent_name)
    if isinstance(last, nn.Conv2d):  # squeezenet classifies by a 1x1 convolution
        if head == "append":
            raise ConfigError("model.head=append: this model's last layer is a convolution; use model.head=replace")
        setattr(parent, own_name, nn.Conv2d(last.in_channels, num_classes, kernel_size=1))
    elif head == "replace":
        setattr(parent, own_name, nn.Linear(last.in_features, num_classes, bias=last.bias is not None))
    elif isinstance(parent, nn.Sequential) and list(parent.children())[-1] is last:
        parent.add_module("add_linear", nn.Linear(last.out_features, num_classes))
    else:
        setattr(parent, own_name, nn.Sequential(last, nn.Linear(last.out_features, num_classes)))


def _last_classifying_layer(net: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The layer that gives ImageNet's 1,000 outputs."""
    found = [
        (name, module)
        for name, module in net.named_modules()
        if (isinstance(module, nn.Linear) and module.out_features == 1000)
        or (isinstance(module, nn.Conv2d) and module.out_channels == 1000)
    ]
    return found[-1]


def _check_input(net: nn.Module, name: str, image_size: int) -> None:
    """One image goes through before the data is read: some networks refuse small ones, each in its own words."""
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:  # how the networks refuse, each its own way
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"model.name={name} cannot take data.image_size={image_size} ({reason}); try 224") from None
    net.train(training)
