"""Compares the settings of an unfinished run with new ones. Imports no torch."""

from typing import Any

from trainer.config.load import flatten
from trainer.config.schema import RunConfig, settings_by_name
from trainer.text.escape import shorten

_SHOWN_CHARACTERS = 80
# An unfinished run may continue with other values of these: they do not affect the steps it has finished.
MAY_CHANGE = {name for name, info in settings_by_name().items() if info.may_change}


def changed_settings(before: dict[str, Any], config: RunConfig) -> str:
    """Describes the settings that changed but must not, with both values; empty if there are none.

    before: the values by full name, such as optim.lr.
    """
    return "; ".join(
        f"{name} was {shorten(str(before[name]), _SHOWN_CHARACTERS)}, now {shorten(str(value), _SHOWN_CHARACTERS)}"
        for name, value in flatten(config).items()
        if name not in MAY_CHANGE and name in before and before[name] != value
    )
