"""A name in a network, as named_modules() and named_parameters() have it, in; the module or the weights there out."""

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from trainer.errors import ConfigError, suggest_choice


def find_module(net: nn.Module, name: str, setting: str) -> nn.Module | nn.Parameter:
    """Raises ConfigError, with the setting and the names that there are as far as it can be followed."""
    place: nn.Module | nn.Parameter = net
    before = ""
    known: list[str] = []
    for key in name.split("."):
        inside: dict[str, nn.Module | nn.Parameter] = {}
        if isinstance(place, nn.Module):
            inside = dict(place.named_children()) | dict(place.named_parameters(recurse=False))
        known = [f"{before}{one}" for one in inside] or known
        if key not in inside:
            raise ConfigError(f"{setting}: the network has no '{name}'; {suggest_choice(name, known)}")
        place, before = inside[key], f"{before}{key}."
    return place


def is_under(weight: str, name: str) -> bool:
    """Whether the weight of this name is the named one, or in the named module."""
    return f"{weight}.".startswith(f"{name}.")


def eval_copy(network: nn.Module) -> nn.Module:
    """In evaluation mode, in full precision, not compiled, without gradients; takes no memory worth speaking of."""
    memo: dict[int, Any] = {}
    for tensor in chain(network.parameters(), network.buffers()):
        shared = tensor.detach()
        memo[id(tensor)] = nn.Parameter(shared, requires_grad=False) if isinstance(tensor, nn.Parameter) else shared
    made = copy.deepcopy(network, memo)
    for name in ("forward", "_original_forward"):  # accelerate's, for other precisions
        made.__dict__.pop(name, None)
    return made.eval()


def check_feature_maps(module: nn.Module, names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is no layer."""
    setting = f"log.feature_maps={list(names)}"
    for name in names:
        if isinstance(find_module(module, name, setting), nn.Parameter):
            raise ConfigError(f"{setting}: '{name}' is a weight, which has no maps; name its layer")
