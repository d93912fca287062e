"""Losses per sample: their means equal torch's own losses."""

import pytest
import torch
from torch import nn

from trainer.config.schema import LossSettings
from trainer.optim.losses import SampleLoss

LOGITS = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
ONE_HOT = torch.eye(5)[LABELS]


@pytest.mark.parametrize(
    ("settings", "expected_mean"),
    [
        (LossSettings(), nn.CrossEntropyLoss()(LOGITS, LABELS)),
        (LossSettings(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)(LOGITS, LABELS)),
        (LossSettings(name="mse"), nn.MSELoss()(LOGITS, ONE_HOT)),
        (LossSettings(name="l1"), nn.L1Loss()(LOGITS, ONE_HOT)),
    ],
)
def test_mean_and_sum_of_sample_losses_equal_torchs(settings: LossSettings, expected_mean: torch.Tensor) -> None:
    loss = SampleLoss(settings, training=True)
    sample_losses = loss(LOGITS, LABELS)
    assert sample_losses.shape == (8,)
    torch.testing.assert_close(sample_losses.mean(), expected_mean)
    torch.testing.assert_close(loss.sum(LOGITS, LABELS), 8 * expected_mean)


def test_labels_are_smoothed_only_in_training() -> None:
    smoothed, unsmoothed = LossSettings(label_smoothing=0.1), LossSettings()
    expected = SampleLoss(unsmoothed, training=True)
    evaluation, training = SampleLoss(smoothed, training=False), SampleLoss(smoothed, training=True)
    assert torch.equal(evaluation(LOGITS, LABELS), expected(LOGITS, LABELS))
    assert torch.equal(evaluation.sum(LOGITS, LABELS), expected.sum(LOGITS, LABELS))
    assert not torch.equal(training(LOGITS, LABELS), expected(LOGITS, LABELS))
