"""Checks what a run's files contain, so that a damaged or foreign file is an error with its name and not a traceback.

Imports nothing slow, because `samecurve status` reads many folders.
"""

import json
import math
import re
from collections.abc import Callable
from typing import Any

_MAX_WHOLE = 2**63  # larger integers overflow in a division


def number(value: object, name: str) -> None:
    """Raises ValueError unless value is a finite number."""
    if isinstance(value, float) and math.isfinite(value):
        return
    whole(value, name, "a number")


def whole(value: object, name: str, kind: str = "a whole number") -> None:
    """Raises ValueError unless value is an int of at most 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= _MAX_WHOLE:
        raise _unexpected(value, name, kind)


def text(value: object, name: str) -> None:
    """Raises ValueError unless value is a string."""
    if not isinstance(value, str):
        raise _unexpected(value, name, "text")


def sha256(value: object, name: str) -> None:
    """Raises ValueError unless value is a SHA-256 in hexadecimal digits."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _unexpected(value, name, "64 hexadecimal digits")


def _anything(value: object, name: str) -> None: ...


def setting(value: object, name: str) -> None:
    """Raises ValueError unless value is what a setting can be: a scalar, or a list or mapping of scalars."""
    parts = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
    if not all(part is None or isinstance(part, str | int | float) for part in parts):
        raise _unexpected(value, name, "a setting")


Shape = Callable[[object, str], None] | dict[str, Any] | list[Any]
"""A function that raises ValueError, a list of one shape, or shapes by key. A key that ends in ! must be there and not
null. {"": shape} stands for all keys."""

_SCORES: dict[str, Any] = {
    "loss": number, "tta_accuracy": number, "num_samples": whole,
    "classes": [{"name!": text, "precision!": number, "recall!": number, "f1!": number, "support!": whole}],
    "confusion": [[whole]],
}  # fmt: skip
SUMMARY: Shape = {
    "steps": whole, "epochs": number, "world_size": whole, "seconds": number,
    "train": {"loss": number, "accuracy": number, "samples_per_second": number},
    "test": {**_SCORES, "accuracy!": number}, "validation": {**_SCORES, "accuracy!": number},
    "best": {"step!": whole, "accuracy!": number, "split": text},
}  # fmt: skip
EVALUATION: Shape = {**_SCORES, "accuracy": number, "step": whole}
STATUS: Shape = {"state": text, "step": whole, "reason": text}
ENVIRONMENT: Shape = {
    "command": text, "directory": text, "hosts": [text], "backend": text, "world_size": whole,
    "packages": {"": _anything}, "parameters": whole, "trained_parameters": whole, "num_images": {"": whole},
}  # fmt: skip
JOB: Shape = {
    "job_id!": _anything, "array_task": whole, "log": text, "attempts": whole, "without_progress": whole, "step": whole,
}  # fmt: skip
SESSION: Shape = {
    "step!": whole, "total_steps!": whole, "world_size": whole, "host": text, "job": text, "array_job": text,
    "array_task": whole,
}  # fmt: skip
ROW: Shape = {
    "split!": text, "step!": whole,
    **{name: number for name in ("epoch", "samples", "seconds", "loss", "accuracy", "tta_accuracy", "lr")},
    **{name: number for name in ("samples_per_second", "grad_norm", "data_wait_share", "communication_share")},
}  # fmt: skip
BAD_STEP: Shape = {"step!": whole}
DATA: Shape = {
    "classes!": [text],
    "splits!": {name: {"counts!": [whole], "sha256!": sha256} for name in ("train!", "test!")},
}
SETTINGS: Shape = {"": {"": setting}}
OBJECT: Shape = {}


def parse_json(content: str, shape: Shape) -> dict[str, Any]:
    """Returns the JSON object in a text; numbers that are not finite are None. Raises ValueError."""
    try:
        value = json.loads(content, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    check(value, shape)
    return dict(value)


def check(value: object, shape: Shape, name: str = "") -> None:
    """Raises ValueError, with the name of the part, unless value has the shape. Null stands for a missing part."""
    if callable(shape):
        shape(value, name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _unexpected(value, name, "a list")
        if (
            shape[0] is whole
            and all(type(item) is int for item in value)
            and max(map(abs, value), default=0) < _MAX_WHOLE
        ):
            return  # a confusion matrix has a million numbers
        for index, item in enumerate(value):
            check(item, shape[0], f"{name}[{index}]")
    else:
        _check_object(value, shape, name)


def _check_object(value: object, shape: dict[str, Any], name: str) -> None:
    if not isinstance(value, dict):
        raise _unexpected(value, name, "an object")
    prefix = f"{name}." if name else ""
    for key in value if "" in shape else ():
        if value[key] is not None:
            check(value[key], shape[""], f"{prefix}{key}")
    for key, part in shape.items():
        field = key.removesuffix("!")
        if value.get(field) is not None and key:
            check(value[field], part, prefix + field)
        elif key.endswith("!"):
            raise ValueError(f"expected {prefix}{field}")
    classes, confusion = value.get("classes"), value.get("confusion")
    if shape.get("confusion") and (classes or confusion):
        sizes = {len(classes or ()), len(confusion or ()), *map(len, confusion or ())}
        if len(sizes) > 1:
            raise ValueError(f"expected {prefix}confusion with a row and a column for each of {prefix}classes")


def _unexpected(value: object, name: str, kind: str) -> ValueError:
    found = "null" if value is None else repr(value) if isinstance(value, str | int | float) else type(value).__name__
    return ValueError(f"expected {kind}{f' as {name}' if name else ''}, got {found[:40]}")
