"""Training state in, a folder that is whole or absent out; found again by step, verified before it is believed.

    step-00001234/model.safetensors        the weights and buffers
    step-00001234/optimizer.safetensors    the optimizer's tensors
    step-00001234/progress.json            where the run was (Progress); the optimizer's numbers; the loss scale
    step-00001234/manifest.json            size and SHA-256 of each of these; fingerprint of the settings, versions

No pickle, so nothing that could be executed. No random state: every draw is a function of its address (randomness.py).
"""

import errno
import hashlib
import json
import mmap
import os
import platform
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
_FILES = {"model.safetensors", "optimizer.safetensors", "progress.json"}
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
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """loss sum, correct predictions and samples since the last line of training metrics, over all ranks"""
    best: Best | None = None
    last_line: dict[str, float] = field(default_factory=dict)
    """the last line of training metrics"""
    settings: dict[str, Any] = field(default_factory=dict)
    """those it was made with, by their full names"""
    precision: str = ""
    """what it is trained in: `auto` may mean something else on another machine"""
    bad_steps: int = 0
    """steps skipped because loss or gradient was not finite"""
    wandb_run_id: str = ""
    """the W&B run that the rows go to, if any"""

    def judge(self, accuracies: dict[str, float]) -> bool:
        """Takes note of an evaluation, by split; whether it is the best so far on the held-out part."""
        if "validation" not in accuracies:  # nothing is ever picked by the test set: the latest counts
            self.best = Best(self.step, accuracies["test"], "test")
            return False
        is_best = self.best is None or accuracies["validation"] > self.best.accuracy
        if is_best:
            self.best = Best(self.step, accuracies["validation"], "validation")
        return is_best


@dataclass
class TrainingState:
    """All that a checkpoint holds."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    """an optimizer's state_dict()"""
    scaler: dict[str, Any]
    """the fp16 loss scale's state_dict(); empty without one"""
    progress: Progress
    metadata: dict[str, str] = field(default_factory=dict)
    """what the weights' file says of them (trained.py)"""


def save(folder: Path, state: TrainingState) -> Path:
    """Writes checkpoints/step-N beside its place, flushes, renames, and reads it once more. Raises OSError or
    SafetensorError when that fails; then nothing has changed. One that is there and verifies is left as it is."""
    place = folder / folder_name(state.progress.step)
    if place.exists() and not find_damage(place):
        return place
    for left_behind in folder.glob(".step-*"):  # by a save that was killed
        shutil.rmtree(left_behind)
    partial = folder / f".{place.name}.partial"
    try:
        _write(partial, state)
        if place.exists():  # a damaged one
            place.rename(folder / f".{place.name}.replaced")
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # or it would keep a full disk full
        raise
    _flush(folder)
    shutil.rmtree(folder / f".{place.name}.replaced", ignore_errors=True)
    problem = find_damage(place)
    if problem:
        raise OSError(errno.EIO, f"what was written to {place} reads otherwise: {problem}")
    return place


def _write(partial: Path, state: TrainingState) -> None:
    partial.mkdir(parents=True)
    tensors, rest = _split(state.optimizer)
    save_file(state.model, partial / "model.safetensors", state.metadata or None)
    save_file(tensors, partial / "optimizer.safetensors")
    content = {"progress": asdict(state.progress), "optimizer": rest, "scaler": state.scaler}
    (partial / "progress.json").write_text(json.dumps(content))
    files = {path.name: _measure(path) for path in sorted(partial.iterdir())}
    manifest = {
        "step": state.progress.step,
        "settings_sha256": _digest(state.progress.settings),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "files": files,
    }
    (partial / _MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1))
    for path in [*partial.iterdir(), partial]:
        _flush(path)


def folder_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08}"


def load(place: Path) -> TrainingState:
    """Reads a checkpoint; there is nothing in one that could be executed. Raises FolderError when it is damaged."""
    problem = find_damage(place)
    if problem:
        raise FolderError(f"checkpoint {place}: {problem}; choose another one, or remove it to start afresh")
    content = json.loads((place / "progress.json").read_text())
    progress = content["progress"]
    best = Best(**progress.pop("best")) if progress["best"] else progress.pop("best")
    return TrainingState(
        model=load_file(place / "model.safetensors"),
        optimizer=_join(load_file(place / "optimizer.safetensors"), content["optimizer"]),
        scaler=content["scaler"],
        progress=Progress(**progress, best=best),
    )


def _split(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by name, and the rest as JSON holds it: no pickle, so nothing to execute."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entry in optimizer["state"].items():
        for name, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": optimizer["param_groups"]}


def _join(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in (tensors | rest["numbers"]).items():
        index, _, name = full_name.partition(".")
        entries.setdefault(int(index), {})[name] = value
    return {"state": entries, "param_groups": rest["param_groups"]}


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, highest step first."""
    if not folder.is_dir():
        return []
    places = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(places, key=_step, reverse=True)


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The highest step that verifies, and a line on each damaged one above it."""
    damaged: list[str] = []
    for place in list_checkpoints(folder):
        problem = find_damage(place)
        if not problem:
            return place, damaged
        damaged.append(f"checkpoint {place} passed over: {problem}")
    return None, damaged


def find_damage(place: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        manifest = json.loads((place / _MANIFEST).read_text())
        own = manifest.pop("sha256")
        files = manifest["files"]
        if manifest["step"] != _step(place) or own != _digest(manifest) or set(files) != _FILES:
            return f"{_MANIFEST} is not what was written"
        for name, expected in files.items():
            if _measure(place / name) != expected:
                return f"{name} is not what was written"
        strange = {path.name for path in place.iterdir() if not path.name.startswith(".")} - _FILES - {_MANIFEST}
        if strange:
            return f"{min(strange)} was not written by a save"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return ""


def prune(folder: Path, keep: int, newest: Path, keep_steps: set[int], sound: dict[str, bool]) -> None:
    """Removes all but the newest `keep` and those of keep_steps, counted from the one that was just written.

    Damaged ones, and those of later steps, are neither counted nor removed: a person may want to look at them. sound:
    what is known of each by its name; completed here, so that each is read once.
    """
    sound[newest.name] = True
    earlier = [place for place in list_checkpoints(folder) if _step(place) <= _step(newest)]
    for place in earlier:
        if place.name not in sound:
            sound[place.name] = not find_damage(place)
    whole = [place for place in earlier if sound[place.name]]
    for place in whole[keep:]:
        if _step(place) not in keep_steps:
            shutil.rmtree(place)


def _step(place: Path) -> int:
    """The step in a checkpoint's name; -1 for a folder of another name."""
    matched = _NAME.fullmatch(place.name)
    return int(matched[1]) if matched else -1


def _measure(path: Path) -> dict[str, Any]:
    """Size and sum. In one call over the whole file: reading it bit by bit would ask for Python's lock each time."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size == 0:
            return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


def _digest(content: Any) -> str:
    """The sum of something as JSON: the manifest's own, so that damage to it is not laid at another file's door."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
