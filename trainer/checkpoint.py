"""Training state in, a folder that is whole or absent out; found again by step, verified before it is believed.

    step-00001234/model.safetensors     the weights and buffers
    step-00001234/optimizer.pt          optimizer and fp16 loss-scale state, loaded with weights_only
    step-00001234/progress.json         where in the run it was, see Progress
    step-00001234/manifest.json         size and SHA-256 of each of these

No random state: every draw is a function of its address (randomness.py).
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.errors import FolderError

_NAME = re.compile(r"step-(\d{8,})")
_FILES = {"model.safetensors", "optimizer.pt", "progress.json"}
_MANIFEST = "manifest.json"


@dataclass
class Best:
    """The evaluation that chose the best checkpoint: on the held-out part if there is one, else the latest."""

    step: int
    accuracy: float
    split: str


@dataclass
class Progress:
    """Where a run is; all that its next step needs besides weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """loss sum and correct predictions since the last line of training metrics, over all ranks"""
    window_samples: int = 0
    best: Best | None = None
    last_line: dict[str, float] = field(default_factory=dict)
    """the last line of training metrics"""
    settings: dict[str, Any] = field(default_factory=dict)
    """those it was made with, by their full names"""


@dataclass
class Saved:
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: Progress


def save(folder: Path, model: dict[str, Tensor], optimizer: dict[str, Any], progress: Progress) -> Path:
    """Writes checkpoints/step-N beside its place, flushes, renames. Raises OSError, SafetensorError or
    RuntimeError (torch.save) when that fails; then nothing has changed."""
    place = folder / f"step-{progress.step:08}"
    partial = folder / f".{place.name}.partial"
    for left_behind in folder.glob(".step-*"):  # by a save that was killed
        shutil.rmtree(left_behind)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in model.items()}, partial / "model.safetensors")
    torch.save(optimizer, partial / "optimizer.pt")
    (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    files = {path.name: _measure(path) for path in sorted(partial.iterdir())}
    (partial / _MANIFEST).write_text(
        json.dumps({"step": progress.step, "files": files, "sha256": _digest(files)}, indent=1)
    )
    for path in [*partial.iterdir(), partial]:
        _flush(path)
    if place.exists():  # a damaged one of the same step, passed over on resume
        place.rename(folder / f".{place.name}.replaced")
    partial.rename(place)
    _flush(folder)
    shutil.rmtree(folder / f".{place.name}.replaced", ignore_errors=True)
    return place


def load(place: Path) -> Saved:
    """Reads a checkpoint without executing anything in it. Raises FolderError when it is damaged."""
    problem = damage(place)
    if problem:
        raise FolderError(f"checkpoint {place}: {problem}; choose another one, or remove it to start afresh")
    progress = json.loads((place / "progress.json").read_text())
    best = Best(**progress.pop("best")) if progress["best"] else progress.pop("best")
    return Saved(
        model=load_file(place / "model.safetensors"),
        optimizer=torch.load(place / "optimizer.pt", map_location="cpu", weights_only=True),
        progress=Progress(**progress, best=best),
    )


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, highest step first."""
    if not folder.is_dir():
        return []
    places = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(places, key=_step, reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The highest step that verifies, and a line on each damaged one above it."""
    damaged: list[str] = []
    for place in found(folder):
        problem = damage(place)
        if not problem:
            return place, damaged
        damaged.append(f"checkpoint {place} passed over: {problem}")
    return None, damaged


def damage(place: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
        files = manifest["files"]
        if manifest["step"] != _step(place) or manifest["sha256"] != _digest(files) or set(files) != _FILES:
            return f"{_MANIFEST} is not what was written"
        for name, expected in files.items():
            if _measure(place / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return ""


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` and the best. Called after the newest was written."""
    for place in found(folder)[keep:]:
        if _step(place) != best_step:
            shutil.rmtree(place)


def _step(place: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder of another name."""
    matched = _NAME.fullmatch(place.name)
    return int(matched[1]) if matched else -1


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _digest(files: dict[str, Any]) -> str:
    """The manifest's own sum, so that damage to it is not laid at another file's door."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
