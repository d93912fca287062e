"""Loads the trained network of a run, a checkpoint or a file of weights, with its classes and normalization.

Only allow_pickle permits reading a pickle, which can execute code.
"""

import json
import pickle
import re
import struct
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.config.schema import DataSettings, ModelSettings
from trainer.data.augment import Augment
from trainer.data.normalization import Normalization
from trainer.errors import FolderError
from trainer.models.lookup import build_model
from trainer.run import checkpoint
from trainer.text.escape import one_line

# All metadata is JSON under one key: safetensors writes several keys in any order, and equal runs leave equal files.
METADATA_KEY = "samecurve"
_WEIGHTS_FILE = "model.safetensors"
_PROGRAM_SUFFIXES = (".torchscript.pt", ".pt2", ".onnx")
# The loaders raise these for a file that is truncated, empty or of another format.
_BAD_FILE_ERRORS = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error,
    SafetensorError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The facts about a network that every file of its weights contains."""

    model: ModelSettings
    classes: tuple[str, ...]
    normalization: Normalization
    image_size: int
    """side in pixels"""
    channels: int

    def to_file_metadata(self) -> dict[str, str]:
        """Returns the metadata for a file of weights. Leaves out model.freeze, which only affects training."""
        content = asdict(self)
        del content["model"]["freeze"]
        return {METADATA_KEY: json.dumps(content)}


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A trained network on a device, in evaluation mode."""

    path: Path
    """the file of its weights"""
    metadata: ModelMetadata
    module: nn.Module
    device: torch.device
    augment: Augment
    """normalizes images as in training"""

    def logits(self, images: Tensor) -> Tensor:
        """Returns float32 [B, num_classes] for uint8 images [B, channels, image_size, image_size] on any device."""
        with torch.no_grad():
            logits: Tensor = self.module(self.augment.normalize(images.to(self.device)))
        return logits.float()


def load_model(
    run: Path, weights: str = "auto", device: torch.device | None = None, allow_pickle: bool = False
) -> SavedModel:
    """Loads the network of a run folder, a checkpoint folder, or a file of weights.

    weights: for a run folder `final`, `best`, `latest`, a step, or `auto`: the final weights, or the latest checkpoint
    if that is newer; for the others `auto`.
    device: by default the first GPU, or the CPU if there is none.
    allow_pickle: permits a file with a whole module that torch.save has pickled, which can run any code.
    Raises FolderError if there are no such weights, they cannot be read, or there is no such device.
    """
    path = find_weights(run, weights)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FolderError(
            f"device {device} does not exist, this machine has {torch.cuda.device_count()} usable GPUs; choose cpu, or "
            "leave the device out"
        )
    state, metadata_text = _read_file(path, allow_pickle)
    metadata = _parse_metadata(path, metadata_text)
    try:
        module = state if isinstance(state, nn.Module) else _build_module(metadata, state)
    except (RuntimeError, TypeError) as error:
        raise FolderError(
            f"{path} does not contain the weights of its network {metadata.model.name} ({one_line(error)}); use "
            "other weights, or the version of samecurve that wrote them"
        ) from None
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = torch.Size([metadata.channels, metadata.image_size, metadata.image_size])
    augment = Augment(DataSettings(), metadata.normalization, 0, device, shape)
    return SavedModel(path, metadata, module.eval(), device, augment)


def _build_module(metadata: ModelMetadata, state: dict[str, Tensor]) -> nn.Module:
    settings = replace(metadata.model, pretrained=None)  # the state has all weights: read no other file
    module = build_model(settings, len(metadata.classes), metadata.channels, metadata.image_size)
    module.load_state_dict(state)
    return module


