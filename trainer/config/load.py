"""Loads settings from defaults, YAML files and `section.key=value` arguments into a checked RunConfig.

Imports no torch.
"""

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, GrammarParseError, OmegaConfBaseException

from trainer.config.document import Layer, parse_value, read_document
from trainer.config.schema import DEFAULT_IMAGE_SIZE, RunConfig, settings_by_name
from trainer.config.setting import SettingInfo
from trainer.config.texts import is_secret_variable, secret_problems, text_problems
from trainer.config.validate import conflicts, range_errors
from trainer.errors import ConfigError, suggest_choice
from trainer.text.escape import one_line, shorten

_SHOWN_CHARACTERS = 80

# A checkout has configs/ next to trainer/; an installed package has it inside trainer/.
CONFIG_FOLDER = next(
    folder / "configs" for folder in Path(__file__).resolve().parents[1:3] if (folder / "configs").is_dir()
)


def find_config_file(name_or_path: str) -> Path:
    """Returns the path of a `--config` argument, which exists. A bare NAME is configs/NAME.yaml.

    Raises ConfigError if there is no such file.
    """
    shown = shorten(name_or_path, _SHOWN_CHARACTERS)
    files_by_name = {path.stem: path for path in CONFIG_FOLDER.glob("*.yaml")}
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        try:
            path = path.expanduser()
            if path.exists():
                return path
        except (OSError, ValueError, RuntimeError):  # a name that is too long, NUL, the ~ of an unknown user
            pass
        hint = "use the path of a YAML file or the name of one in configs/"
        if path.stem in files_by_name:
            hint = f"did you mean --config {path.stem}?"
        raise ConfigError(f"--config {shown}: no such file; {hint}")
    if name_or_path in files_by_name:
        return files_by_name[name_or_path]
    raise ConfigError(
        f"--config {shown}: there is no {CONFIG_FOLDER / shown}.yaml; {suggest_choice(shown, files_by_name)}"
    )


def load_config(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
    """Returns the defaults, overridden by each YAML file in order, then by each `section.key=value` in order.

    An empty run.name becomes the name of the last file, NAME; in a trial of a W&B sweep it becomes
    NAME-sweep-SWEEP/TRIAL, so that each trial is a run of its own, and not inside the run NAME. log.project has
    WANDB_PROJECT as its default. data.image_size=auto becomes a number, unless it depends on pretrained weights.

    Raises ConfigError if a setting is unknown, has the wrong type, is out of range or contradicts another one.
    """
    OmegaConf.register_resolver("oc.env", _read_variable, replace=True)
    settings = settings_by_name()
    config: Any = _defaults()
    layers = [(str(path), read_document(path, settings)) for path in files]
    layers += [("the command line", _parse_override(text, settings)) for text in overrides]
    for origin, layer in layers:
        _check_names(origin, layer, settings)
        try:
            config = OmegaConf.merge(config, OmegaConf.create(layer))
        except OmegaConfBaseException as error:
            raise ConfigError(_describe_error(origin, layer, error)) from None
        except RecursionError:
            raise ConfigError(f"{origin}: a ${{...}} contains too many others; write the value itself") from None
    try:
        resolved: RunConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(_own_cause(error) or error, None)) from None
    except RecursionError:
        raise ConfigError("a ${...} contains too many others; write the value itself") from None
    if not resolved.run.name:
        name = files[-1].stem if files else "cifar10"
        if trial := _sweep_trial():
            name = f"{name}-sweep-{trial[0]}/{trial[1]}"
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


@functools.cache
def _defaults() -> DictConfig:
    """Returns the defaults, with the type of each setting. OmegaConf.merge copies them."""
    config: DictConfig = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(config, False)
    for section in config:
        OmegaConf.set_readonly(config[section], False)
    return config


def _read_variable(variable: Any, *default: Any) -> Any:
    """Replaces OmegaConf's ${oc.env:NAME,default}. Raises ConfigError for a variable with a secret."""
    name = str(variable)
    if is_secret_variable(name):
        raise ConfigError(
            f"${{oc.env:{name}}} looks like a secret, which would be written to config.yaml and report.html; leave it "
            "out; W&B reads its key from the environment itself"
        )
    if name in os.environ or default:
        return os.environ.get(name, *default)
    raise ConfigError(f"${{oc.env:{name}}}: there is no environment variable {name}; set it, or write the value itself")


