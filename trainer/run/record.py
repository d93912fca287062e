"""A run folder in, what its files tell of the run out, for reports and tables. No torch."""

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from trainer.errors import FolderError

_MOST_BYTES = 4 << 20  # of metrics.jsonl read whole: 20,000 lines
_TRAINING = '{"split": "train"'


@dataclass(frozen=True, slots=True)
class Example:
    """An image, and what was said of it."""

    png: str
    """base64"""
    label: str
    predicted: str
    probability: float

    def image(self) -> Image.Image:
        """The picture as stored, in its own size."""
        return Image.open(io.BytesIO(base64.b64decode(self.png)))


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run's files tell; what is not there is empty."""

    folder: Path
    name: str
    settings: dict[str, Any]
    """by their full names"""
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    """empty unless it is of the last step"""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """the last one of the test set, and its step"""
    lines: list[dict[str, Any]] = field(default_factory=list)
    restarts: int = 0
    mistakes: list[Example] = field(default_factory=list)
    samples: list[Example] = field(default_factory=list)

    def points(self, split: str, name: str) -> list[tuple[float, float]]:
        return [
            (line["epoch"], line[name]) for line in self.lines if line["split"] == split and line.get(name) is not None
        ]

    def last(self, split: str) -> dict[str, Any]:
        """The last line of a split."""
        return next((line for line in reversed(self.lines) if line["split"] == split), {})


def read_record(folder: Path) -> RunRecord:
    """Raises FolderError when it holds no run, or one whose files cannot be read."""
    if not (folder / "config.yaml").is_file():
        raise FolderError(f"{folder} holds no run: it has no config.yaml; give a run's folder")
    try:
        return _read(folder)
    except (ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError, IndexError, SafetensorError) as error:
        problem = " ".join(str(error).split())[:160]
        raise FolderError(f"a file in {folder} is not what a run writes ({problem}); mend or remove it") from None


def _read(folder: Path) -> RunRecord:
    # As it was written, checked then; checking it again would take longer than all the rest.
    nested = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    settings = {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()}
    status, summary = _json(folder / "status.json"), _json(folder / "summary.json")
    if summary.get("steps") != status.get("step"):  # of an earlier end: it has been trained on since
        summary = {}
    mistakes, samples = _examples(folder / "examples.safetensors")
    return RunRecord(
        folder=folder,
        name=str(settings.get("run.name") or folder.name),
        settings=settings,
        status=status,
        environment=_json(folder / "environment.json"),
        summary=summary,
        evaluation=_json(folder / "evaluation.json"),
        lines=_lines(folder / "metrics.jsonl"),
        restarts=max(0, len(_lines(folder / "starts.jsonl")) - 1),
        mistakes=mistakes,
        samples=samples,
    )


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of JSON; a last one that is cut off is left out, and of very many lines of training only some are
    read: a chart has no more pixels."""
    if not path.is_file():
        return []
    found = []
    every = 1 + path.stat().st_size // _MOST_BYTES
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if number % every and line.startswith(_TRAINING):
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _examples(path: Path) -> tuple[list[Example], list[Example]]:
    """The mistakes, and the samples of each class."""
    if not path.exists():
        return [], []
    path.open("rb").close()  # safetensors says of a file that may not be read that it is not there
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["samecurve"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
    shown = [
        Example(_png(pixels), about["classes"][label], about["classes"][predicted], float(probability))
        for pixels, label, predicted, probability in zip(
            found["images"], found["label"], found["predicted"], found["probability"], strict=True
        )
    ]
    return shown[: about["mistakes"]], shown[about["mistakes"] :]


def _png(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, C] in, base64 out."""
    into = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(into, "PNG")
    return base64.b64encode(into.getvalue()).decode()