def find_weights(run: Path, weights: str = "auto") -> Path:
    """Returns the file of weights that load_model would read. Raises FolderError, which lists the choices."""
    if run.is_file() or (run / "manifest.json").is_file():
        if weights != "auto":
            raise FolderError(
                f"{run} is not a run folder, so weights '{weights}' cannot be chosen; leave the choice out, or give a "
                "run folder"
            )
        return run if run.is_file() else _weights_of_valid(run)
    final, checkpoints = run / _WEIGHTS_FILE, checkpoint.list_checkpoints(run / "checkpoints")
    if final.is_file() and (weights == "final" or (weights == "auto" and _is_final_newest(run, checkpoints))):
        return final
    if weights in ("auto", "latest"):
        newest, _ = checkpoint.find_newest_valid(run / "checkpoints")
        if newest is not None:
            return newest / _WEIGHTS_FILE
    step = _best_step(checkpoints) if weights == "best" else None
    if re.fullmatch(r"\d+", weights):
        step = int(weights)
    if step is not None:
        folder = run / "checkpoints" / checkpoint.folder_name(step)
        if folder.is_dir():
            return _weights_of_valid(folder)
    steps = ", ".join(str(_step_of(folder)) for folder in reversed(checkpoints)) or "none"
    final_weights = "final weights" if final.is_file() else "no final weights"
    raise FolderError(
        f"{run} has no weights '{weights}': there are {final_weights}, and checkpoints of steps {steps}; "
        "choose final, best, latest or a step"
    )


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _is_final_newest(run: Path, checkpoints: list[Path]) -> bool:
    """Returns whether no checkpoint is newer than the final weights: a finished run may continue with more steps."""
    summary = run / "summary.json"
    try:
        steps = json.loads(summary.read_text())["steps"] if summary.is_file() else 0
    except (ValueError, KeyError, TypeError):
        steps = 0
    return not checkpoints or steps >= _step_of(checkpoints[0])


def _weights_of_valid(folder: Path) -> Path:
    """Returns the file of weights of a checkpoint. Raises FolderError if the checkpoint is damaged."""
    damage = checkpoint.find_damage(folder)
    if damage:
        raise FolderError(f"checkpoint {folder} is damaged: {damage}; choose another checkpoint")
    return folder / _WEIGHTS_FILE


def _best_step(checkpoints: list[Path]) -> int | None:
    """Returns the best step that the newest valid checkpoint records, or None."""
    for folder in checkpoints:
        if not checkpoint.find_damage(folder):
            best = json.loads((folder / "progress.json").read_text())["progress"]["best"]
            return int(best["step"]) if best else None
    return None


def _read_file(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor] | nn.Module, str | None]:
    """Returns the weights, or a whole pickled module, and the JSON text of the metadata if the file has it."""
    if path.name.endswith(_PROGRAM_SUFFIXES):
        raise FolderError(
            f"{path} is an exported program, which only its runtime can load; give a run folder or a file of weights"
        )
    try:
        if path.suffix in (".pt", ".pth"):
            return _read_torch_file(path, allow_pickle)
        path.open("rb").close()  # without permission to read, safetensors would report that the file does not exist
        with safe_open(path, framework="pt") as file:
            metadata_text = (file.metadata() or {}).get(METADATA_KEY)
        return load_file(path), metadata_text
    except pickle.UnpicklingError:
        raise FolderError(
            f"{path} has more than weights, so loading it could run any code; use --allow-pickle only if you trust its "
            "author"
        ) from None
    except _BAD_FILE_ERRORS as error:
        raise FolderError(
            f"{path} cannot be read as a file of weights ({one_line(error)}); give a run folder or its weights"
        ) from None


def _read_torch_file(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor] | nn.Module, str | None]:
    loaded = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    content: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    state = content.get("module") or content.get("state_dict", {})
    if not isinstance(state, nn.Module) and not all(isinstance(value, Tensor) for value in dict(state).values()):
        raise ValueError("its state_dict contains values that are not tensors")
    return state, content.get(METADATA_KEY)


def _parse_metadata(path: Path, text: str | None) -> ModelMetadata:
    if text is None:
        raise FolderError(
            f"{path} has no metadata about its network; expected a file of weights that samecurve has written"
        )
    try:
        content: dict[str, Any] = json.loads(text)
        normalization = content["normalization"]
        return ModelMetadata(
            ModelSettings(**content["model"]),
            tuple(content["classes"]),
            Normalization(tuple(normalization["mean"]), tuple(normalization["std"])),
            int(content["image_size"]),
            int(content["channels"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{path} has metadata that this version cannot read ({error!r}); use the version that wrote it"
        ) from None
