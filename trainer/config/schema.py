"""The settings: every name, type, default, range and line of help. What they may be together is config.py's."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from trainer.config.parse import parse_rate, parse_seconds, parse_steps
from trainer.config.plugins import DATASETS, LOSSES, MODELS, OPTIMIZERS, SCHEDULES

AUGMENTATIONS = ("flip", "alternating_flip", "crop", "cutout", "mixup", "cutmix")
DEFAULT_IMAGE_SIZE = 32


def setting(
    default: Any,
    help: str,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    example: str = "flip, crop",
    choices: Iterable[str] = (),
) -> Any:
    """A field with its one line of help and, for a number, its range: least <= value <= most, value > above; for a list
    that is empty by default, an example of what may be in it."""
    metadata: dict[str, Any] = {"help": help, "least": least, "above": above, "most": most, "example": example}
    metadata["choices"] = tuple(choices)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunSettings:
    name: str = setting("", "folder of this run under run.root; empty: the name of the last --config")
    root: str = setting("runs", "folder that holds the runs")
    seed: int = setting(0, "the one seed of weights, order, augmentation and dropout", least=0, most=2**32 - 1)
    resume: str = setting(
        "auto", "auto: go on with this run if it was begun; never: refuse to; PATH: start from that checkpoint"
    )


@dataclass(frozen=True)
class DataSettings:
    name: str = setting("cifar10", "the data set", choices=DATASETS)
    root: str = setting("data", "where the data set lies; image_folder: the folder that holds train/ and test/")
    download: bool = setting(True, "cifar10: download it when it is not under data.root")
    cache_dir: str | None = setting(
        None, "image_folder: where decoded images are kept; null: .samecurve under data.root"
    )
    global_batch_size: int = setting(128, "samples in an optimizer step, all ranks together", least=1)
    image_size: int | str = setting(
        DEFAULT_IMAGE_SIZE,
        "side of the square images in pixels, to which others are scaled and cropped; auto: what the weights of "
        f"model.pretrained were made for, without them {DEFAULT_IMAGE_SIZE}",
        least=1,
    )
    channels: int | str = setting("auto", "1 (grey), 3 (RGB) or auto: what the data set has")
    shuffle: bool = setting(True, "a new order each epoch; false: the data set's own")
    drop_last: bool = setting(False, "leave out the epoch's last batch when it is short")
    workers: int = setting(
        0, "DataLoader worker processes; the images lie in memory, so 0 is as a rule fastest", least=0
    )
    validation_fraction: float = setting(
        0.0, "class-balanced part of train, chosen by seed, held out to pick the best checkpoint", least=0.0, most=0.5
    )
    augment: list[str] = setting([], f"on each training batch, of {', '.join(AUGMENTATIONS)}")
    crop_padding: int = setting(4, "crop: pixels added on each side before the random crop", least=1)
    crop_border: Literal["black", "reflect"] = setting("black", "crop: what is added; reflect: the image, mirrored")
    cutout_size: int = setting(8, "cutout: side of the square that is blanked, in pixels", least=1)
    mixup_alpha: float = setting(
        0.2,
        "mixup: both parameters of the Beta distribution of an image's share; with cutmix too: one or the other",
        above=0.0,
    )
    cutmix_alpha: float = setting(1.0, "cutmix: the same, of the area that an image keeps", above=0.0)
    progressive_sizes: list[int] = setting(
        [],
        "sides of the training images in pixels, one after the other over the epochs; [] for image_size throughout",
        example="24, 32",
    )
    normalize: Literal["cifar10", "half", "data", "none", "weights"] = setting(
        "data",
        "channel means and deviations: CIFAR-10's, 0.5 and 0.5, computed from train, none: [0, 1] as it is, or those "
        "that the weights of model.pretrained were made for",
    )

    @property
    def side_pixels(self) -> int:
        """data.image_size, whose `auto` is a number by the time images are read."""
        assert isinstance(self.image_size, int), "data.image_size=auto has not been resolved"
        return self.image_size


@dataclass(frozen=True)
class ModelSettings:
    name: str = setting("resnet18", f"{', '.join(MODELS)}, or any torchvision classifier as torchvision/NAME")
    pretrained: str | None = setting(
        None, "torchvision models: ImageNet weights, a file's PATH or 'hub' for torch's hub folder; null: none"
    )
    head: Literal["replace", "append"] = setting(
        "replace", "torchvision models: replace the last layer, or append one to its 1,000 outputs"
    )
    freeze: list[str] = setting(
        [],
        "modules or weights, by their names in the network, that are not trained; a module computes as in evaluation: "
        "BatchNorm's statistics stay, dropout drops nothing",
        example="features, classifier.0",
    )
    widths: list[int] = setting([64, 256, 256], "speedrun: channels of each group of convolutions")
    depth: int = setting(2, "speedrun: convolutions in a group; a third one and more have a shortcut", least=1)


@dataclass(frozen=True)
class LossSettings:
    name: str = setting("cross_entropy", "the loss; mse and l1 on one-hot targets", choices=LOSSES)
    label_smoothing: float = setting(
        0.0, "cross_entropy: share of the target spread over all classes", least=0.0, most=1.0
    )


@dataclass(frozen=True)
class OptimSettings:
    name: str = setting("sgd", "the optimizer; muon: matrices by Muon, the rest by SGD", choices=OPTIMIZERS)
    lr: float = setting(0.1, "peak learning rate, for the global batch as it is; never rescaled", above=0.0)
    lr_vectors: float | None = setting(None, "the same of biases and of norms' weights; null: optim.lr", above=0.0)
    lr_head: float | None = setting(None, "the same of the last linear layer's weights; null: optim.lr", above=0.0)
    lr_parts: list[str] = setting(
        [],
        "the same of modules or weights by their names in the network, as NAME=RATE; the longest name that fits counts",
        example="features=0.001, classifier=0.01",
    )
    momentum: float = setting(0.9, "sgd, and what muon leaves to it: momentum", least=0.0, most=1.0)
    muon_momentum: float = setting(0.6, "muon: momentum of the matrices", least=0.0, most=1.0)
    nesterov: bool = setting(False, "sgd: Nesterov's momentum")
    betas: list[float] = setting([0.9, 0.999], "adamw: decay of the first and second moment")
    weight_decay: float = setting(
        0.0,
        "weight decay; adamw: decoupled; muon: share of head and vectors that a step at the peak rate takes off",
        least=0.0,
    )

    @property
    def lr_of_parts(self) -> dict[str, float]:
        """optim.lr_parts by name; nan for what is not readable as NAME=RATE."""
        return dict(parse_rate(text) for text in self.lr_parts)


@dataclass(frozen=True)
class ScheduleSettings:
    name: str = setting("cosine", "learning rate after the warmup", choices=SCHEDULES)
    warmup_epochs: float = setting(0.0, "epochs of linear rise from 0 to optim.lr", least=0.0)


@dataclass(frozen=True)
class TrainSettings:
    epochs: int = setting(10, "passes over the training set", least=1)
    max_steps: int | None = setting(
        None, "stop after so many optimizer steps; the schedule then ends there too", least=1
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: a GPU for each rank where there are GPUs, else the CPU"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto", "auto: bf16 on a GPU or a CPU with matrix units for it (AMX); else fp16 on a GPU, fp32 on a CPU"
    )
    virtual_ranks: int | None = setting(
        None,
        "shards of each global batch, on however many ranks: the same bits on all of them, and less memory each; "
        "null: one a rank",
        least=1,
    )
    threads_per_rank: int | str = setting(
        "auto", "CPU threads of each process; auto: cores over the ranks of this machine"
    )
    compile: bool = setting(False, "torch.compile the model")
    clip_grad_norm: float | None = setting(None, "largest norm of the gradient; null: not clipped", above=0.0)
    max_bad_steps: int = setting(
        3, "steps skipped because loss or gradient was not finite, in the whole run; one more ends it", least=0
    )
    time_limit: str | None = setting(
        None, "stop with a checkpoint before this much time is over: 90m, 1h30m, 1:30:00 or 2-12:00:00; null: never"
    )
    hang_timeout_seconds: float = setting(
        300.0, "several ranks: end the run when one is stuck for so long, and tell which; 0: wait for ever", least=0.0
    )
    profile: str | None = setting(
        None,
        "steps 10-20: torch.profiler's trace of these, counted from 1, both included, in the run folder; null: none",
    )

    @property
    def time_limit_seconds(self) -> float | None:
        """train.time_limit in seconds; None when there is none, or when it is not readable as a time."""
        return None if self.time_limit is None else parse_seconds(self.time_limit)

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The first and the last step of train.profile; None without one, or when it is not readable as steps."""
        return None if self.profile is None else parse_steps(self.profile)


