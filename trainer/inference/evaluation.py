"""Evaluates a network on a split: loss, accuracy, confusion matrix and scores of each class, equal on any world size.

The split is cut into fixed chunks of eval.batch_size. Rank r evaluates chunks r, r + world size, ..., so that each
sample is evaluated exactly once. Each sample fills its own row of tables that are zero elsewhere, so that the sum over
the ranks is exact. The losses are added exactly and rounded once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.schema import RunConfig
from trainer.data.splits import TensorSplit, evaluation_chunks
from trainer.distributed.world import World
from trainer.inference.tta import Views, build_views
from trainer.optim.losses import SampleLoss

MAX_CURVES = 20  # classes with precision-recall curves: the first ones, whose probabilities are kept for each sample
# Chunks are joined until they have this many logits. The number of joined chunks depends on the world size, and must
# not change a row's results. A CPU splits a row's sum among threads only if the row has at least this many numbers, and
# then its chunk is never joined with another.
_JOINED_LOGITS = 1 << 15


@dataclass(frozen=True, slots=True)
class ClassScore:
    """Scores of one class. precision, recall and f1 are in [0, 1], and 0 where their denominator is 0."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """number of samples of this class"""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a network on a split; all but tta_accuracy are without test-time augmentation."""

    loss: float
    """mean over the samples, without label smoothing"""
    accuracy: float
    """in [0, 1]"""
    num_samples: int
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    """confusion[true][predicted], counts"""
    tta_accuracy: float | None = None
    """in [0, 1], with test-time augmentation; None if eval.tta is none"""


class Predictions(NamedTuple):
    """A prediction for each sample of a split, in the order of the split."""

    labels: Tensor
    """int64 [N], the predicted class"""
    confidence: Tensor
    """float32 [N], in [0, 1], the probability of the predicted class"""
    probabilities: Tensor
    """float32 [N, min(num_classes, MAX_CURVES)], in [0, 1], of the first classes"""


