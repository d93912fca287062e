"""A model and uint8 images in, loss, confusion counts and per-class scores out; each sample counted exactly once.

The split is cut into fixed chunks, whatever the number of ranks; rank r takes chunks r, r + world size, ...
Each chunk fills its own slot of a table that is zero elsewhere, so that adding the ranks' tables is exact, and the
slots are summed in one order: the result is the same on any number of ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.tta import Views

CURVES = 20  # classes of which each sample's probability is kept, for precision-recall curves


@dataclass(frozen=True, slots=True)
class ClassScore:
    """precision, recall, f1 in [0, 1]; 0 where nothing was predicted or nothing is there. support: true samples."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss: float
    accuracy: float
    num_samples: int
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    """confusion[true][predicted], counts."""
    tta_accuracy: float | None = None
    """with test-time augmentation, where it is asked for; all else here is without"""


class Predictions(NamedTuple):
    """Of each sample of a split, in its order."""

    labels: Tensor
    """int64 [N], the class that was predicted"""
    confidence: Tensor
    """float32 [N], in [0, 1]: how sure the network was of it"""
    probabilities: Tensor
    """float32 [N, CURVES or num_classes], in [0, 1], of each of the first classes"""


class Tally:
    """What one rank counts of a split: float64 loss sums by chunk, int64 confusion counts, and what it predicts; all
    zero where another rank has to count."""

    def __init__(self, num_samples: int, batch_size: int, num_classes: int, device: torch.device) -> None:
        self._batch_size = batch_size
        self.predicted = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(num_samples, device=device)
        self.probabilities = torch.zeros(num_samples, min(num_classes, CURVES), device=device)
        self.loss_sums = torch.zeros(-(-num_samples // batch_size), dtype=torch.float64, device=device)
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self.tta_correct = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, chunk: int, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        """logits [B, num_classes], labels int64 [B], losses [B]; stays on the device, waits for nothing."""
        num_classes, at = logits.shape[1], slice(chunk * self._batch_size, chunk * self._batch_size + len(labels))
        self.loss_sums[chunk] = losses.double().sum()
        predicted = logits.argmax(1)
        self.predicted[at] = predicted
        probabilities = logits.softmax(1)
        self.confidence[at] = probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1)
        self.probabilities[at] = probabilities[:, :CURVES]
        cells = labels * num_classes + predicted
        self.confusion.index_add_(0, cells, torch.ones_like(cells))  # bincount would wait for a GPU


def score(loss_sum: float, confusion: Tensor, classes: tuple[str, ...], tta_correct: int | None = None) -> Evaluation:
    """Scores from the counts of all ranks: confusion int64 [num_classes, num_classes], true by predicted."""
    counts = confusion.double()
    hits, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    total = int(confusion.sum())
    return Evaluation(
        loss=loss_sum / total,
        accuracy=int(confusion.trace()) / total,
        num_samples=total,
        classes=tuple(
            ClassScore(name, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, name in enumerate(classes)
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        tta_accuracy=None if tta_correct is None else tta_correct / total,
    )


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)


def evaluate(
    predict: Callable[[Tensor], Tensor],
    views: Views | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunks: Iterable[tuple[int, Tensor, Tensor]],
    num_samples: int,
    batch_size: int,
    classes: tuple[str, ...],
    add_ranks: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Evaluation, Predictions]:
    """This rank's chunks through `predict` (uint8 images to logits), the counts of all ranks into scores.

    num_samples: of the split; batch_size: of its chunks, the last one may be shorter.
    """
    tally = Tally(num_samples, batch_size, len(classes), device)
    with torch.no_grad():
        for chunk, images, labels in chunks:
            logits = predict(images).float()
            tally.add(chunk, logits, labels, loss(logits, labels))
            if views is not None:
                others = views(images)
                mean = logits * (1 - sum(view.weight for view in others))
                for view in others:
                    mean += view.weight * predict(view.images).float()
                tally.tta_correct += (mean.argmax(1) == labels).sum()
    loss_sum = float(add_ranks(tally.loss_sums).sum())
    confusion = add_ranks(tally.confusion).view(len(classes), -1).cpu()
    tta_correct = None if views is None else int(add_ranks(tally.tta_correct))
    kept = (add_ranks(part).cpu() for part in (tally.predicted, tally.confidence, tally.probabilities))
    predictions = Predictions(*kept)
    return score(loss_sum, confusion, classes, tta_correct), predictions
