"""Defines the errors that end a run with one line instead of a traceback. UserError: exit code 2. PeerError: 1."""

import difflib
from collections.abc import Iterable

from trainer.text.escape import escape, shorten

_MAX_LENGTH = 2000
# What people write for a choice that difflib would not find.
_SYNONYMS = {
    "gpu": "cuda", "nvidia": "cuda", "none": "off", "false": "off", "no": "off", "disabled": "off", "true": "auto",
    "float32": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "adam": "adamw",
}  # fmt: skip


class _OneLineError(Exception):
    def __str__(self) -> str:
        """Returns one line without control characters, whatever names and file contents the message quotes."""
        return shorten(escape(super().__str__()), _MAX_LENGTH)


class UserError(_OneLineError):
    """An error that only the user can fix. Its text is one line: what was expected, what was found, how to fix it."""


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, or contradicts another setting."""


class DataError(UserError):
    """The data set is missing, corrupt or too small."""


class WorldError(UserError):
    """The number of processes or the devices do not match the settings."""


class FolderError(UserError):
    """The run folder cannot be read, written or used for this run."""


class ExportError(UserError):
    """The network cannot be exported in the requested format."""


class DashboardError(UserError):
    """The W&B server cannot be used, or there are no runs to show."""


class TrainingError(UserError):
    """Training with these settings fails: losses or gradients are not finite, or gradients are missing."""


class PeerError(_OneLineError):
    """Another rank, or a data worker of this one, has ended or cannot be reached.

    Neither the user nor this process is at fault, so a launcher may restart the ranks.
    """


def suggest_choice(value: object, choices: Iterable[str]) -> str:
    """Returns the advice for an invalid choice: the most similar choice, if there is one, and the list of choices."""
    names = sorted(choices)
    text = str(value).lower()
    synonym = _SYNONYMS.get(text)
    similar = [synonym] if synonym in names else difflib.get_close_matches(text, names, n=1)
    hint = f"did you mean '{similar[0]}'? " if similar else ""
    return f"{hint}choose from {', '.join(names)}"
