"""Scores equal scikit-learn's, and do not depend on how the samples were cut."""

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
LOGITS[:, 1] -= 100  # and class 1 is never predicted
CLASSES = tuple("abcde")


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def tallied(chunk_size: int, ranks: int) -> list[EvaluationCounts]:
    """The tallies of so many ranks, which have taken turns."""
    tallies = [EvaluationCounts(700, chunk_size, NUM_CLASSES, losses, torch.device("cpu")) for _ in range(ranks)]
    for chunk in range(-(-700 // chunk_size)):
        at = slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        tallies[chunk % ranks].add(chunk, LOGITS[at], LABELS[at])
    for tally in tallies:
        tally.count()
    return tallies


def evaluated(chunk_size: int, ranks: int) -> Evaluation:
    tallies = tallied(chunk_size, ranks)
    loss_sum = math.fsum(sum((tally.losses for tally in tallies), torch.zeros(700)).tolist())
    confusion = sum((tally.confusion for tally in tallies), torch.zeros(NUM_CLASSES**2, dtype=torch.int64))
    return compute_scores(loss_sum, confusion.view(NUM_CLASSES, -1), CLASSES)


def test_scores_are_scikit_learns() -> None:
    ours, predicted = evaluated(100, 1), LOGITS.argmax(1)
    assert ours.num_samples == 700
    assert ours.accuracy == metrics.accuracy_score(LABELS, predicted)
    theirs = metrics.confusion_matrix(LABELS, predicted, labels=range(NUM_CLASSES))
    assert ours.confusion == tuple(map(tuple, theirs.tolist()))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        LABELS, predicted, labels=range(NUM_CLASSES), zero_division=0
    )
    for index, row in enumerate(ours.classes):
        assert row.name == CLASSES[index] and row.support == support[index]
        assert (row.precision, row.recall, row.f1) == pytest.approx((precision[index], recall[index], f1[index]))
    assert ours.loss == pytest.approx(losses(LOGITS, LABELS).double().mean().item())


def test_several_views_are_averaged_and_reported_beside_the_plain_accuracy() -> None:
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    def predict(view: torch.Tensor) -> torch.Tensor:  # right for the image as it is, wrong for the five others
        seen.append(view)
        is_plain = bool((view == images).all())
        return F.one_hot(torch.zeros(6, dtype=torch.int64) + (0 if is_plain else 1), 2).float()

    views = build_views("mirror_and_shift")
    labels = torch.zeros(6, dtype=torch.int64)
    found, predictions = evaluate_chunks(
        predict, views, lambda logits, labels: logits[:, 0], [(0, images, labels)], 6, 6, ("a", "b"),
        lambda counts: counts, torch.device("cpu"),
    )  # fmt: skip
    assert found.accuracy == 1.0 and found.tta_accuracy == 0.0  # a quarter of the weight against three
    assert predictions.labels.tolist() == [0] * 6
    assert predictions.confidence.tolist() == pytest.approx([0.7310586] * 6)  # 1 / (1 + 1 / e)
    plain, mirrored, up, up_mirrored, down, _ = seen
    assert torch.equal(plain, images) and torch.equal(mirrored, images.flip(3))
    assert torch.equal(up[:, :, 1:, 1:], images[:, :, :-1, :-1]) and torch.equal(up[:, :, 0], up[:, :, 2])
    assert torch.equal(down[:, :, :-1, :-1], images[:, :, 1:, 1:]) and torch.equal(up_mirrored, up.flip(3))
    mirror, none = build_views("mirror"), build_views("none")
    assert mirror is not None and [view.weight for view in mirror(images)] == [0.5] and none is None


def test_each_samples_prediction_comes_from_the_rank_that_made_it() -> None:
    tallies = tallied(64, 3)
    assert torch.equal(sum(tally.predicted for tally in tallies), LOGITS.argmax(1))  # type: ignore[arg-type]
    probabilities = sum(tally.probabilities for tally in tallies)
    assert torch.allclose(probabilities, LOGITS.softmax(1))  # type: ignore[arg-type]
    confidence = sum(tally.confidence for tally in tallies)
    assert torch.allclose(confidence, LOGITS.softmax(1).max(1).values)  # type: ignore[arg-type]


def test_of_many_classes_only_some_probabilities_are_kept() -> None:
    """What all ranks add up grows with the samples, not with the classes too."""
    tally = EvaluationCounts(2, 2, 1000, losses, torch.device("cpu"))
    logits = torch.randn(2, 1000)
    tally.add(0, logits, torch.tensor([0, 999]))
    tally.count()
    assert torch.allclose(tally.probabilities, logits.softmax(1)[:, :20])
    assert torch.allclose(tally.confidence, logits.softmax(1).max(1).values)


def test_the_result_is_the_same_on_any_number_of_ranks() -> None:
    whole = evaluated(64, 1)
    assert all(evaluated(64, ranks) == whole for ranks in (2, 3, 4, 20))  # 20: more ranks than chunks


def test_what_every_rank_has_counted_and_predicted_is_added_up() -> None:
    images = torch.arange(700).view(-1, 1, 1, 1)
    chunks = [(chunk, images[chunk * 64 :][:64], LABELS[chunk * 64 :][:64]) for chunk in range(11)]
    said: list[torch.Tensor] = []

    def run(
        part: list[tuple[int, torch.Tensor, torch.Tensor]], add_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[Evaluation, Predictions]:
        return evaluate_chunks(
            lambda some: LOGITS[some.flatten()], None, losses, part, 700, 64, CLASSES, add_ranks, torch.device("cpu"),
        )  # fmt: skip

    whole, predictions = run(chunks, lambda counts: counts)

    def keep(counts: torch.Tensor) -> torch.Tensor:
        said.append(counts.clone())
        return counts + 1  # of no use to anyone

    run(chunks[1::2], keep)
    found, added = run(chunks[::2], lambda counts: counts + said.pop(0))
    assert found == whole and not said
    assert torch.equal(added.labels, predictions.labels)
    assert torch.equal(added.probabilities, predictions.probabilities)
    assert torch.equal(added.confidence, predictions.confidence)


def test_how_many_logits_are_counted_at_once_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluated(64, 2)
    monkeypatch.setattr(evaluation, "_LOGITS_AT_ONCE", 3 * 64 * NUM_CLASSES)
    assert evaluated(64, 2) == whole


def test_only_a_cpu_counts_chunks_together() -> None:
    """Tensors without memory stand in for a GPU's: what is asked of them is told, not computed."""
    for device, num_kept in (("cpu", 1), ("meta", 0)):
        tally = EvaluationCounts(700, 64, NUM_CLASSES, losses, torch.device(device))
        logits = torch.empty(64, NUM_CLASSES, device=device)
        kept = weakref.ref(logits)
        tally.add(0, logits, torch.zeros(64, dtype=torch.int64, device=device))
        del logits
        assert (kept() is not None) == num_kept
