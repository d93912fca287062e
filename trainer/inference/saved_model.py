"""A run in, its trained network out, with what it takes to feed it: classes, normalization, size of images.

What could execute something when it is read, a pickle, is read only if that is asked for by name.
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
from torch import Tensor, nn

from trainer.config.schema import DataSettings, ModelSettings
from trainer.data.augment import Augment, Normalization
from trainer.errors import FolderError
from trainer.models.lookup import build_model
from trainer.run import checkpoint

METADATA_KEY = (
    "samecurve"  # one name, because safetensors writes several in any order: the same run leaves the same file
)
_WEIGHTS = "model.safetensors"
_PROGRAMS = (".torchscript.pt", ".pt2", ".onnx")
# What a file that is cut off, foreign or empty makes the loaders raise.
_BAD_FILE = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error,
    SafetensorError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What is written beside a network's weights, wherever these are."""

    model: ModelSettings
    classes: tuple[str, ...]
    normalization: Normalization
    image_size: int
    """side in pixels"""
    channels: int

    def metadata(self) -> dict[str, str]:
        """For a safetensors file. What was frozen is of how the network was trained, not of what it is."""
        content = asdict(self)
        del content["model"]["freeze"]
        return {METADATA_KEY: json.dumps(content)}


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A network in evaluation mode, on a device."""

    path: Path
    """the file of its weights"""
    about: ModelMetadata
    module: nn.Module
    device: torch.device
    augment: Augment
    """whose normalization it was trained with"""

    def logits(self, images: Tensor) -> Tensor:
        """images: uint8 [B, channels, image_size, image_size], on any device. float32 [B, num_classes] out."""
        with torch.no_grad():
            logits: Tensor = self.module(self.augment.normalize(images.to(self.device)))
        return logits.float()


def load_model(
    run: Path, which: str = "auto", device: torch.device | None = None, allow_pickle: bool = False
) -> SavedModel:
    """The network of a run's folder, of a checkpoint's, or of a file of weights.

    which: of a run's folder, `final`, `best`, `latest`, a step, or `auto`: the final weights, or the latest checkpoint
    of a run that has none yet. device: the first GPU, or the CPU where there is none. allow_pickle: a file may be one
    that torch.save wrote of a whole module, which can run any code. Raises FolderError.
    """
    path = find_weights(run, which)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FolderError(f"device {device}: this machine has no such GPU; choose cpu, or none to have what there is")
    weights, text = _read(path, allow_pickle)
    about = _about(path, text)
    try:
        if isinstance(weights, nn.Module):
            module = weights
        else:
            bare = replace(about.model, pretrained=None)  # all weights are here
            module = build_model(bare, len(about.classes), about.channels, about.image_size)
            module.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FolderError(f"{path} does not hold the weights of its {about.model.name} ({reason})") from None
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = torch.Size([about.channels, about.image_size, about.image_size])
    feed = Augment(DataSettings(), about.normalization, 0, device, shape)
    return SavedModel(path, about, module.eval(), device, feed)


def find_weights(run: Path, which: str = "auto") -> Path:
    """The file of weights that `load` would read. Raises FolderError, with what there is."""
    if run.is_file() or (run / "manifest.json").is_file():
        if which != "auto":
            raise FolderError(f"{run} is no run's folder, of whose weights '{which}' could be chosen; leave that out")
        return run if run.is_file() else _sound(run)
    final, places = run / _WEIGHTS, checkpoint.list_checkpoints(run / "checkpoints")
    if final.is_file() and (which == "final" or (which == "auto" and _is_newest(run, places))):
        return final
    if which in ("auto", "latest"):
        place, _ = checkpoint.newest_valid(run / "checkpoints")
        if place is not None:
            return place / _WEIGHTS
    if which == "best":
        step = _best_step(places)
        which = which if step is None else str(step)
    if re.fullmatch(r"\d+", which):
        place = run / "checkpoints" / checkpoint.folder_name(int(which))
        if place.is_dir():
            return _sound(place)
    there = ", ".join(str(int(place.name.removeprefix("step-"))) for place in reversed(places)) or "none"
    finished = "final weights" if final.is_file() else "no final weights"
    raise FolderError(
        f"{run} has no weights '{which}': there are {finished}, and checkpoints of steps {there}; "
        "choose final, best, latest or a step"
    )


def _is_newest(run: Path, places: list[Path]) -> bool:
    """Whether the final weights are: a finished run may have been trained on since."""
    summary = run / "summary.json"
    try:
        steps = json.loads(summary.read_text())["steps"] if summary.is_file() else 0
    except (ValueError, KeyError, TypeError):
        steps = 0
    return not places or steps >= int(places[0].name.removeprefix("step-"))


def _sound(place: Path) -> Path:
    problem = checkpoint.find_damage(place)
    if problem:
        raise FolderError(f"checkpoint {place}: {problem}; choose another one")
    return place / _WEIGHTS


def _best_step(places: list[Path]) -> int | None:
    """As the newest checkpoint that can be read tells it."""
    for place in places:
        if not checkpoint.find_damage(place):
            best = json.loads((place / "progress.json").read_text())["progress"]["best"]
            return int(best["step"]) if best else None
    return None


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor] | nn.Module, str | None]:
    """Weights, or a whole module, and what is said of them."""
    if path.name.endswith(_PROGRAMS):
        raise FolderError(
            f"{path} is a whole program, for its own reader; predict and evaluate take a run, or its weights"
        )
    try:
        if path.suffix in (".pt", ".pth"):
            found = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
            own: dict[str, Any] = found if isinstance(found, dict) else {}
            state = own.get("module") or own.get("state_dict", {})
            if not isinstance(state, nn.Module) and not all(isinstance(one, Tensor) for one in dict(state).values()):
                raise ValueError("its state_dict is none")
            return state, own.get(METADATA_KEY)
        path.open("rb").close()  # safetensors says of a file that may not be read that it is not there
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
            return weights, (file.metadata() or {}).get(METADATA_KEY)
    except pickle.UnpicklingError:
        raise FolderError(
            f"{path} holds more than weights: to load it could run any code. If you trust who made it: --allow-pickle"
        ) from None
    except _BAD_FILE as error:
        reason = " ".join(str(error).split())[:160]
        raise FolderError(f"{path} cannot be read ({reason}); give a run, or a file of weights of one") from None


def _about(path: Path, text: str | None) -> ModelMetadata:
    if text is None:
        raise FolderError(
            f"{path} does not say of which network its weights are; wanted a file that samecurve has written"
        )
    try:
        found: dict[str, Any] = json.loads(text)
        return ModelMetadata(
            ModelSettings(**found["model"]),
            tuple(found["classes"]),
            Normalization(tuple(found["normalization"]["mean"]), tuple(found["normalization"]["std"])),
            int(found["image_size"]),
            int(found["channels"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{path} describes its network in a way that is not known here ({error!r})") from None
