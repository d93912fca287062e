"""Defines every setting: section, name, type, default, range and help line. Imports no torch.

The sections eval, checkpoint and log are in output_settings.py, checks of values and combinations in validate.py.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_type_hints

from trainer.config.output_settings import CheckpointSettings, EvalSettings, LogSettings
from trainer.config.parse import parse_name_and_rate, parse_seconds, parse_step_range
from trainer.config.plugins import DATASETS, LOSSES, MODELS, OPTIMIZERS, SCHEDULES
from trainer.config.setting import SettingInfo, setting

AUGMENTATIONS = ("flip", "alternating_flip", "crop", "cutout", "mixup", "cutmix")
DEFAULT_IMAGE_SIZE = 32


@dataclass(frozen=True)
class RunSettings:
    """The run folder, the seed and the resume mode."""

    name: str = setting(
        "", "name of the run folder under run.root; empty: the name of the last --config", may_change=True
    )
    root: str = setting("runs", "folder that contains all run folders", may_change=True)
    seed: int = setting(
        0, "seed of the weights, the sample order, the augmentation and dropout", minimum=0, maximum=2**32 - 1
    )
    resume: str = setting(
        "auto",
        "auto: continue this run if it exists; never: refuse to continue it; PATH: start from that checkpoint, or from "
        "the newest one of that run folder",
        may_change=True,
    )


@dataclass(frozen=True)
class DataSettings:
    """The data set, the global batch and the augmentation."""

    name: str = setting("cifar10", "data set", choices=DATASETS)
    root: str = setting(
        "data", "folder of the data set; image_folder: the folder that contains train/ and test/", may_change=True
    )
    download: bool = setting(True, "cifar10: download the data set if it is not under data.root", may_change=True)
    cache_dir: str | None = setting(
        None, "image_folder: folder for decoded images; null: .samecurve under data.root", may_change=True
    )
    global_batch_size: int = setting(
        128, "samples in one optimizer step, on all ranks together", minimum=1, maximum=2**24
    )
    image_size: int | str = setting(
        DEFAULT_IMAGE_SIZE,
        "width and height of the images in pixels; other images are scaled and cropped; auto: the size that the "
        f"weights of model.pretrained expect, or {DEFAULT_IMAGE_SIZE} without them",
        minimum=1,
        maximum=8192,
    )
    channels: int | str = setting("auto", "1: gray; 3: RGB; auto: the channels of the data set")
    class_order: Literal["alphabetical", "natural"] = setting(
        "alphabetical", "image_folder: order of the classes; natural: class2 before class10"
    )
    accept_added_test_images: bool = setting(
        False,
        "continue a run, or evaluate it, although its data set has more test images than before; all others must be "
        "the same",
        may_change=True,
    )
    shuffle: bool = setting(True, "true: shuffle the samples in each epoch; false: keep the order of the data set")
    drop_last: bool = setting(False, "skip the last batch of an epoch if it is smaller than the others")
    workers: int = setting(
        0,
        "DataLoader worker processes; images are in memory, so 0 is usually fastest",
        minimum=0,
        maximum=256,
        may_change=True,
    )
    validation_fraction: float = setting(
        0.0,
        "fraction of each training class to hold out for choosing the best checkpoint; the seed selects the images",
        minimum=0.0,
        maximum=0.5,
    )
    augment: list[str] = setting([], f"list of augmentations for training batches: {', '.join(AUGMENTATIONS)}")
    crop_padding: int = setting(4, "crop: pixels to add on each side before the random crop", minimum=1, maximum=8192)
    crop_border: Literal["black", "reflect"] = setting("black", "crop: added pixels are black or a mirrored image")
    cutout_size: int = setting(8, "cutout: width and height of the blank square in pixels", minimum=1, maximum=8192)
    mixup_alpha: float = setting(
        0.2,
        "mixup: both parameters of the Beta distribution of the mixing ratio; with cutmix, each image gets one of both",
        above=0.0,
        maximum=1000.0,
    )
    cutmix_alpha: float = setting(
        1.0,
        "cutmix: both parameters of the Beta distribution of the area that an image keeps",
        above=0.0,
        maximum=1000.0,
    )
    progressive_sizes: list[int] = setting(
        [],
        "image sizes in pixels, spread evenly over the epochs; []: image_size in all epochs",
        example="24, 32",
    )
    normalize: Literal["cifar10", "half", "data", "none", "weights"] = setting(
        "data",
        "channel means and deviations; cifar10: those of CIFAR-10; half: 0.5 and 0.5; data: computed from the training "
        "set; none: 0 and 1; weights: those that the weights of model.pretrained expect",
    )

    @property
    def side_pixels(self) -> int:
        """Returns data.image_size as a number; `auto` is resolved before the first image is read."""
        assert isinstance(self.image_size, int), "data.image_size=auto has not been resolved"
        return self.image_size


@dataclass(frozen=True)
class ModelSettings:
    """The network."""

    name: str = setting("resnet18", f"network: {', '.join(MODELS)}, or torchvision/NAME for a torchvision classifier")
    pretrained: str | None = setting(
        None, "torchvision models: PATH of a file with ImageNet weights; hub: torch's hub folder; null: random weights"
    )
    head: Literal["replace", "append"] = setting(
        "replace", "torchvision models: replace the last layer, or append a layer to its 1,000 outputs"
    )
    freeze: list[str] = setting(
        [],
        "names of modules or weights that are not trained; a frozen module runs in evaluation mode (fixed BatchNorm "
        "statistics, no dropout)",
        example="features, classifier.0",
    )
    widths: list[int] = setting([64, 256, 256], "speedrun: channels of each group of convolutions")
    depth: int = setting(
        2, "speedrun: convolutions in each group; the third and later ones have a shortcut", minimum=1, maximum=32
    )


@dataclass(frozen=True)
class LossSettings:
    """The loss function."""

    name: str = setting("cross_entropy", "loss; mse and l1 use one-hot targets", choices=LOSSES)
    label_smoothing: float = setting(
        0.0, "cross_entropy: fraction of the target that is spread over all classes", minimum=0.0, maximum=1.0
    )


@dataclass(frozen=True)
class OptimSettings:
    """The optimizer and its learning rates."""

    name: str = setting(
        "sgd", "optimizer; muon: Muon for weight matrices, SGD for all other weights", choices=OPTIMIZERS
    )
    lr: float = setting(0.1, "peak learning rate; it is not scaled by the batch size", above=0.0)
    lr_vectors: float | None = setting(
        None, "peak learning rate of biases and normalization weights; null: optim.lr", above=0.0
    )
    lr_head: float | None = setting(None, "peak learning rate of the last linear layer; null: optim.lr", above=0.0)
    lr_parts: list[str] = setting(
        [],
        "peak learning rates of named modules or weights, as NAME=RATE; the longest matching name applies",
        example="features=0.001, classifier=0.01",
    )
    momentum: float = setting(0.9, "sgd, and the SGD part of muon: momentum", minimum=0.0, maximum=1.0)
    muon_momentum: float = setting(0.6, "muon: momentum of the weight matrices", minimum=0.0, maximum=1.0)
    nesterov: bool = setting(False, "sgd: use Nesterov momentum")
    betas: list[float] = setting([0.9, 0.999], "adamw: decay rates of the first and second moment")
    weight_decay: float = setting(
        0.0,
        "weight decay; adamw: decoupled; muon: fraction of the head and vectors removed per step at the peak rate",
        minimum=0.0,
    )

    @property
    def lr_by_part(self) -> dict[str, float]:
        """Returns optim.lr_parts as learning rates by name; nan for an item that is not NAME=RATE."""
        return dict(parse_name_and_rate(text) for text in self.lr_parts)


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate schedule."""

    name: str = setting("cosine", "learning rate schedule after the warmup", choices=SCHEDULES)
    warmup_epochs: float = setting(
        0.0, "epochs in which the learning rate rises linearly from 0 to optim.lr", minimum=0.0, maximum=1e7
    )


