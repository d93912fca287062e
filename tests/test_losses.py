"""Losses a sample: their means are torch's own."""

import pytest
import torch
from torch import nn

from trainer import losses
from trainer.settings import Loss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
ONE_HOT = torch.eye(5)[LABELS]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Loss(), nn.CrossEntropyLoss()(LOGITS, LABELS)),
        (Loss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, LABELS)),
        (Loss(name="mse"), nn.MSELoss()(LOGITS, ONE_HOT)),
        (Loss(name="l1"), nn.L1Loss()(LOGITS, ONE_HOT)),
    ],
)
def test_the_mean_is_torchs(settings: Loss, expected: torch.Tensor) -> None:
    per_sample = losses.SampleLoss(settings, training=True)(LOGITS, LABELS)
    assert per_sample.shape == (8,)
    torch.testing.assert_close(per_sample.mean(), expected)
    torch.testing.assert_close(losses.SampleLoss(settings, training=True).sum(LOGITS, LABELS), 8 * expected)


def test_labels_are_smoothed_in_training_only() -> None:
    smooth = Loss(label_smoothing=0.1)
    plain = losses.SampleLoss(Loss(), training=True)(LOGITS, LABELS)
    assert torch.equal(losses.SampleLoss(smooth, training=False)(LOGITS, LABELS), plain)
    assert not torch.equal(losses.SampleLoss(smooth, training=True)(LOGITS, LABELS), plain)
