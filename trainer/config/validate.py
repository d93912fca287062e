"""Checks ranges of settings, contradictions between settings, and whether the ranks can share a global batch.

Imports no torch.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.config.plugins import MODELS, TORCHVISION_NAMES
from trainer.config.schema import (
    AUGMENTATIONS,
    DataSettings,
    ModelSettings,
    OptimSettings,
    RunConfig,
    TrainSettings,
)
from trainer.config.texts import path_problems, run_name_problems
from trainer.errors import ConfigError, WorldError, suggest_choice

# Images of 32 pixels only. Refused here before torch loads, and by build.py for any network.
_FIXED_SIZE_MODELS = ("lenet", "tudui")
_MAX_GROUPS, _MAX_WIDTH = 8, 4096
_MIN_HANG_SECONDS = 1
_MAX_PROFILE_STEPS = 1000
# Only torchvision's networks have pretrained weights.
_MODELS_WITHOUT_WEIGHTS = {name for name, part in MODELS.items() if not part.startswith("trainer.models.torchvision:")}


def range_errors(value: Any, limits: Mapping[str, Any]) -> Iterator[str]:
    """Yields the expectations that a number does not meet, such as "1 or more"; nothing for other types.

    limits: the metadata of the setting, with the keys minimum, above and maximum.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    minimum, above, maximum = limits["minimum"], limits["above"], limits["maximum"]
    if minimum is not None and not value >= minimum:
        yield f"{minimum} or more"
    if above is not None and not value > above:
        yield f"more than {above}"
    if maximum is not None and not value <= maximum:
        yield f"{maximum} or less"
    if value in (math.inf, -math.inf):
        yield "a finite number"


def conflicts(config: RunConfig) -> Iterator[str]:
    """Yields one error message for each invalid value that has no plain range and for each contradiction."""
    yield from run_name_problems(config.run.name)
    yield from path_problems(
        {
            "run.root": config.run.root,
            "run.resume": config.run.resume,
            "data.root": config.data.root,
            "data.cache_dir": config.data.cache_dir,
            "model.pretrained": config.model.pretrained,
        }
    )
    yield from _data_conflicts(config)
    yield from _model_conflicts(config.model, config.data)
    if config.loss.label_smoothing and config.loss.name != "cross_entropy":
        yield f"loss.label_smoothing={config.loss.label_smoothing}: only cross_entropy supports it; set it to 0"
    yield from _optimizer_conflicts(config.optim)
    yield from _part_rate_conflicts(config.optim)
    yield from _training_conflicts(config.train, config)


