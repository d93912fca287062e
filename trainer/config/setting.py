"""Describes one setting: its type, default, range, choices and help line. Imports no torch."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, get_args


def setting(
    default: Any,
    help: str,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    example: str = "flip, crop",
    choices: Iterable[str] = (),
    may_change: bool = False,
) -> Any:
    """Returns a dataclass field that carries the metadata of a setting.

    help: one line for --help.
    minimum, above, maximum: the range of a number: minimum <= value <= maximum, value > above.
    example: list items that an error message shows when the default list is empty.
    choices: allowed values of a text setting whose type is not a Literal.
    may_change: an unfinished run may continue with another value, because the setting does not affect finished steps.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "example": example,
        "choices": tuple(choices),
        "may_change": may_change,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """The schema entry of one setting."""

    name: str
    """full name, such as optim.lr"""
    annotation: Any
    field: "dataclasses.Field[Any]"

    @property
    def default(self) -> Any:
        """Returns the default value; a new list for a list setting."""
        factory = self.field.default_factory
        return self.field.default if factory is dataclasses.MISSING else factory()

    @property
    def help(self) -> str:
        """Returns the line that --help shows."""
        return str(self.field.metadata["help"])

    @property
    def may_change(self) -> bool:
        """Returns whether an unfinished run may continue with another value."""
        return bool(self.field.metadata["may_change"])

    @property
    def choices(self) -> tuple[str, ...]:
        """Returns the allowed values, or an empty tuple for a setting without a fixed list of choices."""
        if "Literal" in str(self.annotation):
            return tuple(str(choice) for choice in get_args(self.annotation))
        choices: tuple[str, ...] = self.field.metadata.get("choices", ())
        return choices

    @property
    def is_text(self) -> bool:
        """Returns whether a value from the command line stays text. YAML reads `off` as false and 1e-3 as text."""
        return bool(self.choices) or self.annotation in (str, str | None)

    @property
    def is_list(self) -> bool:
        """Returns whether the value is a list."""
        return str(self.annotation).startswith("list")

    @property
    def type_description(self) -> str:
        """Returns the type in words, for an error message."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.is_list:
            return f"a list such as [{', '.join(map(str, self.default)) or self.field.metadata['example']}]"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
        types = get_args(self.annotation) or (self.annotation,)
        return " or ".join(words[type_] for type_ in types)
