"""The network of the speedruns: a whitening layer that is not trained, groups of convolutions, a small linear head.

After Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv 2404.00498), which builds on Page's "How to
train your ResNet" (2018): patches whitened first, norms without scales, convolutions that begin as the identity.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError

_PATCH = 2  # side of what the first layer whitens, pixels
_VARIANCE_FLOOR = 5e-4  # added to each direction's variance: what hardly varies is noise
_NORM_MOMENTUM = 0.4
_NORM_EPSILON = 1e-12
_PIXELS_AT_ONCE = 1 << 18


class Whitening(nn.Module):
    """2 x 2 patches along the eigenvectors of their covariance, each scaled to variance 1, and the same negated.

    [B, C, H, W] -> [B, 8 C, H - 1, W - 1].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * channels * _PATCH**2, channels, _PATCH, _PATCH), requires_grad=False)
        nn.init.orthogonal_(self.weight)

    def fit(self, images: Tensor, std: Tensor) -> None:
        """Takes the patches' covariance from images, uint8 [N, C, H, W]; std: float [C], what values in [0, 1] will be
        divided by. It is made of sums of whole numbers: the same for any number of threads."""
        channels = images.shape[1]
        size = channels * _PATCH**2
        products, sums, count = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
        at_once = max(1, _PIXELS_AT_ONCE // images[0, 0].numel())
        for start in range(0, len(images), at_once):
            some = images[start : start + at_once].double()
            patches = some.unfold(2, _PATCH, 1).unfold(3, _PATCH, 1)  # [N, C, H - 1, W - 1, 2, 2]
            rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, size)
            products, sums, count = products + rows.T @ rows, sums + rows.sum(0), count + len(rows)
        scale = (255 * std.double()).repeat_interleave(_PATCH**2)
        covariance = (products / count - sums.outer(sums) / count**2) / scale.outer(scale)
        variances, directions = torch.linalg.eigh(covariance)
        filters = (directions / (variances + _VARIANCE_FLOOR).sqrt()).T.reshape(-1, channels, _PATCH, _PATCH)
        self.weight.data.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Group(nn.Module):
    """Convolutions, the first one pooled; with three and more, what the first gives is added to what the last does.

    [B, C, H, W] -> [B, width, H // 2, W // 2].
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        inputs = [channels] + [width] * (depth - 1)
        convs = [nn.Conv2d(number, width, 3, padding=1, bias=False) for number in inputs]
        norms = [nn.BatchNorm2d(width, _NORM_EPSILON, _NORM_MOMENTUM) for _ in inputs]
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        for conv, norm in zip(convs, norms, strict=True):
            nn.init.dirac_(conv.weight.data[: conv.weight.shape[1]])
            norm.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        first = x
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)) if index else norm(F.max_pool2d(conv(x), 2))
            if index == last and last > 1:
                x = x + first
            x = F.gelu(x)
            first = x if index == 0 else first
        return x


class Speedrun(nn.Module):
    """[B, channels, H, W] -> [B, num_classes], for any H and W that the groups can halve."""

    def __init__(self, num_classes: int, channels: int, widths: list[int], depth: int) -> None:
        super().__init__()
        self.whitening = Whitening(channels)
        self.groups = nn.Sequential(
            *(Group(*pair, depth) for pair in itertools.pairwise([len(self.whitening.weight), *widths]))
        )
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.whitening(x)))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits


def speedrun(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    smallest = 2 ** len(model.widths) + 1
    if image_size < smallest:
        raise ConfigError(
            f"model.widths={model.widths} takes images of {smallest} pixels and more, got {image_size}; "
            "shorten it, or raise data.image_size"
        )
    return Speedrun(num_classes, channels, model.widths, model.depth)