@dataclass(frozen=True)
class TrainSettings:
    """Length, device, precision and limits of the training."""

    epochs: int = setting(10, "number of epochs", minimum=1, maximum=10**7, may_change=True)
    max_steps: int | None = setting(
        None,
        "maximum number of optimizer steps; the schedule then ends at that step; null: no maximum",
        minimum=1,
        maximum=10**9,
        may_change=True,
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: one GPU per rank if the machine has GPUs, else the CPU", may_change=True
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "auto: bf16 on a GPU that supports it or a CPU with bf16 matrix units (AMX); else fp16 on a GPU, fp32 on a CPU",
    )
    virtual_ranks: int | None = setting(
        None,
        "number of shards of each global batch; the results are then bit-identical on any number of ranks; null: one "
        "shard per rank",
        minimum=1,
        maximum=65_536,
    )
    threads_per_rank: int | str = setting(
        "auto",
        "CPU threads of each process; auto: cores divided by the ranks of this machine",
        maximum=4096,
        may_change=True,
    )
    compile: bool = setting(False, "compile the model with torch.compile", may_change=True)
    clip_grad_norm: float | None = setting(None, "maximum norm of the gradient; null: no clipping", above=0.0)
    max_bad_steps: int = setting(
        3,
        "steps of the whole run that may be skipped because the loss or gradient is not finite; the next one ends it",
        minimum=0,
        maximum=10**9,
        may_change=True,
    )
    time_limit: str | None = setting(
        None,
        "save a checkpoint and stop before this time is over: 90m, 1h30m, 1:30:00 or 2-12:00:00; null: no limit",
        may_change=True,
    )
    hang_timeout_seconds: float = setting(
        300.0,
        "seconds awake without progress of a rank until the run ends and names that rank; 0: no limit",
        minimum=0.0,
        maximum=1e7,
        may_change=True,
    )
    profile: str | None = setting(
        None,
        "steps 10-20: write a torch.profiler trace of steps 10 to 20, counted from 1, to the run folder; null: none",
        may_change=True,
    )

    @property
    def time_limit_seconds(self) -> float | None:
        """Returns train.time_limit in seconds; None if it is null or not a valid time."""
        return None if self.time_limit is None else parse_seconds(self.time_limit)

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """Returns the first and last step of train.profile; None if it is null or not a valid range."""
        return None if self.profile is None else parse_step_range(self.profile)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, by section."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    log: LogSettings = field(default_factory=LogSettings)

    @property
    def folder(self) -> Path:
        """Returns the path of the run folder."""
        return Path(self.run.root).expanduser() / self.run.name


@functools.cache
def settings_by_name() -> dict[str, SettingInfo]:
    """Returns every setting by its full name, in the order of the sections. Do not change the dictionary."""
    settings = {}
    for section in dataclasses.fields(RunConfig):
        types = get_type_hints(section.type)
        for entry in dataclasses.fields(section.type):  # type: ignore[arg-type]
            name = f"{section.name}.{entry.name}"
            settings[name] = SettingInfo(name, types[entry.name], entry)
    return settings
