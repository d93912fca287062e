"""Settings: defaults, YAML files and `section.key=value` in, one frozen RunConfig out. Every check is here; no torch."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.errors import ConfigError, one_of

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
AUGMENTATIONS = ("flip", "crop", "cutout")


def setting(default: Any, help: str, least: float | None = None, above: float | None = None, most: float | None = None) -> Any:
    """A field with its one line of help and, for a number, its range: least <= value <= most, value > above."""
    metadata = {"help": help, "least": least, "above": above, "most": most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Run:
    name: str = setting("", "folder of this run under run.root; empty: the name of the last --config")
    root: str = setting("runs", "folder that holds the runs")
    seed: int = setting(0, "the one seed of weights, order, augmentation and dropout", least=0)
    resume: str = setting("auto", "auto: go on with this run if it was begun; never: refuse to; PATH: start from that checkpoint")


@dataclass(frozen=True)
class Data:
    name: Literal["cifar10", "image_folder", "digits"] = setting("cifar10", "the data set")
    root: str = setting("data", "where the data set lies; image_folder: the folder that holds train/ and test/")
    download: bool = setting(True, "cifar10: download it when it is not under data.root")
    cache_dir: str | None = setting(None, "image_folder: where decoded images are kept; null: .samecurve under data.root")
    global_batch_size: int = setting(128, "samples in an optimizer step, all ranks together", least=1)
    image_size: int = setting(32, "side of the square images in pixels; others are scaled and cropped to it", least=1)
    channels: int | str = setting("auto", "1 (grey), 3 (RGB) or auto: what the data set has")
    shuffle: bool = setting(True, "a new order each epoch; false: the data set's own")
    drop_last: bool = setting(False, "leave out the epoch's last batch when it is short")
    workers: int = setting(0, "DataLoader worker processes; the images lie in memory, so 0 is as a rule fastest", least=0)
    validation_fraction: float = setting(
        0.0, "class-balanced part of train, chosen by seed, held out to pick the best checkpoint", least=0.0, most=0.5
    )
    augment: list[str] = setting([], f"on each training batch, of {', '.join(AUGMENTATIONS)}")
    crop_padding: int = setting(4, "crop: black pixels added on each side before the random crop", least=1)
    cutout_size: int = setting(8, "cutout: side of the square that is blanked, in pixels", least=1)
    normalize: Literal["cifar10", "half", "data", "none"] = setting(
        "data", "channel means and deviations: CIFAR-10's, 0.5 and 0.5, computed from train, or none: [0, 1] as it is"
    )


@dataclass(frozen=True)
class Model:
    name: str = setting("resnet18", "lenet, tudui, resnet18, vgg16, or any torchvision classifier as torchvision/NAME")
    pretrained: str | None = setting(
        None, "torchvision models: ImageNet weights, a file's PATH or 'hub' for torch's hub folder; null: none"
    )
    head: Literal["replace", "append"] = setting(
        "replace", "torchvision models: replace the last layer, or append one to its 1,000 outputs"
    )


@dataclass(frozen=True)
class Loss:
    name: Literal["cross_entropy", "mse", "l1"] = setting("cross_entropy", "the loss; mse and l1 on one-hot targets")
    label_smoothing: float = setting(0.0, "cross_entropy: share of the target spread over all classes", least=0.0, most=1.0)


@dataclass(frozen=True)
class Optim:
    name: Literal["sgd", "adamw"] = setting("sgd", "the optimizer")
    lr: float = setting(0.1, "peak learning rate, for the global batch as it is; never rescaled", above=0.0)
    momentum: float = setting(0.9, "sgd: momentum", least=0.0, most=1.0)
    nesterov: bool = setting(False, "sgd: Nesterov's momentum")
    betas: list[float] = setting([0.9, 0.999], "adamw: decay of the first and second moment")
    weight_decay: float = setting(0.0, "weight decay; adamw: decoupled", least=0.0)


@dataclass(frozen=True)
class Schedule:
    name: Literal["constant", "cosine", "linear"] = setting("cosine", "learning rate after the warmup")
    warmup_epochs: float = setting(0.0, "epochs of linear rise from 0 to optim.lr", least=0.0)


@dataclass(frozen=True)
class Train:
    epochs: int = setting(10, "passes over the training set", least=1)
    max_steps: int | None = setting(None, "stop after so many optimizer steps; the schedule then ends there too", least=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: a GPU for each rank where there are GPUs, else the CPU")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "auto: fp32 on a CPU; bf16 on a GPU that has it, else fp16")
    threads_per_rank: int | str = setting("auto", "CPU threads of each process; auto: cores over the ranks of this machine")
    compile: bool = setting(False, "torch.compile the model")
    clip_grad_norm: float | None = setting(None, "largest norm of the gradient; null: not clipped", above=0.0)


@dataclass(frozen=True)
class Eval:
    every_epochs: int = setting(1, "epochs between evaluations; 0: only at the end", least=0)
    batch_size: int = setting(500, "samples in a forward pass; does not change the result", least=1)


@dataclass(frozen=True)
class Checkpoint:
    every_steps: int = setting(0, "steps between checkpoints; 0: by epochs alone", least=0)
    every_epochs: int = setting(1, "epochs between checkpoints; 0: by steps alone", least=0)
    keep: int = setting(2, "newest checkpoints kept; the best one stays besides", least=1)


@dataclass(frozen=True)
class Log:
    every_steps: int = setting(50, "steps between lines of training metrics", least=1)
    tensorboard: bool = setting(True, "write TensorBoard event files")
    wandb: Literal["auto", "online", "offline", "off"] = setting(
        "auto", "W&B; auto: online with a key and a network, else offline with the command that uploads it"
    )
    project: str = setting("samecurve", "the W&B project")


@dataclass(frozen=True)
class RunConfig:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)

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
        return tuple(str(choice) for choice in get_args(self.annotation)) if "Literal" in str(self.annotation) else ()

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
            return f"a list such as [{', '.join(map(str, self.default)) or 'flip, crop'}]"
        return " or ".join("null" if part is type(None) else words[part] for part in parts)


def schema() -> dict[str, SettingInfo]:
    """Every setting by its full name, in the order of the sections."""
    found = {}
    for section in dataclasses.fields(RunConfig):
        hints = get_type_hints(section.type)
        for entry in dataclasses.fields(section.type):  # type: ignore[arg-type]
            name = f"{section.name}.{entry.name}"
            found[name] = SettingInfo(name, hints[entry.name], entry)
    return found


def find(name_or_path: str) -> Path:
    """The YAML file that `--config` means: a bare NAME is configs/NAME.yaml."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(f"--config {name_or_path}: no such file; give the path of a YAML file or one of configs/")
    known = {found.stem: found for found in CONFIGS.glob("*.yaml")}
    if name_or_path in known:
        return known[name_or_path]
    raise ConfigError(f"--config {name_or_path}: there is no {CONFIGS / name_or_path}.yaml; {one_of(name_or_path, known)}")


