"""A message in, short lines of text out, and back: SLURM cuts and mixes lines of several nodes beyond a kilobyte."""

import json
from dataclasses import dataclass
from typing import Any

_MARK = "samecurve-doctor"  # whatever else a site's scripts print into the same pipe is no message
_CHUNK = 700


@dataclass(frozen=True, slots=True)
class Message:
    node: int
    """place of the node that speaks, from 0; -1: the one that asks"""
    kind: str
    value: Any


def pack(message: Message) -> str:
    """Lines of at most a kilobyte, each with its newline."""
    text = json.dumps(message.value)
    chunks = [text[at : at + _CHUNK] for at in range(0, len(text), _CHUNK)]
    head = f"{_MARK} {message.node} {message.kind}"
    return "".join(f"{head} {place} {len(chunks)} {chunk}\n" for place, chunk in enumerate(chunks))


class Unpacker:
    """Is fed lines; gives a message when its last line is there."""

    def __init__(self) -> None:
        self._components: dict[tuple[int, str], list[str]] = {}

    def feed(self, line: str) -> Message | None:
        """Lines of several nodes may be mixed; those of one node come in order."""
        words = line.rstrip("\n").split(" ", 5)
        if words[0] != _MARK or len(words) != 6:
            return None
        node, kind = int(words[1]), words[2]
        place, count = int(words[3]), int(words[4])
        parts = self._components.setdefault((node, kind), [])
        if place == 0:
            parts.clear()  # the one before was cut off
        elif place != len(parts):
            return None
        parts.append(words[5])
        if len(parts) < count:
            return None
        return Message(node, kind, json.loads("".join(self._components.pop((node, kind)))))
