"""A model and uint8 images in, loss, confusion counts and per-class scores out; each sample counted exactly once.

The split is cut into fixed chunks, whatever the number of ranks; rank r takes chunks r, r + world size, ...
Each sample fills its own row of tables that are zero elsewhere, so that adding the ranks' tables is exact, and the sum
of the losses is the exact one, rounded once: the result is the same on any number of ranks.
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

MAX_CURVES = 20  # classes of which each sample's probability is kept, for precision-recall curves
# How chunks are joined depends on the ranks. From as many numbers in a row on, a CPU's threads would share a sum.
_LOGITS_AT_ONCE = 1 << 15


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


class EvaluationCounts:
    """What one rank counts of a split: a loss, a class and probabilities a sample, and confusion counts; all zero where
    another rank has to count.

    On a CPU logits of some chunks are counted at once: after a convolution each small operation costs 20 to 40 µs. On a
    GPU each chunk is counted alone: how a row is reduced there may depend on how many there are.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        num_classes: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self._batch_size, self._num_classes, self._loss = batch_size, num_classes, loss
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._num_waiting = 0
        self.predicted = torch.zeros(num_samples, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(num_samples, device=device)
        self.probabilities = torch.zeros(num_samples, min(num_classes, MAX_CURVES), device=device)
        self.losses = torch.zeros(num_samples, device=device)
        self.confusion = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)
        self.tta_correct = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, chunk: int, logits: Tensor, labels: Tensor) -> None:
        """logits float32 [B, num_classes], labels int64 [B]; stays on the device, waits for nothing."""
        self._waiting.append((chunk * self._batch_size, logits, labels))
        self._num_waiting += logits.numel()
        if self._num_waiting >= _LOGITS_AT_ONCE or logits.device.type != "cpu":
            self.count()

    def count(self) -> None:
        """What has been added and not been counted yet."""
        if not self._waiting:
            return
        firsts, all_logits, all_labels = zip(*self._waiting, strict=True)
        logits, labels = torch.cat(all_logits), torch.cat(all_labels)
        cuts = [(first, first + len(some)) for first, some in zip(firsts, all_labels, strict=True)]
        places = torch.cat([torch.arange(first, end, device=labels.device) for first, end in cuts])
        self._waiting, self._num_waiting = [], 0
        predicted, probabilities = logits.argmax(1), logits.softmax(1)
        self.losses.index_copy_(0, places, self._loss(logits, labels))
        self.predicted.index_copy_(0, places, predicted)
        self.confidence.index_copy_(0, places, probabilities.gather(1, predicted.unsqueeze(1)).squeeze(1))
        self.probabilities.index_copy_(0, places, probabilities[:, :MAX_CURVES])
        cells = labels * self._num_classes + predicted
        self.confusion.index_add_(0, cells, torch.ones_like(cells))  # bincount would wait for a GPU


def compute_scores(
    loss_sum: float, confusion: Tensor, classes: tuple[str, ...], tta_correct: int | None = None
) -> Evaluation:
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


def evaluate_chunks(
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
    tally = EvaluationCounts(num_samples, batch_size, len(classes), loss, device)
    with torch.no_grad():
        for chunk, images, labels in chunks:
            logits = predict(images).float()
            tally.add(chunk, logits, labels)
            if views is not None:
                others = views(images)
                mean = logits * (1 - sum(view.weight for view in others))
                for view in others:
                    mean += view.weight * predict(view.images).float()
                tally.tta_correct += (mean.argmax(1) == labels).sum()
        tally.count()
    loss_sum = math.fsum(add_ranks(tally.losses).tolist())
    confusion = add_ranks(tally.confusion).view(len(classes), -1).cpu()
    tta_correct = None if views is None else int(add_ranks(tally.tta_correct))
    kept = (add_ranks(part).cpu() for part in (tally.predicted, tally.confidence, tally.probabilities))
    predictions = Predictions(*kept)
    return compute_scores(loss_sum, confusion, classes, tta_correct), predictions


def evaluate_split(
    predict: Callable[[Tensor], Tensor], part: TensorSplit, classes: tuple[str, ...], config: RunConfig, world: World
) -> tuple[Evaluation, Predictions]:
    """Each sample once, on whichever rank. predict: uint8 [B, C, H, W] in, logits [B, num_classes] out."""
    batch_size = config.eval.batch_size
    found, predictions = evaluate_chunks(
        predict,
        build_views(config.eval.tta),
        SampleLoss(config.loss, training=False),
        evaluation_chunks(part, batch_size, world),
        len(part),
        batch_size,
        classes,
        world.all_reduce_sum,
        world.device,
    )
    assert found.num_samples == len(part), f"evaluated {found.num_samples} of {len(part)} samples"
    return found, predictions
