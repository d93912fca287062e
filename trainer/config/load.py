"""Loads settings from defaults, YAML files and `section.key=value` arguments into a checked RunConfig.

Imports no torch.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.config.schema import DEFAULT_IMAGE_SIZE, RunConfig, settings_by_name
from trainer.config.setting import SettingInfo
from trainer.config.validate import conflicts, range_errors
from trainer.errors import ConfigError, suggest_choice

# A checkout has configs/ next to trainer/; an installed package has it inside trainer/.
CONFIG_FOLDER = next(
    folder / "configs" for folder in Path(__file__).resolve().parents[1:3] if (folder / "configs").is_dir()
)


def find_config_file(name_or_path: str) -> Path:
    """Returns the YAML file of a `--config` argument. A bare NAME is configs/NAME.yaml.

    Raises ConfigError if there is no such file.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(
            f"--config {name_or_path}: no such file; use the path of a YAML file or the name of one in configs/"
        )
    files_by_name = {path.stem: path for path in CONFIG_FOLDER.glob("*.yaml")}
    if name_or_path in files_by_name:
        return files_by_name[name_or_path]
    raise ConfigError(
        f"--config {name_or_path}: there is no {CONFIG_FOLDER / name_or_path}.yaml; "
        f"{suggest_choice(name_or_path, files_by_name)}"
    )


def load_config(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """Returns the defaults, overridden by each YAML file in order, then by each `section.key=value` in order.

    An empty run.name becomes the name of the last file; in a trial of a W&B sweep it becomes NAME/SWEEP/TRIAL, so that
    each trial is a run of its own. log.project has WANDB_PROJECT as its default. data.image_size=auto becomes a number,
    unless it depends on pretrained weights.

    Raises ConfigError if a setting is unknown, has the wrong type, is out of range or contradicts another one.
    """
    config = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(config, False)
    for section in config:
        OmegaConf.set_readonly(config[section], False)
    layers = [(str(path), _read_file(path)) for path in files]
    layers += [("the command line", _parse_override(text)) for text in overrides]
    for origin, layer in layers:
        _check_names(origin, layer)
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_describe_error(origin, layer, error)) from None
    try:
        resolved: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from None
    if not resolved.run.name:
        name = "/".join([files[-1].stem if files else "cifar10", *_sweep_trial()])
        resolved = dataclasses.replace(resolved, run=dataclasses.replace(resolved.run, name=name))
    project = os.environ.get("WANDB_PROJECT", "")
    is_valid = re.fullmatch(r"[^/\\#?%:]{1,128}", project) and project.isprintable()  # W&B reports an invalid one
    if is_valid and resolved.log.project == settings_by_name()["log.project"].default:
        resolved = dataclasses.replace(resolved, log=dataclasses.replace(resolved.log, project=project))
    _check_values(resolved)
    if resolved.data.image_size == "auto" and not resolved.model.pretrained:
        resolved = with_image_size(resolved, DEFAULT_IMAGE_SIZE)
    return resolved


def _sweep_trial() -> list[str]:
    """Returns the ids of a W&B sweep and its trial, which the sweep's agent sets; empty outside a sweep."""
    ids = [os.environ.get(name, "") for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID")]
    return ids if all(re.fullmatch(r"\w[\w.-]*", text, re.ASCII) for text in ids) else []


def as_overrides(words: Sequence[str]) -> list[str]:
    """Returns words of the command line as section.key=value, in the forms that the agents of W&B sweeps write.

    These are --section.key=value, --section.key value, --section.key for true, and the forms with + or ++ in place of
    the hyphens. Other words stay as they are.
    """
    names = set(settings_by_name())
    sections = {name.partition(".")[0] for name in names}
    overrides: list[str] = []
    open_name = ""  # a setting whose value may be the next word
    for word in [*words, "--"]:
        match = re.fullmatch(r"(?:--|\+\+?)([\w.]+)(=.*)?", word, re.DOTALL)
        is_setting = bool(match and match[1].partition(".")[0] in sections)
        if open_name:
            is_value = not is_setting and not word.startswith("--")
            overrides.append(f"{open_name}={word if is_value else 'true'}")
            open_name = ""
            if is_value:
                continue
        if match and is_setting and match[2] is None and match[1] in names:
            open_name = match[1]
        else:
            overrides.append(f"{match[1]}{match[2]}" if match and is_setting and match[2] else word)
    return overrides[:-1]


def with_image_size(config: RunConfig, side: int) -> RunConfig:
    """Returns the settings with data.image_size=side, in pixels. Raises ConfigError if other settings contradict it."""
    resolved = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=side))
    _check_values(resolved)
    return resolved


