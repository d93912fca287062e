"""What a person must change: one line, printed by rank 0, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something only the user can put right. Its text is one line: what we got, what we wanted, what to do."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, or does not fit another."""


class DataError(UserError):
    """The data set is missing, broken or too small."""


class WorldError(UserError):
    """The processes or devices at hand are not the ones that were asked for."""


class FolderError(UserError):
    """The run folder cannot be used."""


class ExportError(UserError):
    """A run's network cannot be written in the format that was asked for."""


class DashboardError(UserError):
    """W&B's server cannot be used, or has nothing to show."""


class TrainingError(UserError):
    """The recipe does not train: its losses or gradients are not finite, or not there."""


class PeerError(Exception):
    """Another rank is gone or cannot be reached. Nobody's mistake and no defect of ours: one line, exit code 1, and a
    launcher may go on."""


def suggest_choice(value: object, choices: Iterable[str]) -> str:
    """The second half of an error about a choice: the nearest one if there is any, then all of them."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choose from {', '.join(names)}"
