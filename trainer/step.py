"""One optimizer step: this rank's slice of a global batch in, its sums out, left on the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer import randomness
from trainer.losses import SampleLoss


class Slice(NamedTuple):
    """A rank's part of a global batch."""

    images: Tensor
    """uint8 [B, C, H, W]"""
    labels: Tensor
    """int64 [B]"""
    ids: Tensor
    """int64 [B], the samples' places in the training set"""
    weight: float
    """1, or 0 for a sample that only keeps a rank without any of its own in step with the others"""


class Step:
    """Forward, backward, update. Every rank makes the same calls, those without samples too."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        loss: SampleLoss,
        augment: Callable[[Tensor, Tensor, int], Tensor],
        seed: int,
        clip_grad_norm: float | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._augment = augment
        self._seed = seed
        self._clip_grad_norm = clip_grad_norm
        # Only dropout and its like draw while the model runs; reseeding costs what a small network's layer does.
        self._draws = any(_draws(module) for module in model.modules())
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]

    def __call__(self, batch: Slice, step: int, epoch: int, global_size: int) -> Tensor:
        """Takes the step and returns [loss sum, correct predictions] of the slice, float64 [2].

        global_size: samples of the batch on all ranks together.

        DDP takes the mean of the ranks' gradients. With each loss SUM scaled by world size / global_size that mean is
        the gradient of the mean loss of the global batch, however unevenly the batch is cut.
        """
        if self._draws:
            torch.manual_seed(randomness.key(self._seed, step, "dropout", self._accelerator.process_index) >> 1)
        if not batch.weight:  # what an idle rank runs must not enter the statistics
            self._set_norms(training=False)
        logits = self._model(self._augment(batch.images, batch.ids, epoch))
        loss_sum = self._loss(logits, batch.labels).sum() * batch.weight
        self._accelerator.backward(loss_sum * (self._accelerator.num_processes / global_size))
        if self._clip_grad_norm is not None:
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._clip_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        correct = (logits.detach().argmax(1) == batch.labels).sum() * batch.weight
        if not batch.weight:
            self._set_norms(training=True)
        return torch.stack([loss_sum.detach(), correct]).double()

    def _set_norms(self, training: bool) -> None:
        for module in self._norms:
            module.train(training)


def _draws(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "drop" in name or "stochastic" in name
