"""Settings in, what is wrong with their values or with having them together out, a line each."""

import math
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from trainer.config.plugins import MODELS
from trainer.config.schema import AUGMENTATIONS, DataSettings, ModelSettings, OptimSettings, RunConfig
from trainer.errors import ConfigError, WorldError, suggest_choice


def range_errors(value: Any, limits: Any) -> Iterator[str]:
    """What a number was wanted to be, if it is not. limits: its field's metadata."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    low, above, high = limits["least"], limits["above"], limits["most"]
    if low is not None and not value >= low:
        yield f"{low} or more"
    if above is not None and not value > above:
        yield f"more than {above}"
    if high is not None and not value <= high:
        yield f"{high} or less"
    if value in (float("inf"), float("-inf")):
        yield "a finite number"


def conflicts(config: RunConfig) -> Iterator[str]:
    data, model, train = config.data, config.model, config.train
    name = PurePath(config.run.name)
    if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in config.run.name:
        yield f"run.name={config.run.name}: wanted the name of a folder under run.root; put the rest into run.root"
    if data.channels not in ("auto", 1, 3):
        yield f"data.channels={data.channels}: choose from 1, 3, auto"
    for kind in data.augment:
        if kind not in AUGMENTATIONS:
            yield f"data.augment={data.augment}: no augmentation '{kind}'; {suggest_choice(kind, AUGMENTATIONS)}"
    if isinstance(data.image_size, int):
        yield from _of_size(config, data, data.image_size)
    elif data.image_size != "auto":
        yield f"data.image_size={data.image_size}: wanted 1 or more, or auto"
    if len(data.progressive_sizes) > train.epochs:
        yield f"data.progressive_sizes={data.progressive_sizes}: more than train.epochs={train.epochs}; leave some out"
    if "flip" in data.augment and "alternating_flip" in data.augment:
        yield f"data.augment={data.augment}: flip and alternating_flip are two ways to mirror an image; choose one"
    if config.optim.name == "muon" and config.optim.weight_decay > 1:
        yield f"optim.weight_decay={config.optim.weight_decay}: muon's is a share of the weights; wanted 1 or less"
    if data.progressive_sizes and model.name in ("lenet", "tudui"):
        yield f"data.progressive_sizes={data.progressive_sizes}: {model.name} takes 32 pixels only; leave it []"
    if not model.widths or min(model.widths) < 1:
        yield f"model.widths={model.widths}: wanted one number of channels or more, each 1 or more"
    if model.name not in MODELS and not model.name.startswith("torchvision/"):
        yield f"model.name={model.name}: {suggest_choice(model.name, MODELS)}, or torchvision/NAME"
    if model.pretrained and model.name in ("lenet", "tudui", "speedrun", "resnet18"):
        yield f"model.pretrained={model.pretrained}: {model.name} has no such weights; use vgg16 or torchvision/NAME"
    if model.pretrained and data.channels == 1:
        yield f"model.pretrained={model.pretrained}: ImageNet weights take 3 channels; set data.channels=3"
    if data.normalize == "weights" and not model.pretrained:
        yield "data.normalize=weights: there are no weights without model.pretrained; set that, or choose data"
    if config.loss.label_smoothing and config.loss.name != "cross_entropy":
        yield f"loss.label_smoothing={config.loss.label_smoothing}: only cross_entropy has it; set it to 0"
    if config.optim.name == "muon" and config.optim.nesterov:
        yield "optim.nesterov=true: muon's momentum is Nesterov's as it is; leave optim.nesterov=false"
    elif config.optim.nesterov and (config.optim.name != "sgd" or not config.optim.momentum):
        yield "optim.nesterov=true: wanted sgd with a momentum above 0; set optim.nesterov=false or optim.momentum=0.9"
    yield from _of_rates(config.optim)
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas={config.optim.betas}: wanted two numbers from 0 up to, not including, 1"
    if config.schedule.warmup_epochs > train.epochs:
        warmup, tenth = config.schedule.warmup_epochs, f"schedule.warmup_epochs={train.epochs / 10:g}"
        yield f"schedule.warmup_epochs={warmup} is more than train.epochs={train.epochs}; shorten it, say to {tenth}"
    threads = train.threads_per_rank
    if threads != "auto" and not (isinstance(threads, int) and threads >= 1):
        yield f"train.threads_per_rank={threads}: wanted 1 or more, or auto"
    if train.virtual_ranks is not None and train.virtual_ranks > data.global_batch_size:
        size = data.global_batch_size
        yield f"train.virtual_ranks={train.virtual_ranks} is more than data.global_batch_size={size}; lower it"
    if train.time_limit is not None and not train.time_limit_seconds:
        yield f"train.time_limit={train.time_limit}: wanted a time such as 90m, 1h30m, 1:30:00 or 2-12:00:00"
    if train.profile is not None and not train.profile_steps:
        yield f"train.profile={train.profile}: wanted a first and a last step, counted from 1, such as 'steps 10-20'"
    if train.device == "cpu" and train.precision == "fp16":
        yield "train.precision=fp16: a CPU has no fp16 training; choose fp32 or bf16"


def _of_size(config: RunConfig, data: DataSettings, side: int) -> Iterator[str]:
    """side: of the images, in pixels."""
    if "cutout" in data.augment and data.cutout_size > side:
        yield f"data.cutout_size={data.cutout_size} is larger than data.image_size={side}; lower it"
    if not all(1 <= size <= side for size in data.progressive_sizes):
        yield f"data.progressive_sizes={data.progressive_sizes}: wanted 1 to data.image_size={side}"
    if data.crop_border == "reflect" and data.crop_padding >= side:
        yield f"data.crop_padding={data.crop_padding}: {side} pixels cannot reflect so many; lower it"
    if config.eval.tta == "mirror_and_shift" and side < 2:
        yield "eval.tta=mirror_and_shift: data.image_size=1 leaves nothing to shift; choose mirror"


def _of_rates(optim: OptimSettings) -> Iterator[str]:
    parts = f"optim.lr_parts={optim.lr_parts}"
    for name, rate in optim.lr_of_parts.items():
        if not name or not 0 < rate < math.inf:
            yield f"{parts}: wanted NAME=RATE, such as classifier=0.01, with a rate above 0"
    if len(optim.lr_of_parts) < len(optim.lr_parts):
        yield f"{parts} has a name twice; leave one out"
    for other in ("lr_vectors", "lr_head"):
        if optim.lr_parts and getattr(optim, other) is not None:
            yield (
                f"{parts}: optim.{other} would give some weights a second rate; "
                "leave that out, and name those weights in optim.lr_parts"
            )


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Raises WorldError when so many ranks cannot share a global batch."""
    size, virtual_ranks = config.data.global_batch_size, config.train.virtual_ranks
    if size < world_size:
        raise WorldError(
            f"data.global_batch_size={size} gives {world_size} ranks less than one sample each; "
            f"raise it to {world_size} or more, or start fewer ranks"
        )
    if virtual_ranks is not None and virtual_ranks < world_size:
        raise WorldError(
            f"train.virtual_ranks={virtual_ranks} leaves some of {world_size} ranks without a shard; "
            f"start {virtual_ranks} processes at most, or begin a new run with more virtual ranks"
        )


def check_pretrained_file(model: ModelSettings, path: Path) -> None:
    """Raises ConfigError when model.pretrained, which means this path, is not there."""
    if not path.is_file():
        name = model.name.removeprefix("torchvision/")
        raise ConfigError(
            f"model.pretrained={model.pretrained}: no file {path}; wanted torchvision's weights of {name} as a state "
            "dict. Give their path, or fetch them with torchvision on a machine with internet and copy the file there"
        )
