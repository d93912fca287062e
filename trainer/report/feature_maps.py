"""A network and an image in, what named layers make of it out: the pictures of a tutorial's convolution, activation and
pooling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.models.inspect import eval_copy

_DIMENSIONS = (2, 3, 4)


def compute_feature_maps(module: nn.Module, image: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """image: the network's input, float32 [1, C, H, W]. Of each layer float32 [channels, h, w], on the CPU; a layer
    that gives a vector has maps of one pixel, one that gives a vector for each place a single map of [places, length].
    Of a layer that is run several times it is the last; one that is not run, or gives no tensor, is left out."""
    found: dict[str, Tensor] = {}
    watched = eval_copy(module)
    for name in names:

        def keep(_: nn.Module, __: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.dim() in _DIMENSIONS:
                made = output[0].float().cpu().clone()  # or the next layer may write over it
                found[name] = {3: made, 2: made[None], 1: made[:, None, None]}[made.dim()]

        watched.get_submodule(name).register_forward_hook(keep)
    with torch.no_grad():
        watched(image)
    return found