def _parse_override(text: str, settings: dict[str, SettingInfo]) -> Layer:
    name, equals, value = text.partition("=")
    if not equals or not name or name.startswith("-"):
        raise ConfigError(
            f"'{_show(text)}' is not a setting; expected section.key=value, such as train.epochs=3 (--help lists all)"
        )
    info = settings.get(name)
    section, dot, key = name.partition(".")
    if info is None:
        return {section: {key: value} if dot else value}
    try:
        parsed = parse_value(value, info) if not info.is_text else value
    except ConfigError as error:
        raise ConfigError(f"the command line: {_show(text)}: {error}") from None
    if value == "null" and info.annotation == (str | None):
        parsed = None
    return {section: {key: _escape_interpolation(parsed)}}


def _escape_interpolation(value: Any) -> Any:
    """Escapes `${` in all strings, so that OmegaConf keeps it as text instead of interpolating it."""
    if isinstance(value, list):
        return [_escape_interpolation(item) for item in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def _check_names(origin: str, layer: Layer, settings: dict[str, SettingInfo]) -> None:
    """Raises ConfigError for a name that is not in the schema, and suggests the most similar one."""
    sections = {name.partition(".")[0] for name in settings}
    for section, content in layer.items():
        if section not in sections:
            same_key = [name for name in settings if name.partition(".")[2] == section]
            hint = f"did you mean '{same_key[0]}'?" if same_key else suggest_choice(section, sections)
            raise ConfigError(f"{origin}: no section '{_show(section)}'; {hint}")
        if not isinstance(content, dict):
            raise ConfigError(f"{origin}: '{section}' is a section, not a setting; use {section}.KEY=VALUE")
        for key in content:
            if f"{section}.{key}" not in settings:
                hint = _suggest_setting(f"{section}.{key}", settings)
                raise ConfigError(f"{origin}: no setting '{section}.{_show(key)}'; {hint}")


def _suggest_setting(name: str, settings: dict[str, SettingInfo]) -> str:
    """Suggests a setting with the same key in another section, a similar name, or all settings of the section."""
    section, _, key = name.partition(".")
    same_key = [known for known in settings if known.partition(".")[2] == key]
    similar = same_key or difflib.get_close_matches(name, settings, n=1, cutoff=0.75)
    same_section = [known for known in settings if known.startswith(f"{section}.")]
    return f"did you mean '{similar[0]}'?" if similar else f"choose from {', '.join(same_section)}"


def _describe_error(origin: str, layer: Layer, error: OmegaConfBaseException) -> str:
    """Returns one line for an error of OmegaConf.merge: the setting, its value and the expected type."""
    name = str(getattr(error, "full_key", "") or "").partition("[")[0]
    info = settings_by_name().get(name)
    if isinstance(error, (ConfigKeyError, GrammarParseError)) or info is None:
        return f"{origin}: {one_line(error, None)}"
    section, _, key = name.partition(".")
    value = layer[section][key]
    advice = suggest_choice(value, info.choices) if info.choices else f"expected {info.type_description}"
    return f"{origin}: {name}={_show(value)}: {advice}"


def _show(value: Any) -> str:
    return shorten("null" if value is None else str(value), _SHOWN_CHARACTERS)


def _own_cause(error: BaseException | None) -> ConfigError | None:
    """Returns the ConfigError of a resolver, which OmegaConf wraps, or None."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _check_values(config: RunConfig) -> None:
    """Raises ConfigError for a value that is out of range and for settings that contradict each other."""
    settings, values = settings_by_name(), flatten(config)
    for problem in secret_problems(values):  # first: other messages quote values
        raise ConfigError(problem)
    for name, value in values.items():
        info = settings[name]
        if info.choices and value not in info.choices:
            raise ConfigError(f"{name}={_show(value)}: {suggest_choice(value, info.choices)}")
        for expected in (*range_errors(value, info.field.metadata), *text_problems(name, value)):
            raise ConfigError(f"{name}={_show(value)}: expected {expected}")
    for problem in conflicts(config):
        raise ConfigError(problem)
