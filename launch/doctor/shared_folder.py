"""Checks that all nodes share the run folder: each node copies a token file in run.root, and the first node looks."""

import contextlib
import fcntl
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from launch.doctor.node.server import SHARED_SECONDS

_TOKEN_BYTES = 6
_POLL_SECONDS = 0.05


class SharedFolder:
    """A folder with a token file in run.root, created on construction. `problem` says why this failed, or is empty."""

    def __init__(self, root: Path) -> None:
        self.token = secrets.token_hex(_TOKEN_BYTES)
        self.folder = root / f".doctor-{self.token}"
        self.problem = ""
        self._file: IO[str] | None = None
        self._created = [folder for folder in (self.folder, root, *root.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True)
            self._file = (self.folder / "token").open("w")
            self._file.write(self.token)
            self._file.flush()
        except OSError as error:
            self.problem = f"{root}: {error.strerror}"
            return
        with contextlib.suppress(OSError):  # facts.lock_problem() reports it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the other nodes must see it

    def answered_nodes(self, reach: Mapping[int, Any]) -> frozenset[int]:
        """Returns the nodes whose answer file is visible here.

        reach: replies to the `reach` request by node. A network file system may show the file of a node that reports
        no problem late, so this waits for it.
        """
        deadline = time.monotonic() + SHARED_SECONDS
        expected = {node for node, reply in reach.items() if not reply["shared_problem"]}
        answered: set[int] = set()
        while expected - answered:
            answered |= {node for node in expected if self._has_answer(node)}
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        return frozenset(answered)

    def _has_answer(self, node: int) -> bool:
        try:
            return (self.folder / f"answer-{node}").read_text() == self.token
        except OSError:
            return False

    def remove(self) -> None:
        """Removes the folder, and the parent folders that this check created."""
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in self._created[1:]:
            try:
                folder.rmdir()
            except OSError:  # another process has put a file there
                return
