"""A name in a network, as named_modules() and named_parameters() have it, in; the module or the weights there out."""

from torch import nn

from trainer.errors import ConfigError, one_of


def find(net: nn.Module, name: str, setting: str) -> nn.Module | nn.Parameter:
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
            raise ConfigError(f"{setting}: the network has no '{name}'; {one_of(name, known)}")
        place, before = inside[key], f"{before}{key}."
    return place


def is_under(weight: str, name: str) -> bool:
    """Whether the weight of this name is the named one, or in the named module."""
    return f"{weight}.".startswith(f"{name}.")