def to_yaml(config: RunConfig) -> str:
    """Returns the settings as YAML that `--config` can read."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Returns the value of every setting by its full name, such as optim.lr."""
    nested = dataclasses.asdict(config)
    return {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()}


def help_text() -> str:
    """Returns one line per setting: name, default, help and choices; an empty line precedes each section."""
    lines, last_section = [], ""
    for name, info in settings_by_name().items():
        section = name.partition(".")[0]
        if section != last_section:
            lines.append("")
        last_section = section
        choices = f" ({'|'.join(info.choices)})" if info.choices else ""
        lines.append(f"  {f'{name}={_format_default(info.default)}':38} {info.help}{choices}")
    return "\n".join(lines)


def _format_default(default: Any) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


def _read_file(path: Path) -> DictConfig:
    try:
        layer = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not readable as YAML ({_one_line(error)}); fix that line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({_one_line(error)}); use the path of a readable YAML file") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(
            f"{path} contains no sections; expected sections with settings, such as 'train: {{epochs: 3}}'"
        )
    for name, info in settings_by_name().items():
        if "off" in info.choices and _select(layer, name) is False:  # YAML 1.1 reads an unquoted `off` as false
            OmegaConf.update(layer, name, "off")
    return layer


def _select(layer: DictConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    content: Any = layer.get(section)
    return content.get(key) if isinstance(content, DictConfig) else None


def _parse_override(text: str) -> DictConfig:
    name, equals, raw = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise ConfigError(
            f"'{text}' is not a setting; expected section.key=value, such as train.epochs=3 (--help lists all)"
        )
    info = settings_by_name().get(name)
    value: Any = raw
    if info is None or not info.is_text or (raw == "null" and info.annotation == (str | None)):
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError:
            raise ConfigError(
                f"the command line: {text}: not readable as YAML; check the brackets, or quote it for the shell"
            ) from None
    for key in reversed(name.split(".")):
        value = {key: value}
    layer: DictConfig = OmegaConf.create(_escape_interpolation(value))
    return layer


def _escape_interpolation(value: Any) -> Any:
    """Escapes `${` in all strings, so that OmegaConf keeps it as text instead of interpolating it."""
    if isinstance(value, dict):
        return {key: _escape_interpolation(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_interpolation(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _check_names(origin: str, layer: DictConfig) -> None:
    """Raises ConfigError for a name that is not in the schema, and suggests the most similar one."""
    settings = settings_by_name()
    sections = {name.partition(".")[0] for name in settings}
    values: Any = OmegaConf.to_container(layer)
    for section, content in values.items():
        if section not in sections:
            same_key = [name for name in settings if name.partition(".")[2] == section]
            hint = f"did you mean '{same_key[0]}'?" if same_key else suggest_choice(section, sections)
            raise ConfigError(f"{origin}: no section '{section}'; {hint}")
        if not isinstance(content, dict):
            raise ConfigError(f"{origin}: '{section}' is a section, not a setting; use {section}.KEY=VALUE")
        for key in content:
            if f"{section}.{key}" not in settings:
                hint = _suggest_setting(f"{section}.{key}", settings)
                raise ConfigError(f"{origin}: no setting '{section}.{key}'; {hint}")


def _suggest_setting(name: str, settings: dict[str, SettingInfo]) -> str:
    """Suggests a setting with the same key in another section, a similar name, or all settings of the section."""
    section, _, key = name.partition(".")
    same_key = [known for known in settings if known.partition(".")[2] == key]
    similar = same_key or difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    same_section = [known for known in settings if known.startswith(f"{section}.")]
    return f"did you mean '{similar[0]}'?" if similar else f"choose from {', '.join(same_section)}"


def _describe_error(origin: str, layer: DictConfig, error: OmegaConfBaseException) -> str:
    """Returns one line for an error of OmegaConf.merge: the setting, its value and the expected type."""
    name = str(getattr(error, "full_key", "") or "").partition("[")[0]
    info = settings_by_name().get(name)
    if isinstance(error, ConfigKeyError) or info is None:
        return f"{origin}: {_one_line(error)}"
    value = OmegaConf.select(layer, name)
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    shown = "null" if value is None else value
    advice = suggest_choice(value, info.choices) if info.choices else f"expected {info.type_description}"
    return f"{origin}: {name}={shown}: {advice}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_values(config: RunConfig) -> None:
    """Raises ConfigError for a value that is out of range and for settings that contradict each other."""
    settings = settings_by_name()
    for name, value in flatten(config).items():
        info = settings[name]
        if info.choices and value not in info.choices:
            raise ConfigError(f"{name}={value}: {suggest_choice(value, info.choices)}")
        for expected in range_errors(value, info.field.metadata):
            raise ConfigError(f"{name}={value}: expected {expected}")
    for problem in conflicts(config):
        raise ConfigError(problem)
