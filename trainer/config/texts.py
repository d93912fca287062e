"""Checks the texts of the settings: characters, length, paths, secrets and the name of the run. Imports no torch."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from trainer.text.escape import shorten

_MAX_CHARACTERS = 4096
_MAX_ITEMS = 1000
_MAX_NAME_BYTES, _MAX_PART_BYTES = 1000, 255
_PATHS = ("run.root", "run.resume", "data.root", "data.cache_dir", "model.pretrained")
_LONG_TEXTS = {"log.notes"}

OWN_NAMES = {
    "checkpoints", "tensorboard", "wandb", "figures", "logs", "profile", "export", "config.yaml",
    "environment.json", "status.json", "starts.jsonl", "metrics.jsonl", "summary.json", "model.safetensors",
    "report.html", "evaluation.json", "examples.safetensors", "bad_steps.jsonl", "hang-report.txt", "job.json",
    "stop", "sweep.json", "results.json", "data", "data.json",
}  # fmt: skip
"""Files and folders in a run's folder or beside runs. docs/run_folder.md describes them."""

_SECRET_WORDS = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|JWT|(^|_)(PASS|PAT|AUTH)(_|$)", re.IGNORECASE)
_URL_WITH_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
_MIN_SECRET_CHARACTERS = 16  # a shorter content may well occur in a text by chance


def text_problems(name: str, value: object) -> Iterator[str]:
    """Yields what a text setting, or a list, should have been: "at most 4,096 characters". name: such as log.notes."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if len(texts) > _MAX_ITEMS:
        yield f"at most {_MAX_ITEMS:,} items"
    allowed = "\n\t" if name in _LONG_TEXTS else ""
    for text in texts[:_MAX_ITEMS]:
        if not isinstance(text, str):
            continue
        if len(text) > _MAX_CHARACTERS:
            yield f"at most {_MAX_CHARACTERS:,} characters"
        elif any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in text if letter not in allowed):
            yield "text in UTF-8 without control characters"


def path_problems(settings: Mapping[str, object]) -> Iterator[str]:
    """Yields a message for each path with `~user` of a user whose home folder is unknown. settings: by full name."""
    for name in _PATHS:
        try:
            Path(str(settings[name])).expanduser()
        except RuntimeError:
            yield f"{name}={settings[name]}: the home folder of that user is unknown; write the whole path"


def run_name_problems(name: str) -> Iterator[str]:
    """Yields what is wrong with run.name, as a message.

    A run whose name contains a name of OWN_NAMES, or that begins with a dot, would be a part of another run or hidden
    from `samecurve status`.
    """
    path, shown = PurePath(name), f"run.name={shorten(name, 80)}"
    if path.is_absolute() or ".." in path.parts or not path.parts:
        yield f"{shown}: expected the name of a folder under run.root; set its location by run.root"
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        yield f"{shown}: expected at most {_MAX_NAME_BYTES:,} bytes in all; choose a shorter name"
    for part in path.parts:
        if len(os.fsencode(part)) > _MAX_PART_BYTES:
            yield f"{shown}: expected at most {_MAX_PART_BYTES} bytes in each part; choose a shorter name"
        if part.lower() in OWN_NAMES:
            yield f"{shown}: '{part}' is the name of a file or folder of a run itself; choose another name"
        if (part.startswith(".") and part != "..") or part != part.strip():
            yield f"{shown}: expected parts without a dot at the start or spaces at the ends; choose another name"


def is_secret_variable(name: str) -> bool:
    """Returns whether an environment variable holds a secret, as its name or content suggests."""
    return bool(_SECRET_WORDS.search(name) or _URL_WITH_PASSWORD.search(os.environ.get(name, "")))


def secret_problems(settings: Mapping[str, object]) -> Iterator[str]:
    """Yields a message for each text that contains the content of an environment variable with a secret.

    The settings are written to config.yaml, report.html, the checkpoints and W&B. A short content, or one that is a
    path, is taken for no secret. settings: by full name.
    """
    secrets = {
        content: variable
        for variable, content in os.environ.items()
        if is_secret_variable(variable)
        and len(content) >= _MIN_SECRET_CHARACTERS
        and not content.startswith(("/", "~"))
    }
    for name, value in settings.items():
        for content, variable in secrets.items():
            if content in str(value):
                yield (
                    f"{name} contains the content of the environment variable {variable}, which looks like a secret; "
                    "leave it out, because the settings are written to config.yaml and report.html"
                )