def load(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """Defaults, then each YAML file, then each `section.key=value`; the later one wins.

    Raises ConfigError, one line, for whatever is unknown, of the wrong type or out of range.
    """
    config = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(config, False)
    for section in config:
        OmegaConf.set_readonly(config[section], False)
    layers = [(str(path), _read(path)) for path in files]
    layers += [("the command line", _override(text)) for text in overrides]
    for origin, layer in layers:
        _check_names(origin, layer)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(origin, layer, error)) from None
    try:
        plain: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from None
    if not plain.run.name:
        name = files[-1].stem if files else "cifar10"
        plain = dataclasses.replace(plain, run=dataclasses.replace(plain.run, name=name))
    _check_values(plain)
    return plain


def to_yaml(config: RunConfig) -> str:
    """The resolved settings as `--config` reads them."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every setting by its full name."""
    nested = dataclasses.asdict(config)
    return {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()}


def help_text() -> str:
    """One line for each setting: name, default, what it is."""
    lines, last_section = [], ""
    for name, info in schema().items():
        section = name.partition(".")[0]
        if section != last_section:
            lines.append("")
        last_section = section
        shown = "null" if info.default is None else str(info.default).lower() if isinstance(info.default, bool) else info.default
        choices = f" ({'|'.join(info.choices)})" if info.choices else ""
        lines.append(f"  {f'{name}={shown}':38} {info.field.metadata['help']}{choices}")
    return "\n".join(lines)


def _read(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not readable as YAML ({_one_line(error)}); mend that line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({_one_line(error)}); give the path of a YAML file") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path} holds a list; wanted sections with settings, such as 'train: {{epochs: 3}}'")
    for name, info in schema().items():
        if "off" in info.choices and _select(layer, name) is False:  # YAML 1.1 reads a bare `off` as false
            OmegaConf.update(layer, name, "off")
    return layer


