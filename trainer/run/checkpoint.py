"""Writes, finds and loads checkpoints. A checkpoint is atomic and verified before use.

    step-00001234/model.safetensors        weights and buffers
    step-00001234/optimizer.safetensors    tensors of the optimizer
    step-00001234/progress.json            Progress, the optimizer's other state, the fp16 loss scale
    step-00001234/manifest.json            size and SHA-256 of these files, hash of the settings, versions

No file is a pickle, so loading a checkpoint executes no code. No random state is stored, because random numbers are a
function of seed, epoch and sample (trainer/rng.py).
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
MANIFEST = "manifest.json"


@dataclass
class Best:
    """The evaluation that selected the best checkpoint."""

    step: int
    accuracy: float
    split: str
    """validation; or test without a validation split: then `best` is simply the latest evaluation"""


@dataclass
class Progress:
    """What a resumed run needs besides weights and optimizer state. Stored in progress.json."""

    step: int = 0
    seconds: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """loss sum, correct predictions and samples since the last train row, over all ranks"""
    best: Best | None = None
    last_line: dict[str, float] = field(default_factory=dict)
    """the last train row of metrics.jsonl"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of the run by dotted name, such as optim.lr"""
    precision: str = ""
    """the precision in use; train.precision=auto can select another one on another machine"""
    bad_steps: int = 0
    """number of steps skipped because the loss or gradient was not finite"""
    wandb_run_id: str = ""
    """id of the W&B run that gets the rows; empty without W&B"""
    data: dict[str, Any] = field(default_factory=dict)
    """identity of the data set (trainer/data/identity.py); empty in a checkpoint of an older version"""

    def record_evaluation(self, accuracies: dict[str, float]) -> bool:
        """Updates `best`. Returns whether the evaluation has the best validation accuracy so far.

        accuracies: by split, in [0, 1].
        """
        if "validation" not in accuracies:  # the test set must not select a checkpoint, so `best` is the latest
            self.best = Best(self.step, accuracies["test"], "test")
            return False
        is_best = self.best is None or accuracies["validation"] > self.best.accuracy
        if is_best:
            self.best = Best(self.step, accuracies["validation"], "validation")
        return is_best


@dataclass
class TrainingState:
    """The content of a checkpoint."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    """an optimizer's state_dict()"""
    scaler: dict[str, Any]
    """the fp16 loss scaler's state_dict(); empty for other precisions"""
    progress: Progress
    metadata: dict[str, str] = field(default_factory=dict)
    """header of model.safetensors (trainer/inference/saved_model.py)"""
    path: Path | None = None
    """the checkpoint that it was loaded from"""


def save(folder: Path, state: TrainingState) -> Path:
    """Writes the checkpoint folder/step-N, verifies it and returns its path.

    Keeps an existing valid checkpoint of this step. Raises OSError or SafetensorError if writing fails; other valid
    checkpoints are then untouched.
    """
    path = folder / folder_name(state.progress.step)
    if path.exists() and not find_damage(path):
        return path
    for leftover in folder.glob(".step-*"):  # left by a save that was killed
        shutil.rmtree(leftover)
    partial = folder / f".{path.name}.partial"
    replaced = folder / f".{path.name}.replaced"
    try:
        _write(partial, state)
        if path.exists():  # damaged
            path.rename(replaced)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # frees the space: the next save needs it
        raise
    _flush(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    damage = find_damage(path)
    if damage:
        raise OSError(errno.EIO, f"{path} could not be verified after writing: {damage}")
    return path


def _write(partial: Path, state: TrainingState) -> None:
    partial.mkdir(parents=True)
    optimizer_tensors, optimizer_json = _split_optimizer(state.optimizer)
    save_file(state.model, partial / "model.safetensors", state.metadata or None)
    save_file(optimizer_tensors, partial / "optimizer.safetensors")
    content = {"progress": asdict(state.progress), "optimizer": optimizer_json, "scaler": state.scaler}
    (partial / "progress.json").write_text(json.dumps(content))
    manifest = {
        "step": state.progress.step,
        "settings_sha256": _json_sha256(state.progress.settings),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "files": {path.name: _size_and_sha256(path) for path in sorted(partial.iterdir())},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest | {"sha256": _json_sha256(manifest)}, indent=1))
    for path in [*partial.iterdir(), partial]:
        _flush(path)


def folder_name(step: int) -> str:
    """Returns the folder name of a step's checkpoint."""
    return f"step-{step:08}"


