"""A run's first batch in, its images out: as they are stored, and as the network is given them."""

import torch
from torch import Tensor

from trainer.data.augment import Augment, Normalization
from trainer.data.sampler import BatchSampler
from trainer.data.splits import TensorSplit

_SAMPLES = 36


def first_batch_images(
    train: TensorSplit, batches: BatchSampler, augment: Augment, normalization: Normalization
) -> tuple[Tensor, Tensor]:
    """uint8 [n, H, W, C] each, of the first epoch, on the CPU; the second one may have another size."""
    ids = batches.ids(0)[:_SAMPLES].to(train.images.device)
    stored = train.images[ids]
    batch = _floats(train, ids, augment)
    if augment.mixes:
        partners = batches.partners(0)[:_SAMPLES].to(ids.device)
        batch, _ = augment.mix(batch, _floats(train, partners, augment), ids.to(batch.device), epoch=0)
    mean, std = (
        torch.tensor(values, device=batch.device).view(1, -1, 1, 1)
        for values in (normalization.mean, normalization.std)
    )
    pixels = (255 * (batch * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return stored.permute(0, 2, 3, 1).cpu(), pixels.permute(0, 2, 3, 1).cpu()


def _floats(train: TensorSplit, ids: Tensor, augment: Augment) -> Tensor:
    images = train.images[ids].to(augment.device)  # a large data set lies in the host's memory
    return augment.normalize(augment.pixels(images, ids.to(augment.device), epoch=0))
