"""Losses a sample: their means are torch's own."""

import pytest
import torch
from torch import nn

from trainer.config.schema import LossSettings
from trainer.optim.losses import SampleLoss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
ONE_HOT = torch.eye(5)[LABELS]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (LossSettings(), nn.CrossEntropyLoss()(LOGITS, LABELS)),
        (LossSettings(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, LABELS)),
        (LossSettings(name="mse"), nn.MSELoss()(LOGITS, ONE_HOT)),
        (LossSettings(name="l1"), nn.L1Loss()(LOGITS, ONE_HOT)),
    ],
)
def test_the_mean_is_torchs(settings: LossSettings, expected: torch.Tensor) -> None:
    per_sample = SampleLoss(settings, training=True)(LOGITS, LABELS)
    assert per_sample.shape == (8,)
    torch.testing.assert_close(per_sample.mean(), expected)
    torch.testing.assert_close(SampleLoss(settings, training=True).sum(LOGITS, LABELS), 8 * expected)


def test_labels_are_smoothed_in_training_only() -> None:
    smooth = LossSettings(label_smoothing=0.1)
    plain = SampleLoss(LossSettings(), training=True)(LOGITS, LABELS)
    assert torch.equal(SampleLoss(smooth, training=False)(LOGITS, LABELS), plain)
    assert not torch.equal(SampleLoss(smooth, training=True)(LOGITS, LABELS), plain)