def _select(layer: DictConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    content = layer.get(section)
    return content.get(key) if isinstance(content, DictConfig) else None


def _override(text: str) -> DictConfig:
    name, equals, raw = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise ConfigError(f"'{text}' is not a setting: write section.key=value, such as train.epochs=3 (--help lists all)")
    info = schema().get(name)
    value: Any = raw
    if info is None or not info.is_text or (raw == "null" and info.annotation == (str | None)):
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError:
            raise ConfigError(f"the command line: {text}: '{raw}' is not readable as YAML; quote it for the shell") from None
    for part in reversed(name.split(".")):
        value = {part: value}
    return OmegaConf.create(_literal(value))


def _literal(value: Any) -> Any:
    """What was typed, so that a `${` in it is two characters and not an interpolation."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _check_names(origin: str, layer: DictConfig) -> None:
    """Refuses names that are not in the schema, with the nearest one that is."""
    known = schema()
    sections = {name.partition(".")[0] for name in known}
    for section, content in OmegaConf.to_container(layer).items():  # type: ignore[union-attr]
        if section not in sections:
            near = [name for name in known if name.partition(".")[2] == section]
            hint = f"did you mean '{near[0]}'?" if near else one_of(section, sections)
            raise ConfigError(f"{origin}: no section '{section}'; {hint}")
        if not isinstance(content, dict):
            raise ConfigError(f"{origin}: '{section}' holds settings, got {content!r}; write {section}.KEY=VALUE")
        for key in content:
            if f"{section}.{key}" not in known:
                raise ConfigError(f"{origin}: no setting '{section}.{key}'; {_nearest(f'{section}.{key}', known)}")


def _nearest(name: str, known: dict[str, SettingInfo]) -> str:
    key = name.partition(".")[2]
    elsewhere = [full for full in known if full.partition(".")[2] == key]
    near = elsewhere or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    section = [full for full in known if full.startswith(name.partition(".")[0] + ".")]
    return f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(section)}"


def _explain(origin: str, layer: DictConfig, error: OmegaConfBaseException) -> str:
    name = str(getattr(error, "full_key", "") or "").partition("[")[0]
    info = schema().get(name)
    if isinstance(error, ConfigKeyError) or info is None:
        return f"{origin}: {_one_line(error)}"
    got = OmegaConf.select(layer, name)
    got = OmegaConf.to_container(got) if OmegaConf.is_config(got) else got
    shown = "null" if got is None else got
    return f"{origin}: {name}={shown}: {one_of(got, info.choices) if info.choices else f'wanted {info.kind}'}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_values(config: RunConfig) -> None:
    """Refuses values out of range and settings that contradict each other."""
    for name, value in flatten(config).items():
        limits = schema()[name].field.metadata
        for problem in _outside(value, limits):
            raise ConfigError(f"{name}={value}: wanted {problem}")
    for problem in _contradictions(config):
        raise ConfigError(problem)


def _outside(value: Any, limits: Any) -> Iterator[str]:
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


def _contradictions(config: RunConfig) -> Iterator[str]:
    data, model, train = config.data, config.model, config.train
    if PurePath(config.run.name).is_absolute() or ".." in PurePath(config.run.name).parts or "\0" in config.run.name:
        yield f"run.name={config.run.name}: wanted the name of a folder under run.root; put the rest into run.root"
    if data.channels not in ("auto", 1, 3):
        yield f"data.channels={data.channels}: choose from 1, 3, auto"
    for name in data.augment:
        if name not in AUGMENTATIONS:
            yield f"data.augment={data.augment}: no augmentation '{name}'; {one_of(name, AUGMENTATIONS)}"
    if "cutout" in data.augment and data.cutout_size > data.image_size:
        yield f"data.cutout_size={data.cutout_size} is larger than data.image_size={data.image_size}; lower it"
    own_models = ("lenet", "tudui", "resnet18", "vgg16")
    if model.name not in own_models and not model.name.startswith("torchvision/"):
        yield f"model.name={model.name}: {one_of(model.name, own_models)}, or torchvision/NAME"
    if model.pretrained and model.name in ("lenet", "tudui", "resnet18"):
        yield f"model.pretrained={model.pretrained}: '{model.name}' has no ImageNet weights; use vgg16 or torchvision/NAME"
    if model.pretrained and data.channels == 1:
        yield f"model.pretrained={model.pretrained}: ImageNet weights take 3 channels; set data.channels=3"
    if config.loss.label_smoothing and config.loss.name != "cross_entropy":
        yield f"loss.label_smoothing={config.loss.label_smoothing}: only cross_entropy has it; set it to 0"
    if config.optim.nesterov and (config.optim.name != "sgd" or not config.optim.momentum):
        yield "optim.nesterov=true: wanted sgd with a momentum above 0; set optim.nesterov=false or optim.momentum=0.9"
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas={config.optim.betas}: wanted two numbers from 0 up to, not including, 1"
    if config.schedule.warmup_epochs > train.epochs:
        yield f"schedule.warmup_epochs={config.schedule.warmup_epochs} is more than train.epochs={train.epochs}; lower it"
    threads = train.threads_per_rank
    if threads != "auto" and not (isinstance(threads, int) and threads >= 1):
        yield f"train.threads_per_rank={threads}: wanted 1 or more, or auto"
    if train.device == "cpu" and train.precision == "fp16":
        yield "train.precision=fp16: a CPU has no fp16 training; choose fp32 or bf16"
