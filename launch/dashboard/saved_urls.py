"""Stores the URLs of saved workspaces and reports in dashboards.json, so that the next call replaces them."""

import json
from pathlib import Path
from typing import Any

from trainer.errors import FolderError
from trainer.run.files import replace_file
from trainer.run.reading.content import OBJECT, Shape, parse_json

_SHAPE: Shape = {"": {"": {"": OBJECT}}}


class SavedUrls:
    """A JSON file with these levels: server/entity/project, title, kind, and then {"url": URL}."""

    def __init__(self, path: Path, server: str) -> None:
        """server: URL of the W&B server with the entity."""
        self._path, self._server = path, server

    def get(self, project: str, title: str, kind: str) -> str:
        """Returns the URL of a saved view; empty if there is none. Raises FolderError if the file is damaged.

        Files of older versions hold W&B's internal ids instead of URLs. Such an entry counts as none.
        """
        saved = self._read().get(f"{self._server}/{project}", {}).get(title, {}).get(kind, {})
        return str(saved.get("url", ""))

    def set(self, project: str, title: str, kind: str, url: str) -> None:
        """Stores the URL of a saved view. Raises FolderError if the file cannot be written."""
        content = self._read()
        content.setdefault(f"{self._server}/{project}", {}).setdefault(title, {})[kind] = {"url": url}
        try:
            replace_file(self._path, lambda path: path.write_text(json.dumps(content, indent=1) + "\n"))
        except OSError as error:
            raise FolderError(
                f"{self._path} cannot be written ({error.strerror}); make it writable, or the next call creates "
                f"a second {kind}"
            ) from None

    def _read(self) -> dict[str, Any]:
        try:
            content = parse_json(self._path.read_text(), _SHAPE)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise FolderError(
                f"{self._path} is not a file of samecurve dashboard ({error}); repair or remove it"
            ) from None
        return content
