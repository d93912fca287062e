"""The network of the CIFAR-10 speedruns: a fixed whitening layer, groups of convolutions, and a small linear head.

After Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv 2404.00498), and Page, "How to train your
ResNet" (2018). Patches are whitened first, norms have no scale, and convolutions start as the identity.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError

_PATCH_SIZE = 2  # side of the whitened patches, pixels
_VARIANCE_FLOOR = 5e-4  # added to the variance of each direction, so that noise in weak directions is not amplified
_NORM_MOMENTUM = 0.4
_NORM_EPSILON = 1e-12
_MAX_FITTED_IMAGES = 5000
_PIXELS_PER_PASS = 1 << 18


class Whitening(nn.Module):
    """Projects 2x2 patches on the eigenvectors of their covariance, scaled to variance 1, and on their negatives.

    [B, C, H, W] -> [B, 8 C, H - 1, W - 1]. Random orthogonal filters until fit_to_data is called; not trained.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        filters = torch.empty(2 * channels * _PATCH_SIZE**2, channels, _PATCH_SIZE, _PATCH_SIZE)
        self.weight = nn.Parameter(filters, requires_grad=False)
        nn.init.orthogonal_(self.weight)

    def fit_to_data(self, images: Tensor, std: Sequence[float]) -> None:
        """Computes the filters from the covariance of the patches of up to 5,000 images, spread over the training set.

        images: uint8 [N, C, H, W]. std: standard deviation that each channel, in [0, 1], is divided by.
        The covariance comes from sums of integers, which are exact: it is the same for any number of threads.
        """
        images = images[:: -(-len(images) // _MAX_FITTED_IMAGES)].cpu()  # spread: the set may be sorted by class
        channels = images.shape[1]
        patch_values = channels * _PATCH_SIZE**2
        products = torch.zeros(patch_values, patch_values, dtype=torch.float64)
        sums, num_patches = torch.zeros(patch_values, dtype=torch.float64), 0
        for batch in torch.split(images, max(1, _PIXELS_PER_PASS // images[0, 0].numel())):
            patches = batch.double().unfold(2, _PATCH_SIZE, 1).unfold(3, _PATCH_SIZE, 1)  # [N, C, H - 1, W - 1, 2, 2]
            rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, patch_values)
            products, sums, num_patches = products + rows.T @ rows, sums + rows.sum(0), num_patches + len(rows)
        scale = (255 * torch.tensor(std).double()).repeat_interleave(_PATCH_SIZE**2)
        covariance = (products / num_patches - sums.outer(sums) / num_patches**2) / scale.outer(scale)
        variances, directions = torch.linalg.eigh(covariance)
        filters = (directions / (variances + _VARIANCE_FLOOR).sqrt()).T.reshape(-1, channels, _PATCH_SIZE, _PATCH_SIZE)
        self.weight.data.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class Group(nn.Module):
    """A group of convolutions with max pooling after the first one.

    With three or more convolutions, a shortcut adds the output of the first one to that of the last one.

    [B, C, H, W] -> [B, width, H // 2, W // 2].
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        input_channels = [channels] + [width] * (depth - 1)
        convs = [nn.Conv2d(count, width, 3, padding=1, bias=False) for count in input_channels]
        norms = [nn.BatchNorm2d(width, _NORM_EPSILON, _NORM_MOMENTUM) for _ in input_channels]
        self.convs, self.norms = nn.ModuleList(convs), nn.ModuleList(norms)
        for conv, norm in zip(convs, norms, strict=True):
            nn.init.dirac_(conv.weight.data[: conv.weight.shape[1]])
            norm.weight.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        first_output = x
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x)) if index else norm(F.max_pool2d(conv(x), 2))
            if index == last and last > 1:
                x = x + first_output
            x = F.gelu(x)
            first_output = x if index == 0 else first_output
        return x


class Speedrun(nn.Module):
    """Whitening, one group per width, global max pooling, linear head.

    [B, channels, H, W] -> [B, num_classes]. H and W are at least 2 ** len(widths) + 1: each group halves them.
    """

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
    """Returns Speedrun with model.widths and model.depth. Raises ConfigError for images that are too small."""
    min_image_size = 2 ** len(model.widths) + 1
    if image_size < min_image_size:
        raise ConfigError(
            f"model.widths={model.widths} takes images of at least {min_image_size} pixels, got {image_size}; "
            "shorten model.widths, or raise data.image_size"
        )
    return Speedrun(num_classes, channels, model.widths, model.depth)
