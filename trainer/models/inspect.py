"""Finds modules and weights of a network by name, and copies a network for evaluation."""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from trainer.errors import ConfigError, suggest_choice


def find_module(network: nn.Module, name: str, setting: str) -> nn.Module | nn.Parameter:
    """Returns the module or weight of a name, as named_modules() and named_parameters() give them.

    setting: the setting that contains the name, for the error message.
    Raises ConfigError for an unknown name. The message lists the names at the level where the search ended.
    """
    target: nn.Module | nn.Parameter = network
    prefix = ""
    known_names: list[str] = []
    for key in name.split("."):
        children: dict[str, nn.Module | nn.Parameter] = {}
        if isinstance(target, nn.Module):
            children = dict(target.named_children()) | dict(target.named_parameters(recurse=False))
        known_names = [f"{prefix}{child}" for child in children] or known_names
        if key not in children:
            raise ConfigError(f"{setting}: the network has no '{name}'; {suggest_choice(name, known_names)}")
        target, prefix = children[key], f"{prefix}{key}."
    return target


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Returns the number of weights, and how many of them are trained."""
    weights = list(network.parameters())
    return sum(weight.numel() for weight in weights), sum(weight.numel() for weight in weights if weight.requires_grad)


def is_under(weight_name: str, name: str) -> bool:
    """Returns whether `name` names this weight or a module that contains it."""
    return f"{weight_name}.".startswith(f"{name}.")


def eval_copy(network: nn.Module) -> nn.Module:
    """Returns a copy in evaluation mode and full precision, not compiled, without gradients.

    The copy shares the weights and buffers of the network, so it needs almost no memory.
    """
    memo: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    network_copy = copy.deepcopy(network, memo)
    for name in ("forward", "_original_forward"):  # set on the instance by accelerate for lower precisions
        network_copy.__dict__.pop(name, None)
    return network_copy.eval()


def check_feature_maps(network: nn.Module, names: Sequence[str]) -> None:
    """Checks log.feature_maps. Raises ConfigError for a name that is unknown or names a weight."""
    setting = f"log.feature_maps={list(names)}"
    for name in names:
        if isinstance(find_module(network, name, setting), nn.Parameter):
            raise ConfigError(f"{setting}: '{name}' is a weight and has no feature maps; name its layer instead")
