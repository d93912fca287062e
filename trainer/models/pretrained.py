"""Files of pretrained weights in, tensors under a network's own names out. Executes no code of a file.

Other trainers save the weights inside a larger dictionary, or under names with a prefix. Both are accepted if the
tensors fit the network.
"""

import pickle
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_MAX_DEPTH = 3
_MAX_REASON_LENGTH = 160
# Name parts that torch.compile and (distributed) data parallelism add.
_WRAPPERS = ("module", "_orig_mod")
# Raised by the loaders of torch and safetensors for a file that is truncated or of another kind.
_LOAD_ERRORS = (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)


class UnusableWeightsError(Exception):
    """A file does not contain the weights of a network. The text is a part of a sentence that says why."""


def load_pretrained(path: Path, network: nn.Module) -> None:
    """Loads the weights of a file into a network, without those of auxiliary heads. Raises UnusableWeightsError."""
    expected = network.state_dict()
    states = [_rename(state, expected) for state in _state_dicts(_read(path))]
    if not states:
        raise UnusableWeightsError("it has no tensors with names")
    state = max(states, key=lambda state: len(state.keys() & expected.keys()))
    _check(state, expected)
    network.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its text advises to load the file with the code in it
        raise UnusableWeightsError(
            "it is not a file of tensors alone, and other objects could run code; save the network's state_dict() to a "
            "new file with torch.save or safetensors"
        ) from None
    except _LOAD_ERRORS as error:
        raise UnusableWeightsError(f"it cannot be read: {_printable(str(error))}") from None


def _state_dicts(content: Any, depth: int = 0) -> Iterator[dict[str, Tensor]]:
    """Yields the dictionaries in a file that have tensors under names."""
    if not isinstance(content, Mapping) or depth > _MAX_DEPTH:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if tensors:
        yield tensors
    for value in content.values():
        yield from _state_dicts(value, depth + 1)


def _rename(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without wrappers' name parts, and below the prefix that makes most names the network's.

    Also renames weights in torchvision's files for DenseNets, which have `norm.1` where the layer's name is `norm1`.
    """
    unwrapped = {".".join(part for part in key.split(".") if part not in _WRAPPERS): state[key] for key in state}
    unwrapped = {
        re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key): value
        for key, value in unwrapped.items()
        if key != "n_averaged"  # the counter of torch's AveragedModel
    }
    first_name = next(iter(expected))
    prefixes = {""} | {key.removesuffix(first_name) for key in unwrapped if key.endswith(f".{first_name}")}
    prefix = max(sorted(prefixes), key=lambda prefix: sum(f"{prefix}{name}" in unwrapped for name in expected))
    renamed = {key.removeprefix(prefix): value for key, value in unwrapped.items() if key.startswith(prefix)}
    return {key: value for key, value in renamed.items() if not key.lower().startswith("aux")}


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises UnusableWeightsError unless all weights are there, have the network's shapes, and are the only ones."""
    # Old files have no counters of batches; PyTorch then sets them to 0.
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of its {len(expected)} weights are missing, the first is {_printable(missing[0])}"
        )
    if unexpected:
        parts.append(f"{len(unexpected)} weights are not of this network, the first is {_printable(unexpected[0])}")
    if parts:
        raise UnusableWeightsError(" and ".join(parts))
    for name, weight in state.items():
        if weight.shape != expected[name].shape:
            raise UnusableWeightsError(
                f"{name} has the shape {list(weight.shape)}, and the network's is {list(expected[name].shape)}"
            )


def _printable(text: str) -> str:
    """Returns a text from a file in one line without control characters, and cut between words."""
    short = textwrap.shorten(text, _MAX_REASON_LENGTH, placeholder=" ...")
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in short)