@dataclass(frozen=True)
class EvalSettings:
    every_epochs: int = setting(1, "epochs between evaluations; 0: only at the end", least=0)
    batch_size: int = setting(250, "samples in a forward pass; does not change the result", least=1)
    tta: Literal["none", "mirror", "mirror_and_shift"] = setting(
        "none",
        "test-time augmentation, reported beside the plain accuracy: a weighted mean over 2 or 6 views",
    )


@dataclass(frozen=True)
class CheckpointSettings:
    every_steps: int = setting(0, "steps between checkpoints; 0: by epochs alone", least=0)
    every_epochs: int = setting(1, "epochs between checkpoints; 0: by steps alone", least=0)
    keep: int = setting(2, "newest checkpoints kept; the best one stays besides", least=1)


@dataclass(frozen=True)
class LogSettings:
    every_steps: int = setting(50, "steps between lines of training metrics", least=1)
    tensorboard: bool = setting(True, "write TensorBoard event files")
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto", "W&B; auto: online with a key and a network, else offline with the command that uploads it"
    )
    project: str = setting("samecurve", "the W&B project")
    group: str | None = setting(None, "W&B: runs that belong together; null: the folder of a run.name such as sweep/a")
    tags: list[str] = setting([], "W&B: words to find the run by", example="baseline, long")
    job_type: str = setting("train", "W&B: what kind of run it is among those of its group")
    notes: str | None = setting(None, "W&B: a text on the run")
    alerts: bool = setting(False, "W&B: a message when a loss is not finite, when the run fails, when it is finished")
    artifact: bool = setting(False, "W&B: the final weights as an artifact")
    report: bool = setting(True, "write report.html at the end, and at evaluations for 2 % of the time at most")
    figures: bool = setting(
        True,
        "at the first evaluation and the last, and at others for 2 % of the time at most: figures/NAME.png, and "
        "pictures, tables, graph, curves and histograms in TensorBoard and W&B",
    )
    feature_maps: list[str] = setting([], "layers whose maps of a test image are among the figures: [conv1, pool1]")


