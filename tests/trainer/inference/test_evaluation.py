"""Evaluation scores equal scikit-learn's, and do not depend on the chunk size or the number of ranks."""

import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn import functional as F

from trainer.inference import evaluation
from trainer.inference.evaluation import Evaluation, EvaluationCounts, Predictions, compute_scores, evaluate_chunks
from trainer.inference.tta import build_views

NUM_CLASSES = 5
RNG = np.random.default_rng(3)
LABELS = torch.from_numpy(RNG.integers(0, NUM_CLASSES - 1, 700))  # the last class has no sample
LOGITS = torch.from_numpy(RNG.normal(size=(700, NUM_CLASSES))).float() + 2 * F.one_hot(LABELS, NUM_CLASSES)
LOGITS[:, 1] -= 100  # class 1 is never predicted
CLASSES = tuple("abcde")


def sample_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def counts_of_ranks(chunk_size: int, num_ranks: int) -> list[EvaluationCounts]:
    """Returns the counts of each rank after evaluating its chunks of LOGITS."""
    counts = [
        EvaluationCounts(700, chunk_size, NUM_CLASSES, sample_losses, torch.device("cpu")) for _ in range(num_ranks)
    ]
    for chunk in range(-(-700 // chunk_size)):
        samples = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        counts[chunk % num_ranks].add(chunk, LOGITS[samples], LABELS[samples])
    for rank_counts in counts:
        rank_counts.flush()
    return counts


def evaluate_on_ranks(chunk_size: int, num_ranks: int) -> Evaluation:
    counts = counts_of_ranks(chunk_size, num_ranks)
    loss_sum = math.fsum(sum((rank.losses for rank in counts), torch.zeros(700)).tolist())
    confusion = sum((rank.confusion for rank in counts), torch.zeros(NUM_CLASSES**2, dtype=torch.int64))
    return compute_scores(loss_sum, confusion.view(NUM_CLASSES, -1), CLASSES)


def test_scores_equal_those_of_scikit_learn() -> None:
    scores, predicted = evaluate_on_ranks(100, 1), LOGITS.argmax(1)
    assert scores.num_samples == 700
    assert scores.accuracy == metrics.accuracy_score(LABELS, predicted)
    confusion = metrics.confusion_matrix(LABELS, predicted, labels=range(NUM_CLASSES))
    assert scores.confusion == tuple(map(tuple, confusion.tolist()))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        LABELS, predicted, labels=range(NUM_CLASSES), zero_division=0
    )
    for index, row in enumerate(scores.classes):
        assert row.name == CLASSES[index] and row.support == support[index]
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision[index], recall[index], f1[index]))
    assert scores.loss == pytest.approx(sample_losses(LOGITS, LABELS).double().mean().item())


def test_tta_accuracy_uses_weighted_views_and_leaves_plain_accuracy_alone() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batches: list[torch.Tensor] = []

    def predict(batch: torch.Tensor) -> torch.Tensor:  # correct for the unchanged images, wrong for the other views
        batches.append(batch)
        is_unchanged = bool((batch == images).all())
        return F.one_hot(torch.zeros(6, dtype=torch.int64) + (0 if is_unchanged else 1), 2).float()

    views = build_views("mirror_and_shift")
    labels = torch.zeros(6, dtype=torch.int64)
    scores, predictions = evaluate_chunks(
        predict, views, lambda logits, labels: logits[:, 0], [(0, images, labels)], 6, 6, ("a", "b"),
        lambda counts: counts, torch.device("cpu"),
    )  # fmt: skip
    assert scores.accuracy == 1.0 and scores.tta_accuracy == 0.0  # weight 1/4 for the images, 3/4 for the wrong views
    assert predictions.labels.tolist() == [0] * 6
    assert predictions.confidence.tolist() == pytest.approx([0.7310586] * 6)  # 1 / (1 + 1 / e)
    unchanged, mirrored, up, up_mirrored, down, _ = batches
    assert torch.equal(unchanged, images) and torch.equal(mirrored, images.flip(3))
    assert torch.equal(up[:, :, 1:, 1:], images[:, :, :-1, :-1]) and torch.equal(up[:, :, 0], up[:, :, 2])
    assert torch.equal(down[:, :, :-1, :-1], images[:, :, 1:, 1:]) and torch.equal(up_mirrored, up.flip(3))


