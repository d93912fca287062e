"""examples.safetensors has the most confident mistakes and samples of each class."""

from pathlib import Path

import pytest
import torch

from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.data.splits import TensorSplit
from trainer.errors import FolderError
from trainer.inference.evaluation import Predictions
from trainer.inference.predict import load_predictor
from trainer.report.examples import read_examples, samples_of_each_class, write_examples


def test_mistakes_are_the_most_confident_wrong_predictions_in_order(finished: Path) -> None:
    test, predictor = digits.load(DataSettings(name="digits")).test, load_predictor(finished)
    predictions = [prediction.top[0] for prediction in predictor.predict(list(test.images), top=1)]
    wrong = [
        (prediction.probability, predictor.classes[label], prediction.name)
        for prediction, label in zip(predictions, test.labels, strict=True)
        if prediction.name != predictor.classes[label]
    ]
    mistakes = read_examples(finished).mistakes
    assert len(wrong) > 3 and len(mistakes) == min(24, len(wrong))
    expected = sorted(wrong, reverse=True)[: len(mistakes)]
    assert [mistake.probability for mistake in mistakes] == pytest.approx([row[0] for row in expected], abs=1e-5)
    assert {(mistake.label, mistake.predicted) for mistake in mistakes} == {row[1:] for row in expected}


def test_samples_of_each_class_are_spread_over_the_split() -> None:
    labels = torch.tensor([0] * 100 + [1] * 3 + [2] * 20)
    positions = samples_of_each_class(labels, 3)
    assert labels[positions].tolist() == [0] * 8 + [1] * 3 + [2] * 8 and int(positions[7]) >= 84


def test_large_images_are_scaled_down_and_small_ones_are_stored_exactly(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1])
    predictions = Predictions(labels, torch.tensor([0.5, 0.75]), torch.eye(2))
    for size, stored_size in ((200, 96), (8, 8)):
        pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        pixels[1, 0] = 200  # red
        split = TensorSplit(pixels, labels)
        write_examples(tmp_path / "examples.safetensors", split, predictions, ("a", "b"), "test", 7)
        examples = read_examples(tmp_path)
        assert examples.mistakes == [] and [sample.label for sample in examples.samples] == ["a", "b"]
        image = examples.samples[1].image()
        assert image.size == (stored_size, stored_size) and image.getpixel((3, 3)) == (200, 0, 0)
        assert examples.samples[1].probability == 0.75


def test_missing_file_has_no_examples(tmp_path: Path) -> None:
    assert read_examples(tmp_path) == ([], [])


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "examples.safetensors").write_bytes(b"damaged")
    with pytest.raises(FolderError, match=r"examples\.safetensors cannot be read"):
        read_examples(tmp_path)
