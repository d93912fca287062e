"""Logits and labels in, one loss a sample out: [B]. A sum or a mean is the caller's, who knows over what."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from trainer.config.plugins import LOSSES, load_plugin
from trainer.config.schema import LossSettings


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """logits float [B, num_classes], labels int64 [B] -> float [B]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def mse(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean squared distance from the one-hot target, as nn.MSELoss means it: over the classes too."""
    return (logits - _one_hot(logits, labels)).square().mean(1)


def l1(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean absolute distance from the one-hot target, as nn.L1Loss means it."""
    return (logits - _one_hot(logits, labels)).abs().mean(1)


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


class SampleLoss:
    """The loss by its name. Labels are smoothed in training only, so that test losses of any two runs compare."""

    def __init__(self, loss: LossSettings, training: bool) -> None:
        self._name = loss.name
        self._function: Callable[[Tensor, Tensor, float], Tensor] = load_plugin(LOSSES, loss.name)
        self._smoothing = loss.label_smoothing if training else 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits float [B, num_classes], labels int64 [B] -> float [B]."""
        return self._function(logits, labels, self._smoothing)

    def sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Over the samples: float []. In fewer operations where torch has them in one."""
        if self._name == "cross_entropy":
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._smoothing)
        return self(logits, labels).sum()
