"""Checks of what a run's files contain."""

import json
from typing import Any

import pytest

from trainer.run.reading import content
from trainer.run.reading.content import parse_json

SCORES = {"name": "cat", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        ([], content.STATUS, "expected an object, got list"),
        (None, content.STATUS, "expected an object, got null"),
        ({"step": "x"}, content.STATUS, "expected a whole number as step, got 'x'"),
        ({"step": True}, content.STATUS, "expected a whole number as step, got True"),
        ({"step": 1.5}, content.STATUS, "expected a whole number as step, got 1.5"),
        ({"step": 2**63}, content.STATUS, "expected a whole number as step"),
        ({"state": 3}, content.STATUS, "expected text as state, got 3"),
        ({"split": "train"}, content.ROW, "expected step"),
        ({"split": None, "step": 1}, content.ROW, "expected split"),
        ({"split": "train", "step": 1, "loss": [1]}, content.ROW, "expected a number as loss, got list"),
        ({"hosts": "a"}, content.ENVIRONMENT, "expected a list as hosts, got 'a'"),
        ({"test": {"loss": 1.0}}, content.SUMMARY, r"expected test\.accuracy"),
        ({"classes": [{"name": "cat"}]}, content.EVALUATION, r"expected classes\[0\]\.precision"),
        ({"classes": [SCORES]}, content.EVALUATION, "expected confusion with a row and a column for each of classes"),
        (
            {"classes": [SCORES], "confusion": [[1, 2]]},
            content.EVALUATION,
            "expected confusion with a row and a column",
        ),
        ({"classes": [SCORES], "confusion": [["1"]]}, content.EVALUATION, r"expected a whole number as confusion\[0\]"),
        ({"confusion": [[2**70]]}, content.EVALUATION, r"expected a whole number as confusion\[0\]\[0\]"),
        ({"optim": {"lr": [[1]]}}, content.SETTINGS, r"expected a setting as optim\.lr"),
        ({"optim": 3}, content.SETTINGS, "expected an object as optim, got 3"),
    ],
)
def test_wrong_content_is_named(value: Any, shape: content.Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(json.dumps(value), shape)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "null"])
def test_numbers_that_are_not_finite_are_missing(text: str) -> None:
    row = parse_json(f'{{"split": "test", "step": 1, "loss": {text}}}', content.ROW)
    assert row == {"split": "test", "step": 1, "loss": None}


def test_infinity_by_overflow_and_deep_nesting_are_named() -> None:
    with pytest.raises(ValueError, match="expected a number as loss, got inf"):
        parse_json('{"split": "test", "step": 1, "loss": 1e999}', content.ROW)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000, content.ROW)


def test_unknown_and_missing_keys_are_allowed() -> None:
    assert parse_json('{"new": [{}], "step": null}', content.STATUS) == {"new": [{}], "step": None}
    assert parse_json('{"classes": [], "confusion": []}', content.EVALUATION)["classes"] == []