def _data_conflicts(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.channels not in ("auto", 1, 3):
        yield f"data.channels={data.channels}: choose from 1, 3, auto"
    for name in data.augment:
        if name not in AUGMENTATIONS:
            yield f"data.augment={data.augment}: no augmentation '{name}'; {suggest_choice(name, AUGMENTATIONS)}"
    if isinstance(data.image_size, int):
        yield from _size_conflicts(config, data.image_size)
    elif data.image_size != "auto":
        yield f"data.image_size={data.image_size}: expected 1 or more, or auto"
    sizes = f"data.progressive_sizes={data.progressive_sizes}"
    if len(data.progressive_sizes) > config.train.epochs:
        yield f"{sizes}: more sizes than train.epochs={config.train.epochs}; use fewer sizes"
    if data.progressive_sizes and config.model.name in _FIXED_SIZE_MODELS:
        yield f"{sizes}: {config.model.name} accepts 32 pixels only; set it to []"
    if "flip" in data.augment and "alternating_flip" in data.augment:
        yield f"data.augment={data.augment}: flip and alternating_flip both mirror images; use only one of them"
    if data.normalize == "weights" and not config.model.pretrained:
        yield "data.normalize=weights: expected model.pretrained; set it, or choose data.normalize=data"


def _size_conflicts(config: RunConfig, side: int) -> Iterator[str]:
    """side: width and height of the images in pixels."""
    data = config.data
    if "cutout" in data.augment and data.cutout_size > side:
        yield f"data.cutout_size={data.cutout_size} is larger than data.image_size={side}; lower it"
    if not all(1 <= size <= side for size in data.progressive_sizes):
        yield f"data.progressive_sizes={data.progressive_sizes}: expected sizes from 1 to data.image_size={side}"
    if data.crop_border == "reflect" and data.crop_padding >= side:
        yield (
            f"data.crop_padding={data.crop_padding}: data.crop_border=reflect needs less than data.image_size={side}; "
            "lower it"
        )
    if "crop" in data.augment and data.crop_padding > side:
        yield f"data.crop_padding={data.crop_padding} is larger than data.image_size={side}; lower it"
    if config.eval.tta == "mirror_and_shift" and side < 2:
        yield "eval.tta=mirror_and_shift: data.image_size=1 is too small to shift; choose mirror"


def _model_conflicts(model: ModelSettings, data: DataSettings) -> Iterator[str]:
    if not 1 <= len(model.widths) <= _MAX_GROUPS or not all(1 <= width <= _MAX_WIDTH for width in model.widths):
        yield (
            f"model.widths={model.widths}: expected one or more numbers of channels (at most {_MAX_GROUPS}), each "
            f"1 or more and {_MAX_WIDTH:,} or less"
        )
    if model.name not in MODELS and not model.name.startswith("torchvision/"):
        yield f"model.name={model.name}: {_suggest_model(model.name)}"
    if model.pretrained and model.name in _MODELS_WITHOUT_WEIGHTS:
        yield (
            f"model.pretrained={model.pretrained}: there are no pretrained weights of {model.name}; "
            "use vgg16 or torchvision/NAME"
        )
    if model.pretrained and data.channels == 1:
        yield f"model.pretrained={model.pretrained}: ImageNet weights need 3 channels; set data.channels=3"


def _suggest_model(name: str) -> str:
    """Suggests torchvision's network of this name, in any spelling, or else the most similar of our own."""
    for known in TORCHVISION_NAMES:
        if re.sub(r"\W|_", "", name.lower()) == known.replace("_", ""):
            return f"did you mean 'torchvision/{known}'? choose from {', '.join(MODELS)}, or torchvision/NAME"
    return f"{suggest_choice(name, MODELS)}, or torchvision/NAME"


def _optimizer_conflicts(optim: OptimSettings) -> Iterator[str]:
    if optim.name == "muon" and optim.weight_decay > 1:
        yield f"optim.weight_decay={optim.weight_decay}: for muon it is a fraction of the weights; expected 1 or less"
    if optim.name == "muon" and optim.nesterov:
        yield "optim.nesterov=true: muon always uses Nesterov momentum; set optim.nesterov=false"
    elif optim.nesterov and (optim.name != "sgd" or not optim.momentum):
        yield (
            "optim.nesterov=true: expected sgd with a momentum above 0; "
            "set optim.nesterov=false, or optim.name=sgd and optim.momentum=0.9"
        )
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas={optim.betas}: expected two numbers, each at least 0 and below 1"


def _part_rate_conflicts(optim: OptimSettings) -> Iterator[str]:
    setting = f"optim.lr_parts={optim.lr_parts}"
    for name, rate in optim.lr_by_part.items():
        if not name or not 0 < rate < math.inf:
            yield f"{setting}: expected NAME=RATE with a rate above 0, such as classifier=0.01"
    if len(optim.lr_by_part) < len(optim.lr_parts):
        yield f"{setting} contains a name twice; remove one"
    for other_setting in ("lr_vectors", "lr_head"):
        if optim.lr_parts and getattr(optim, other_setting) is not None:
            yield (
                f"{setting}: optim.{other_setting} would set a second rate for some weights; "
                "remove it and name those weights in optim.lr_parts"
            )


def _training_conflicts(train: TrainSettings, config: RunConfig) -> Iterator[str]:
    warmup_epochs, global_batch_size = config.schedule.warmup_epochs, config.data.global_batch_size
    if warmup_epochs > train.epochs:
        advice = f"lower it, for example to schedule.warmup_epochs={train.epochs / 10:g}"
        yield f"schedule.warmup_epochs={warmup_epochs} is more than train.epochs={train.epochs}; {advice}"
    threads = train.threads_per_rank
    if threads != "auto" and not (isinstance(threads, int) and threads >= 1):
        yield f"train.threads_per_rank={threads}: expected 1 or more, or auto"
    if 0 < train.hang_timeout_seconds < _MIN_HANG_SECONDS:
        yield (
            f"train.hang_timeout_seconds={train.hang_timeout_seconds}: expected {_MIN_HANG_SECONDS} or more, or 0 for "
            "no limit"
        )
    if train.virtual_ranks is not None and train.virtual_ranks > global_batch_size:
        yield (
            f"train.virtual_ranks={train.virtual_ranks} is more than data.global_batch_size={global_batch_size}; "
            "lower it"
        )
    if train.time_limit is not None and not train.time_limit_seconds:
        yield f"train.time_limit={train.time_limit}: expected a time such as 90m, 1h30m, 1:30:00 or 2-12:00:00"
    if train.profile is not None and not train.profile_steps:
        yield f"train.profile={train.profile}: expected a first and a last step, counted from 1, such as 'steps 10-20'"
    elif train.profile_steps and train.profile_steps[1] - train.profile_steps[0] >= _MAX_PROFILE_STEPS:
        yield f"train.profile={train.profile}: expected {_MAX_PROFILE_STEPS} steps or fewer, because a trace is large"
    if train.device == "cpu" and train.precision == "fp16":
        yield "train.precision=fp16: CPU training does not support fp16; choose fp32 or bf16"


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Raises WorldError if `world_size` ranks cannot share a global batch or its shards."""
    global_batch_size, virtual_ranks = config.data.global_batch_size, config.train.virtual_ranks
    if global_batch_size < world_size:
        raise WorldError(
            f"data.global_batch_size={global_batch_size} has less than one sample for each of {world_size} ranks; "
            f"raise it to {world_size} or more, or start fewer ranks"
        )
    if virtual_ranks is not None and virtual_ranks < world_size:
        raise WorldError(
            f"train.virtual_ranks={virtual_ranks} has less than one shard for each of {world_size} ranks; "
            f"start {virtual_ranks} ranks or fewer, or start a new run with more virtual ranks"
        )


def check_precision(precision: str, on_gpu: bool, source: str) -> None:
    """Raises WorldError if the ranks cannot train in this precision. source: what selects it, for the message."""
    if precision == "fp16" and not on_gpu:
        raise WorldError(f"{source}: a CPU has no fp16 training; set train.precision to fp32 or bf16")


def check_pretrained_file(model: ModelSettings, path: Path) -> None:
    """Raises ConfigError if the file of model.pretrained does not exist. path: the resolved path of that file."""
    if not path.is_file():
        name = model.name.removeprefix("torchvision/")
        raise ConfigError(
            f"model.pretrained={model.pretrained}: no file {path}; expected a state dict with torchvision's weights of "
            f"{name}. Set the path of that file, or download it with torchvision on a machine with internet access and "
            "copy it here"
        )
