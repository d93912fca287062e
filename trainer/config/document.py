"""Parses YAML into settings by section. The schema gives each value its type, not YAML: `name: 12:30:00` stays text.

Imports no torch.
"""

import stat
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from trainer.config.setting import SettingInfo
from trainer.errors import ConfigError
from trainer.text.escape import one_line

_MAX_BYTES = 100_000
_MAX_DEPTH = 8  # sections, settings, lists
_NULLS = {"", "~", "null", "Null", "NULL"}
_FLOATS = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_MAX_DIGITS = 18

Layer = dict[str, Any]
"""Settings by section and key. A section that is not a mapping is ""; each value is a text, a list of texts, None, or a
number where the setting is `int | str`."""


def read_document(path: Path, settings: dict[str, SettingInfo]) -> Layer:
    """Returns the settings in a YAML file. Raises ConfigError if it is not a small text file with sections."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"{path} is {kind}; use the path of a YAML file")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_BYTES:,} bytes; expected a YAML file with settings")
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: bytes that are not UTF-8, or NUL in the path
        is_other_text = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if is_other_text else getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"{path} cannot be read ({reason}); use the path of a readable YAML file") from None
    try:
        root = _compose(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not readable as YAML ({one_line(error, None)}); fix that line") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} contains no sections; expected sections with settings, such as 'train: {{epochs: 3}}'"
        )
    return {section: _parse_section(section, node, settings, path) for section, node in _items(root, path)}


def parse_value(text: str, info: SettingInfo) -> Any:
    """Returns the value of `name=text` for a setting that is not text. Raises ConfigError if it is not YAML."""
    try:
        node = _compose(text)
    except yaml.YAMLError:
        raise ConfigError("not readable as YAML; check the brackets, or quote it for the shell") from None
    return None if node is None else _parse_node(node, info)


def _parse_section(section: str, node: yaml.Node, settings: dict[str, SettingInfo], path: Path) -> Any:
    if not isinstance(node, yaml.MappingNode):
        is_empty = isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS
        return {} if is_empty else ""
    content = {}
    for key, value in _items(node, path):
        try:
            content[key] = _parse_node(value, settings.get(f"{section}.{key}"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {section}.{key}: {error}") from None
    return content


def _items(node: yaml.MappingNode, path: Path) -> list[tuple[str, yaml.Node]]:
    """Returns keys and values. Raises ConfigError for a key that is not text or occurs twice."""
    items: dict[str, yaml.Node] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}: line {line} has a key that is not text; expected the name of a setting")
        if key.value in items:
            raise ConfigError(f"{path}: line {line} has the duplicate key {key.value}; remove one of them")
        items[key.value] = value
    return list(items.items())


def _parse_node(node: yaml.Node, info: SettingInfo | None) -> Any:
    """Raises ConfigError for a mapping, and for a list where the setting is none. info: None for an unknown setting."""
    if isinstance(node, yaml.ScalarNode):
        return _parse_scalar(node, info)
    if info is None:
        return None
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.SequenceNode) and info.is_list and all(isinstance(i, yaml.ScalarNode) for i in items):
        return [_parse_scalar(item, info) for item in items]
    raise ConfigError(
        f"expected {info.type_description}, got {'a mapping' if isinstance(node, yaml.MappingNode) else 'lists'}"
    )


def _parse_scalar(node: yaml.ScalarNode, info: SettingInfo | None) -> Any:
    text = str(node.value)
    types = get_args(info.annotation) if info is not None else ()
    if not node.style and text in _NULLS:
        is_text = info is not None and (info.is_text or types == (str,))
        return text if is_text and text and NoneType not in types else None
    if types == (int, str):
        digits = text.removeprefix("-")
        return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS else text
    return _FLOATS.get(text.lower(), text) if float in types or (info and info.annotation is float) else text


def _compose(text: str) -> yaml.Node | None:
    """Returns the syntax tree. Raises YAMLError for invalid YAML, for tags and for too many levels."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        line = event.start_mark.line + 1 if event.start_mark else 0
        if depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"line {line}: more than {_MAX_DEPTH} levels")
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.YAMLError(f"line {line}: tags such as {tag} are not supported")
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node
