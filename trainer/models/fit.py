"""Builds the network of a run and checks that it takes the run's images, shards and settings.

The ranks call this before they train. launch/preflight.py calls it on the meta device, which allocates no weights.
"""

import copy

import torch
from torch import nn

from trainer.config.load import with_image_size
from trainer.config.schema import ModelSettings, RunConfig
from trainer.data.normalization import Normalization
from trainer.errors import DataError
from trainer.models.inspect import check_feature_maps
from trainer.models.lookup import build_model, freeze
from trainer.models.torchvision import pretrained_preprocessing
from trainer.text.escape import one_line


def apply_pretrained_preprocessing(config: RunConfig) -> tuple[RunConfig, Normalization | None]:
    """Replaces data.image_size=auto by a number; returns the normalization of data.normalize=weights, if it is set."""
    has_auto_size, has_weights_normalization = config.data.image_size == "auto", config.data.normalize == "weights"
    if not (has_auto_size or has_weights_normalization):
        return config, None
    preprocessing = pretrained_preprocessing(config.model)
    config = with_image_size(config, preprocessing.image_size) if has_auto_size else config
    return config, preprocessing.normalization if has_weights_normalization else None


def build_fitting_model(
    model: ModelSettings,
    config: RunConfig,
    world_size: int,
    num_classes: int,
    image_shape: tuple[int, int, int],
    batch_sizes: set[int],
) -> nn.Module:
    """Returns the network with fresh or pretrained weights, and with model.freeze applied.

    model: config.model, without model.pretrained if the weights come from a checkpoint.
    image_shape: [C, H, W] of the run's images.
    batch_sizes: the sizes of global batches that occur.
    Raises UserError if the network does not take these images, if a shard is too small for it, or if it has no part
    that the settings name.
    """
    channels, image_size, _ = image_shape
    module = build_model(model, num_classes, channels, image_size)
    freeze(module, model.freeze)
    _check_progressive_sizes(config, module, channels)
    smallest_size = min([image_size, *config.data.progressive_sizes])
    _check_smallest_shard(config, world_size, module, (channels, smallest_size, smallest_size), batch_sizes)
    check_feature_maps(module, config.log.feature_maps)
    return module


def _check_progressive_sizes(config: RunConfig, module: nn.Module, channels: int) -> None:
    """Raises DataError if the network does not accept one of data.progressive_sizes."""
    eval_module = copy.deepcopy(module).eval()
    for size in sorted(set(config.data.progressive_sizes)):
        try:
            with torch.no_grad():
                eval_module(torch.zeros(1, channels, size, size))
        except (RuntimeError, ValueError, AssertionError) as error:  # networks reject sizes with any of these
            reason = one_line(error)
            raise DataError(
                f"data.progressive_sizes={config.data.progressive_sizes}: {config.model.name} cannot process images of "
                f"{size} pixels ({reason}). Choose other sizes"
            ) from None


def _check_smallest_shard(
    config: RunConfig, world_size: int, module: nn.Module, image_shape: tuple[int, int, int], batch_sizes: set[int]
) -> None:
    """Raises DataError if some shard has one sample and a BatchNorm layer would see one value per channel.

    image_shape: [C, H, W] of the smallest images.
    """
    num_shards = config.train.virtual_ranks or world_size
    if not any(batch_size // num_shards <= 1 for batch_size in batch_sizes):
        return
    try:
        copy.deepcopy(module)(torch.zeros(1, *image_shape))
    except ValueError as error:
        ranks = "ranks" if config.train.virtual_ranks is None else "virtual ranks"
        raise DataError(
            f"batches of {' and '.join(map(str, sorted(batch_sizes)))} samples leave a single sample for one of "
            f"{num_shards} {ranks}, which {config.model.name} cannot normalize ({error}). Change "
            "data.global_batch_size, or set data.drop_last=true"
        ) from None
