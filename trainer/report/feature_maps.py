"""Computes feature maps: the outputs of named layers for one image."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.models.inspect import eval_copy


def compute_feature_maps(module: nn.Module, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Returns each layer's output as float32 [channels, h, w] on the CPU. The module is not changed.

    image: network input, float32 [1, C, H, W].
    layers: module names as in `named_modules()`.
    An output [1, channels] becomes maps of one pixel. An output [1, positions, length] becomes one map. If a layer runs
    several times, its last output counts. A layer that does not run, or does not return such a tensor, is left out.
    """
    maps: dict[str, Tensor] = {}
    network = eval_copy(module)
    for layer in layers:

        def save_output(_: nn.Module, __: object, output: object, layer: str = layer) -> None:
            if isinstance(output, Tensor) and 2 <= output.dim() <= 4:
                first = output[0].float().cpu().clone()  # cloned: the next layer may work in place
                maps[layer] = {3: first, 2: first[None], 1: first[:, None, None]}[first.dim()]

        network.get_submodule(layer).register_forward_hook(save_output)
    with torch.no_grad():
        network(image)
    return maps
