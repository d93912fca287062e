"""Settings: defaults, YAML files and `section.key=value` in, one frozen RunConfig out. Checks all; no torch."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.errors import ConfigError, WorldError, one_of
from trainer.settings import AUGMENTATIONS, RunConfig, SettingInfo, schema

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


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
    raise ConfigError(
        f"--config {name_or_path}: there is no {CONFIGS / name_or_path}.yaml; {one_of(name_or_path, known)}"
    )


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
        shown = (
            "null"
            if info.default is None
            else str(info.default).lower()
            if isinstance(info.default, bool)
            else info.default
        )
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
    content: Any = layer.get(section)
    return content.get(key) if isinstance(content, DictConfig) else None


def _override(text: str) -> DictConfig:
    name, equals, raw = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise ConfigError(
            f"'{text}' is not a setting: write section.key=value, such as train.epochs=3 (--help lists all)"
        )
    info = schema().get(name)
    value: Any = raw
    if info is None or not info.is_text or (raw == "null" and info.annotation == (str | None)):
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError:
            raise ConfigError(
                f"the command line: {text}: '{raw}' is not readable as YAML; quote it for the shell"
            ) from None
    for part in reversed(name.split(".")):
        value = {part: value}
    layer: DictConfig = OmegaConf.create(_literal(value))
    return layer


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
    plain: Any = OmegaConf.to_container(layer)
    for section, content in plain.items():
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
    name = PurePath(config.run.name)
    if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in config.run.name:
        yield f"run.name={config.run.name}: wanted the name of a folder under run.root; put the rest into run.root"
    if data.channels not in ("auto", 1, 3):
        yield f"data.channels={data.channels}: choose from 1, 3, auto"
    for kind in data.augment:
        if kind not in AUGMENTATIONS:
            yield f"data.augment={data.augment}: no augmentation '{kind}'; {one_of(kind, AUGMENTATIONS)}"
    if "cutout" in data.augment and data.cutout_size > data.image_size:
        yield f"data.cutout_size={data.cutout_size} is larger than data.image_size={data.image_size}; lower it"
    if not all(1 <= size <= data.image_size for size in data.progressive_sizes):
        yield f"data.progressive_sizes={data.progressive_sizes}: wanted 1 to data.image_size={data.image_size}"
    if len(data.progressive_sizes) > train.epochs:
        yield f"data.progressive_sizes={data.progressive_sizes}: more than train.epochs={train.epochs}; leave some out"
    if "flip" in data.augment and "alternating_flip" in data.augment:
        yield f"data.augment={data.augment}: flip and alternating_flip are two ways to mirror an image; choose one"
    if data.crop_border == "reflect" and data.crop_padding >= data.image_size:
        yield f"data.crop_padding={data.crop_padding}: {data.image_size} pixels cannot reflect so many; lower it"
    if config.eval.tta == "mirror_and_shift" and data.image_size < 2:
        yield "eval.tta=mirror_and_shift: data.image_size=1 leaves nothing to shift; choose mirror"
    if config.optim.name == "muon" and config.optim.weight_decay > 1:
        yield f"optim.weight_decay={config.optim.weight_decay}: muon's is a share of the weights; wanted 1 or less"
    if data.progressive_sizes and model.name in ("lenet", "tudui"):
        yield f"data.progressive_sizes={data.progressive_sizes}: {model.name} takes 32 pixels only; leave it []"
    if not model.widths or min(model.widths) < 1:
        yield f"model.widths={model.widths}: wanted one number of channels or more, each 1 or more"
    own_models = ("lenet", "tudui", "speedrun", "resnet18", "vgg16")
    if model.name not in own_models and not model.name.startswith("torchvision/"):
        yield f"model.name={model.name}: {one_of(model.name, own_models)}, or torchvision/NAME"
    if model.pretrained and model.name in ("lenet", "tudui", "speedrun", "resnet18"):
        yield f"model.pretrained={model.pretrained}: {model.name} has no such weights; use vgg16 or torchvision/NAME"
    if model.pretrained and data.channels == 1:
        yield f"model.pretrained={model.pretrained}: ImageNet weights take 3 channels; set data.channels=3"
    if config.loss.label_smoothing and config.loss.name != "cross_entropy":
        yield f"loss.label_smoothing={config.loss.label_smoothing}: only cross_entropy has it; set it to 0"
    if config.optim.name == "muon" and config.optim.nesterov:
        yield "optim.nesterov=true: muon's momentum is Nesterov's as it is; leave optim.nesterov=false"
    elif config.optim.nesterov and (config.optim.name != "sgd" or not config.optim.momentum):
        yield "optim.nesterov=true: wanted sgd with a momentum above 0; set optim.nesterov=false or optim.momentum=0.9"
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        yield f"optim.betas={config.optim.betas}: wanted two numbers from 0 up to, not including, 1"
    if config.schedule.warmup_epochs > train.epochs:
        warmup = config.schedule.warmup_epochs
        yield f"schedule.warmup_epochs={warmup} is more than train.epochs={train.epochs}; lower it"
    threads = train.threads_per_rank
    if threads != "auto" and not (isinstance(threads, int) and threads >= 1):
        yield f"train.threads_per_rank={threads}: wanted 1 or more, or auto"
    if train.virtual_ranks is not None and train.virtual_ranks > data.global_batch_size:
        size = data.global_batch_size
        yield f"train.virtual_ranks={train.virtual_ranks} is more than data.global_batch_size={size}; lower it"
    if train.time_limit is not None and not train.time_limit_seconds:
        yield f"train.time_limit={train.time_limit}: wanted a time such as 90m, 1h30m, 1:30:00 or 2-12:00:00"
    if train.device == "cpu" and train.precision == "fp16":
        yield "train.precision=fp16: a CPU has no fp16 training; choose fp32 or bf16"