class EvaluationCounts:
    """One rank's results for a split. Rows of samples that other ranks evaluate are zero: add the ranks' tensors.

    On a CPU the logits of several chunks are counted together: after a convolution each small operation costs 20 to
    40 µs. On a GPU each chunk is counted alone: how a row is reduced there may depend on the number of rows.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_classes: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """num_samples: in the whole split; batch_size: samples in a chunk; loss: (logits, labels) to float [B]."""
        self._batch_size, self._num_classes, self._loss = batch_size, num_classes, loss
        self._pending: list[tuple[int, Tensor, Tensor]] = []
        self._num_pending_logits = 0
        self.predicted = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(num_samples, device=device)
        self.probabilities = torch.zeros(num_samples, min(num_classes, MAX_CURVES), device=device)
        self.losses = torch.zeros(num_samples, device=device)
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self.tta_correct = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, chunk: int, logits: Tensor, labels: Tensor) -> None:
        """Adds the results of a chunk: logits float32 [B, num_classes], labels int64 [B]. Does not wait for a GPU."""
        self._pending.append((chunk * self._batch_size, logits, labels))
        self._num_pending_logits += logits.numel()
        if self._num_pending_logits >= _JOINED_LOGITS or logits.device.type != "cpu":
            self.flush()

    def flush(self) -> None:
        """Counts the chunks that were added since the last flush."""
        if not self._pending:
            return
        starts, all_logits, all_labels = zip(*self._pending, strict=True)
        logits, labels = torch.cat(all_logits), torch.cat(all_labels)
        positions = torch.cat(
            [
                torch.arange(start, start + len(chunk_labels), device=labels.device)
                for start, chunk_labels in zip(starts, all_labels, strict=True)
            ]
        )
        self._pending, self._num_pending_logits = [], 0
        predicted, probabilities = logits.argmax(1), logits.softmax(1)
        self.losses.index_copy_(0, positions, self._loss(logits, labels))
        self.predicted.index_copy_(0, positions, predicted)
        self.confidence.index_copy_(0, positions, probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1))
        self.probabilities.index_copy_(0, positions, probabilities[:, :MAX_CURVES])
        cells = labels * self._num_classes + predicted
        self.confusion.index_add_(0, cells, torch.ones_like(cells))  # bincount would wait for a GPU


def compute_scores(
    loss_sum: float, confusion: Tensor, classes: tuple[str, ...], tta_correct: int | None = None
) -> Evaluation:
    """Returns the scores of a split from the sums over all ranks.

    confusion: int64 [num_classes, num_classes], true by predicted; tta_correct: samples that test-time augmentation
    classified correctly.
    """
    counts = confusion.double()
    hits, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = _ratio(hits, predicted), _ratio(hits, support)
    f1 = _ratio(2 * hits, support + predicted)
    num_samples = int(confusion.sum())
    return Evaluation(
        loss=loss_sum / num_samples,
        accuracy=int(confusion.trace()) / num_samples,
        num_samples=num_samples,
        classes=tuple(
            ClassScore(name, float(precision[i]), float(recall[i]), float(f1[i]), int(support[i]))
            for i, name in enumerate(classes)
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        tta_accuracy=None if tta_correct is None else tta_correct / num_samples,
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)


def evaluate_chunks(
    predict: Callable[[Tensor], Tensor],
    views: Views | None,
    loss: Callable[[Tensor, Tensor], Tensor],
    chunks: Iterable[tuple[int, Tensor, Tensor]],
    num_samples: int,
    batch_size: int,
    classes: tuple[str, ...],
    all_reduce_sum: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[Evaluation, Predictions]:
    """Evaluates this rank's chunks and returns the scores and predictions of all ranks.

    predict: uint8 [B, C, H, W] to logits [B, num_classes]; views: for test-time augmentation; loss: (logits, labels) to
    float [B]; chunks: (index, images, labels) of this rank; num_samples: in the whole split; batch_size: samples in a
    chunk, the last may have fewer; all_reduce_sum: adds a tensor over the ranks, and is called on every rank.
    """
    counts = EvaluationCounts(num_samples, batch_size, len(classes), loss, device)
    with torch.no_grad():
        for chunk, images, labels in chunks:
            logits = predict(images).float()
            counts.add(chunk, logits, labels)
            if views is not None:
                more_views = views(images)
                mean = logits * (1 - sum(view.weight for view in more_views))
                for view in more_views:
                    mean += view.weight * predict(view.images).float()
                counts.tta_correct += (mean.argmax(1) == labels).sum()
        counts.flush()
    loss_sum = math.fsum(all_reduce_sum(counts.losses).tolist())
    confusion = all_reduce_sum(counts.confusion).view(len(classes), -1).cpu()
    tta_correct = None if views is None else int(all_reduce_sum(counts.tta_correct))
    predictions = Predictions(
        all_reduce_sum(counts.predicted).cpu(),
        all_reduce_sum(counts.confidence).cpu(),
        all_reduce_sum(counts.probabilities).cpu(),
    )
    return compute_scores(loss_sum, confusion, classes, tta_correct), predictions


def evaluate_split(
    predict: Callable[[Tensor], Tensor], split: TensorSplit, classes: tuple[str, ...], config: RunConfig, world: World
) -> tuple[Evaluation, Predictions]:
    """Evaluates each sample of a split once, shared among the ranks. Every rank must call it.

    predict: uint8 [B, C, H, W] to logits [B, num_classes].
    """
    batch_size = config.eval.batch_size
    evaluation, predictions = evaluate_chunks(
        predict,
        build_views(config.eval.tta),
        SampleLoss(config.loss, training=False),
        evaluation_chunks(split, batch_size, world),
        len(split),
        batch_size,
        classes,
        world.all_reduce_sum,
        world.device,
    )
    assert evaluation.num_samples == len(split), f"evaluated {evaluation.num_samples} of {len(split)} samples"
    return evaluation, predictions