def test_weights_of_views() -> None:
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    mirror, mirror_and_shift = build_views("mirror"), build_views("mirror_and_shift")
    assert mirror is not None and mirror_and_shift is not None and build_views("none") is None
    assert [view.weight for view in mirror(images)] == [0.5]
    assert [view.weight for view in mirror_and_shift(images)] == [0.25, 0.125, 0.125, 0.125, 0.125]


def test_each_sample_is_filled_in_by_exactly_one_rank() -> None:
    counts = counts_of_ranks(64, 3)
    assert torch.equal(sum(rank.predicted for rank in counts), LOGITS.argmax(1))  # type: ignore[arg-type]
    probabilities = sum(rank.probabilities for rank in counts)
    assert torch.allclose(probabilities, LOGITS.softmax(1))  # type: ignore[arg-type]
    confidence = sum(rank.confidence for rank in counts)
    assert torch.allclose(confidence, LOGITS.softmax(1).max(1).values)  # type: ignore[arg-type]


def test_probabilities_are_kept_for_at_most_20_classes() -> None:
    """The tensors that the ranks add up must not grow with the number of classes."""
    counts = EvaluationCounts(2, 2, 1000, sample_losses, torch.device("cpu"))
    logits = torch.randn(2, 1000)
    counts.add(0, logits, torch.tensor([0, 999]))
    counts.flush()
    assert torch.allclose(counts.probabilities, logits.softmax(1)[:, :20])
    assert torch.allclose(counts.confidence, logits.softmax(1).max(1).values)


def test_scores_are_equal_on_any_number_of_ranks() -> None:
    expected = evaluate_on_ranks(64, 1)
    assert all(evaluate_on_ranks(64, num_ranks) == expected for num_ranks in (2, 3, 4, 20))  # 20: more than chunks


def test_evaluate_chunks_adds_counts_and_predictions_of_all_ranks() -> None:
    images = torch.arange(700).view(-1, 1, 1, 1)
    chunks = [(chunk, images[chunk * 64 :][:64], LABELS[chunk * 64 :][:64]) for chunk in range(11)]
    rank1_counts: list[torch.Tensor] = []

    def run(
        rank_chunks: list[tuple[int, torch.Tensor, torch.Tensor]],
        all_reduce_sum: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[Evaluation, Predictions]:
        return evaluate_chunks(
            lambda batch: LOGITS[batch.flatten()], None, sample_losses, rank_chunks, 700, 64, CLASSES, all_reduce_sum,
            torch.device("cpu"),
        )  # fmt: skip

    def record(counts: torch.Tensor) -> torch.Tensor:
        rank1_counts.append(counts.clone())
        return counts + 1  # any result: only the recorded counts are used

    expected_scores, expected = run(chunks, lambda counts: counts)
    run(chunks[1::2], record)
    scores, predictions = run(chunks[::2], lambda counts: counts + rank1_counts.pop(0))
    assert scores == expected_scores and not rank1_counts
    assert torch.equal(predictions.labels, expected.labels)
    assert torch.equal(predictions.probabilities, expected.probabilities)
    assert torch.equal(predictions.confidence, expected.confidence)


def test_scores_do_not_depend_on_number_of_joined_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate_on_ranks(64, 2)
    monkeypatch.setattr(evaluation, "_JOINED_LOGITS", 3 * 64 * NUM_CLASSES)
    assert evaluate_on_ranks(64, 2) == expected


@pytest.mark.parametrize(("device", "is_joined"), [("cpu", True), ("meta", False)])
def test_chunks_are_joined_on_a_cpu_only(device: str, is_joined: bool) -> None:
    """The meta device stands in for a GPU."""
    counts = EvaluationCounts(700, 64, NUM_CLASSES, sample_losses, torch.device(device))
    logits = torch.empty(64, NUM_CLASSES, device=device)
    reference = weakref.ref(logits)
    counts.add(0, logits, torch.zeros(64, dtype=torch.int64, device=device))
    del logits
    assert (reference() is not None) == is_joined