@dataclass(frozen=True)
class RunConfig:
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
        """Where this run's files go."""
        return Path(self.run.root).expanduser() / self.run.name


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """One setting as the schema has it."""

    name: str
    annotation: Any
    field: "dataclasses.Field[Any]"

    @property
    def default(self) -> Any:
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    @property
    def choices(self) -> tuple[str, ...]:
        """What a setting with a fixed list of choices may be; empty for others."""
        if "Literal" in str(self.annotation):
            return tuple(str(choice) for choice in get_args(self.annotation))
        choices: tuple[str, ...] = self.field.metadata.get("choices", ())
        return choices

    @property
    def is_text(self) -> bool:
        """Whether what is typed is taken as it is: YAML would read `off` as false and 1e-3 as text."""
        return bool(self.choices) or self.annotation in (str, str | None)

    @property
    def kind(self) -> str:
        """The type in words, for an error."""
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        parts = get_args(self.annotation) or (self.annotation,)
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if str(self.annotation).startswith("list"):
            return f"a list such as [{', '.join(map(str, self.default)) or self.field.metadata['example']}]"
        return " or ".join("null" if part is type(None) else words[part] for part in parts)


def settings_by_name() -> dict[str, SettingInfo]:
    """Every setting by its full name, in the order of the sections."""
    found = {}
    for section in dataclasses.fields(RunConfig):
        hints = get_type_hints(section.type)
        for entry in dataclasses.fields(section.type):  # type: ignore[arg-type]
            name = f"{section.name}.{entry.name}"
            found[name] = SettingInfo(name, hints[entry.name], entry)
    return found
