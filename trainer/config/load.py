"""Settings: defaults, YAML files and `section.key=value` in, one frozen RunConfig out. Checks all; no torch."""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.config.schema import DEFAULT_IMAGE_SIZE, RunConfig, SettingInfo, settings_by_name
from trainer.config.validate import conflicts, range_errors
from trainer.errors import ConfigError, suggest_choice

# In a checkout beside the packages; in an installed package inside this one.
CONFIG_FOLDER = next(
    folder / "configs" for folder in Path(__file__).resolve().parents[1:3] if (folder / "configs").is_dir()
)


def find_config_file(name_or_path: str) -> Path:
    """The YAML file that `--config` means: a bare NAME is configs/NAME.yaml."""
    path = Path(name_or_path).expanduser()
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if path.is_file():
            return path
        raise ConfigError(f"--config {name_or_path}: no such file; give the path of a YAML file or one of configs/")
    known = {found.stem: found for found in CONFIG_FOLDER.glob("*.yaml")}
    if name_or_path in known:
        return known[name_or_path]
    raise ConfigError(
        f"--config {name_or_path}: there is no {CONFIG_FOLDER / name_or_path}.yaml; "
        f"{suggest_choice(name_or_path, known)}"
    )


def load_config(files: Sequence[Path], overrides: Sequence[str]) -> RunConfig:
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
    if plain.data.image_size == "auto" and not plain.model.pretrained:
        plain = with_image_size(plain, DEFAULT_IMAGE_SIZE)
    return plain


def with_image_size(config: RunConfig, side: int) -> RunConfig:
    """The settings with a number for data.image_size=auto. Raises ConfigError where others do not go with it."""
    found = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=side))
    _check_values(found)
    return found


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
    for name, info in settings_by_name().items():
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
    for name, info in settings_by_name().items():
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
    info = settings_by_name().get(name)
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
    known = settings_by_name()
    sections = {name.partition(".")[0] for name in known}
    plain: Any = OmegaConf.to_container(layer)
    for section, content in plain.items():
        if section not in sections:
            near = [name for name in known if name.partition(".")[2] == section]
            hint = f"did you mean '{near[0]}'?" if near else suggest_choice(section, sections)
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
    info = settings_by_name().get(name)
    if isinstance(error, ConfigKeyError) or info is None:
        return f"{origin}: {_one_line(error)}"
    got = OmegaConf.select(layer, name)
    got = OmegaConf.to_container(got) if OmegaConf.is_config(got) else got
    shown = "null" if got is None else got
    return f"{origin}: {name}={shown}: {suggest_choice(got, info.choices) if info.choices else f'wanted {info.kind}'}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_values(config: RunConfig) -> None:
    """Refuses values out of range and settings that contradict each other."""
    settings = settings_by_name()
    for name, value in flatten(config).items():
        if settings[name].choices and value not in settings[name].choices:
            raise ConfigError(f"{name}={value}: {suggest_choice(value, settings[name].choices)}")
        limits = settings[name].field.metadata
        for problem in range_errors(value, limits):
            raise ConfigError(f"{name}={value}: wanted {problem}")
    for problem in conflicts(config):
        raise ConfigError(problem)
