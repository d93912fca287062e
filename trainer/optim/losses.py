"""Losses per sample. The caller computes sums or means over a batch, because it knows the global number of samples.

To add a loss, write a function like `mse` and list it in LOSSES in config/plugins.py. It takes logits float
[B, num_classes], labels int64 [B] and loss.label_smoothing, and returns the loss of each sample, float [B].
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from trainer.config.plugins import LOSSES, load_plugin
from trainer.config.schema import LossSettings


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Returns the cross-entropy of each sample: float [B]."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def mse(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Returns the mean squared distance to the one-hot target, averaged over classes as in nn.MSELoss: float [B]."""
    return (logits - _one_hot(logits, labels)).square().mean(1)


def l1(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Returns the mean absolute distance to the one-hot target, averaged over classes as in nn.L1Loss: float [B]."""
    return (logits - _one_hot(logits, labels)).abs().mean(1)


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, logits.shape[1]).to(logits.dtype)


class SampleLoss:
    """The loss that the settings name, per sample.

    Labels are smoothed only in training, so that test losses of runs with different smoothing are comparable.
    """

    def __init__(self, loss: LossSettings, training: bool) -> None:
        self._function: Callable[[Tensor, Tensor, float], Tensor] = load_plugin(LOSSES, loss.name)
        self._label_smoothing = loss.label_smoothing if training else 0.0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of each sample, float [B]. Takes logits float [B, num_classes] and labels int64 [B]."""
        return self._function(logits, labels, self._label_smoothing)

    def sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the sum over the samples, float []. Takes the same arguments as a call."""
        if self._function is cross_entropy:  # one operation instead of two
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self._label_smoothing)
        return self(logits, labels).sum()


# Loss sums are rounded to multiples of this. float64 then adds them without error in any order, up to 2**29, so the
# loss in metrics.jsonl does not depend on the number of ranks or on interruptions.
_LOSS_QUANTUM = 2.0**-24


def quantize_losses(losses: Tensor) -> Tensor:
    """Returns the losses as float64, rounded to multiples of 2**-24."""
    return (losses.double() / _LOSS_QUANTUM).round() * _LOSS_QUANTUM
