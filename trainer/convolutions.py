"""A network in; its convolutions over small pictures learn faster on a CPU, by the same sums.

A convolution's weight gradient adds up products along the rows of a picture. A CPU's matrix unit (AMX) takes 32 of them
at once, and where rows have 4 or 8 pixels, as in a network's last layers, most of it idles. Here many pictures are laid
side by side, a column of zeros between any two, so that rows are long.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDEST = 8  # pixels; above, laying costs more than it gives
_FEWEST_CHANNELS = 64  # in and out; below, a step has too little to do to pay for more calls
_MOST_TOGETHER = 32
_FEWEST_TOGETHER = 4

Sizes = tuple[int, int]


def lay_side_by_side(network: nn.Module) -> None:
    """Every large convolution of stride 1 that keeps its pictures' size does so from now on where they are small."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and _fits(module):
            module._conv_forward = _Forward(module.padding)  # type: ignore[assignment, arg-type]


def _fits(conv: nn.Conv2d) -> bool:
    is_torchs_own = type(conv)._conv_forward is nn.Conv2d._conv_forward
    is_plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.padding_mode == "zeros"
    keeps_size = conv.padding == tuple(side // 2 for side in conv.kernel_size) and all(s % 2 for s in conv.kernel_size)
    is_large = min(conv.in_channels, conv.out_channels) >= _FEWEST_CHANNELS
    return is_torchs_own and is_plain and keeps_size and is_large and conv.kernel_size[1] > 1


class _Forward:
    """nn.Conv2d's own step between its weights and F.conv2d."""

    def __init__(self, padding: Sizes) -> None:
        self._padding = padding

    def __call__(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        learns = torch.is_grad_enabled() and weight.requires_grad
        if not learns or images.dim() != 4 or not len(images) or images.shape[-1] > _WIDEST:
            return F.conv2d(images, weight, bias, padding=self._padding)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight, bias = images.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        found: Tensor = _Convolution.apply(images, weight, bias, self._padding)
        return found


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, padding: Sizes) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.padding, ctx.has_bias = padding, bias is not None
        return F.conv2d(images, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None, None]:
        images, weight = ctx.saved_tensors
        together = _together(len(images))
        # Not by the call below: with the bias it would make the weight's gradient too, wanted or not.
        of_bias = gradient.sum((0, 2, 3)) if ctx.has_bias else None
        of_images, of_weight = _gradients(gradient, images, weight, ctx.padding, ctx.needs_input_grad[0], together == 1)
        if together > 1:
            gradient, images = (_strips(tensor, ctx.padding[1], together) for tensor in (gradient, images))
            _, of_weight = _gradients(gradient, images, weight, ctx.padding, False, True)
        return of_images, of_weight, of_bias, None


def _gradients(gradient: Tensor, images: Tensor, weight: Tensor, padding: Sizes, *wanted: bool) -> list[Tensor]:
    """Of images and weight, where wanted."""
    found: list[Tensor] = torch.ops.aten.convolution_backward(
        gradient, images, weight, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (*wanted, False)
    )
    return found[:2]


def _together(batch_size: int) -> int:
    """How many pictures become one: what divides the batch, 1 if nothing large enough does."""
    fitting = [n for n in range(_FEWEST_TOGETHER, _MOST_TOGETHER + 1) if batch_size % n == 0]
    return max(fitting, default=1)


def _strips(images: Tensor, gap: int, together: int) -> Tensor:
    """[B, C, H, W] -> [B / together, C, H, together * (W + gap)], channels last; gap: columns of zeros after each."""
    number, channels, height, width = images.shape
    strips = images.new_zeros(number // together, height, together, width + gap, channels)
    rows = images.permute(0, 2, 3, 1).reshape(-1, together, height, width, channels)
    strips[:, :, :, :width] = rows.transpose(1, 2)
    return strips.view(len(strips), height, -1, channels).permute(0, 3, 1, 2)
