"""A network in; its max pooling is faster on a CPU where it can be, by the same numbers and gradients, if finite.

PyTorch's kernel goes from pixel to pixel, and where there are fewer than eight channels from number to number; with
each it writes down where the largest value was, wanted or not. Here the first of each two rows, of the whole batch, is
compared with the second, and the same is done with columns. That is faster in evaluation up to 32 channels, in training
in bf16 up to 7: LeNet's first pooling.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_CHANNELS, _MOST_THAT_LEARN = 32, 7  # of more PyTorch's kernel is as fast
_ROWS, _COLUMNS = 1, 2  # of [B, H, W, C]


def compare_pictures(network: nn.Module) -> None:
    """Every nn.MaxPool2d by 2 x 2 does so from now on where it is faster."""
    for module in network.modules():
        if isinstance(module, nn.MaxPool2d) and _fits(module):
            module.forward = _forward  # type: ignore[assignment, method-assign]


def _fits(pool: nn.MaxPool2d) -> bool:
    is_torchs_own = type(pool).forward is nn.MaxPool2d.forward
    is_by_two = _both(pool.kernel_size) == _both(pool.stride) == (2, 2)
    is_plain = _both(pool.padding) == (0, 0) and _both(pool.dilation) == (1, 1)
    return is_torchs_own and is_by_two and is_plain and not (pool.ceil_mode or pool.return_indices)


def _both(sides: Any) -> tuple[int, ...]:
    return (sides, sides) if isinstance(sides, int) else tuple(sides)


def _forward(images: Tensor) -> Tensor:
    learns = torch.is_grad_enabled() and images.requires_grad
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    if is_traced or not _suits(images, learns):  # a trace names what is done, not how
        return F.max_pool2d(images, 2)
    pixels = images.permute(0, 2, 3, 1)  # as they lie in memory
    pooled: Tensor = _MaxPool.apply(pixels) if learns else _larger(_larger(pixels, _ROWS), _COLUMNS)
    return pooled.permute(0, 3, 1, 2)


def _suits(images: Tensor, learns: bool) -> bool:
    """Few channels, laid out pixel by pixel, of even sides."""
    if images.dim() != 4 or not images.numel() or images.shape[2] % 2 or images.shape[3] % 2:
        return False
    if images.dtype not in ((torch.bfloat16,) if learns else (torch.bfloat16, torch.float32)):
        return False
    is_narrow = images.shape[1] <= (_MOST_THAT_LEARN if learns else _MOST_CHANNELS)
    return is_narrow and images.is_contiguous(memory_format=torch.channels_last)


class _MaxPool(torch.autograd.Function):
    """[B, H, W, C] -> [B, H / 2, W / 2, C]."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor) -> Tensor:
        leads = []
        for axis in (_COLUMNS, _ROWS):  # in this order: of four equal ones the first counts
            first, second = (part.contiguous() for part in _pairs(pixels, axis))
            leads.append(second - first)
            pixels = torch.maximum(first, second)
        ctx.save_for_backward(*leads)
        return pixels

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        of_columns, of_rows = ctx.saved_tensors
        return _dealt(_dealt(gradient.contiguous(), of_rows, _ROWS), of_columns, _COLUMNS)


def _larger(pixels: Tensor, axis: int) -> Tensor:
    """Of each two along an axis."""
    return torch.maximum(*_pairs(pixels, axis))


def _dealt(gradient: Tensor, lead: Tensor, axis: int) -> Tensor:
    """The gradient of both of each two along an axis: all for the larger one, for the first of equal ones, as in
    PyTorch. lead: by how much the second one is larger."""
    # As torch.where(lead > 0, gradient, 0), which is not vectorized on a CPU and takes ten times as long.
    to_second = torch.ops.aten.threshold_backward(gradient, lead, 0)
    return torch.stack((gradient - to_second, to_second), axis + 1).flatten(axis, axis + 1)


def _pairs(pixels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The first and the second of each two along an axis."""
    first, second = pixels.unflatten(axis, (-1, 2)).unbind(axis + 1)
    return first, second