def load(path: Path) -> TrainingState:
    """Verifies and reads a checkpoint. Tensors are on the CPU. Raises FolderError if the checkpoint is damaged."""
    progress = load_progress(path)
    content = json.loads((path / "progress.json").read_text())
    return TrainingState(
        model=load_file(path / "model.safetensors"),
        optimizer=_join_optimizer(load_file(path / "optimizer.safetensors"), content["optimizer"]),
        scaler=content["scaler"],
        progress=progress,
        path=path,
    )


def load_progress(path: Path) -> Progress:
    """Verifies a checkpoint and reads its progress alone. Raises FolderError if the checkpoint is damaged."""
    damage = find_damage(path)
    if damage:
        raise FolderError(f"checkpoint {path} is damaged: {damage}; set run.resume to another one")
    progress = json.loads((path / "progress.json").read_text())["progress"]
    best = Best(**progress.pop("best")) if progress["best"] else progress.pop("best")
    return Progress(**progress, best=best)


def _split_optimizer(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a state_dict() into tensors, named "INDEX.NAME", and values for JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entry in optimizer["state"].items():
        for name, value in entry.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return tensors, {"numbers": numbers, "param_groups": optimizer["param_groups"]}


def _join_optimizer(tensors: dict[str, Tensor], optimizer_json: dict[str, Any]) -> dict[str, Any]:
    """Returns the state_dict() that _split_optimizer has split."""
    state: dict[int, dict[str, Any]] = {}
    for full_name, value in (tensors | optimizer_json["numbers"]).items():
        index, _, name = full_name.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": optimizer_json["param_groups"]}


def list_checkpoints(folder: Path) -> list[Path]:
    """Returns the paths of the checkpoints in a folder, highest step first, damaged ones included."""
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=_step, reverse=True)


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Returns the valid checkpoint with the highest step, and a message for each damaged one that was skipped."""
    messages: list[str] = []
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if not damage:
            return path, messages
        messages.append(f"skipped the damaged checkpoint {path}: {damage}")
    return None, messages


def find_damage(path: Path) -> str:
    """Returns what is wrong with a checkpoint, or "" if it is valid. Reads all files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        sha256 = manifest.pop("sha256")
        files = manifest["files"]
        if manifest["step"] != _step(path) or sha256 != _json_sha256(manifest) or set(files) != _FILES:
            return f"{MANIFEST} does not match the checkpoint"
        for name, size_and_sha256 in files.items():
            if _size_and_sha256(path / name) != size_and_sha256:
                return f"{name} has changed since it was written"
        extra = {file.name for file in path.iterdir() if not file.name.startswith(".")} - _FILES - {MANIFEST}
        if extra:
            return f"{min(extra)} does not belong to a checkpoint"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return ""


def prune(folder: Path, keep: int, newest: Path, keep_steps: set[int], is_valid: dict[str, bool]) -> None:
    """Keeps the newest `keep` valid checkpoints, counted back from `newest`, and those of keep_steps. Removes others.

    Damaged checkpoints and those of later steps are neither counted nor removed: the user may want to look at them.
    is_valid: known results by checkpoint name; prune adds the missing ones, so that it reads each checkpoint once.
    """
    is_valid[newest.name] = True
    checkpoints = [path for path in list_checkpoints(folder) if _step(path) <= _step(newest)]
    for path in checkpoints:
        if path.name not in is_valid:
            is_valid[path.name] = not find_damage(path)
    valid_checkpoints = [path for path in checkpoints if is_valid[path.name]]
    for path in valid_checkpoints[keep:]:
        if _step(path) not in keep_steps:
            shutil.rmtree(path)


def remove_oldest(
    folder: Path, last_step: int, keep: int, prefer_to_keep: int, is_valid: dict[str, bool]
) -> Path | None:
    """Removes the oldest valid checkpoint and returns its path; None if only the newest `keep` ones are left.

    last_step: checkpoints of later steps are neither counted nor removed, and neither are damaged ones.
    prefer_to_keep: step of the checkpoint to remove last.
    is_valid: as in prune().
    """
    valid_checkpoints = []
    for path in list_checkpoints(folder):
        if _step(path) <= last_step:
            if path.name not in is_valid:
                is_valid[path.name] = not find_damage(path)
            valid_checkpoints += [path] if is_valid[path.name] else []
    candidates = sorted(valid_checkpoints[keep:], key=lambda path: (_step(path) == prefer_to_keep, _step(path)))
    if not candidates:
        return None
    shutil.rmtree(candidates[0])
    return candidates[0]


def _step(path: Path) -> int:
    """Returns the step in a checkpoint's name; -1 if it is not a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _size_and_sha256(path: Path) -> dict[str, Any]:
    """Hashes a file in one call: each of many calls would take the GIL from the training thread."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size == 0:
            return {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
