"""Packs messages into short lines of text and back: SLURM cuts and mixes lines of several nodes beyond a kilobyte."""

import json
from dataclasses import dataclass
from typing import Any

_MARK = "samecurve-doctor"  # other lines in the same pipe, such as output of a site's scripts, are no messages
_CHUNK_LENGTH = 700
COORDINATOR = -1


@dataclass(frozen=True, slots=True)
class Message:
    """A request of the coordinator to a node, or a node's reply."""

    node: int
    """number of the node that sends it, from 0; COORDINATOR: a request to all nodes"""
    kind: str
    value: Any
    """anything that JSON can represent"""


def pack(message: Message) -> str:
    """Returns the message as lines of at most a kilobyte, each with its newline."""
    text = json.dumps(message.value)
    chunks = [text[start : start + _CHUNK_LENGTH] for start in range(0, len(text), _CHUNK_LENGTH)]
    head = f"{_MARK} {message.node} {message.kind}"
    return "".join(f"{head} {index} {len(chunks)} {chunk}\n" for index, chunk in enumerate(chunks))


class Unpacker:
    """Assembles messages from lines. Lines of several nodes may be mixed; the lines of one node arrive in order."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[int, str], list[str]] = {}

    def feed(self, line: str) -> Message | None:
        """Takes one line; returns the message when the line completes one, else None."""
        words = line.rstrip("\n").split(" ", 5)
        if words[0] != _MARK or len(words) != 6:
            return None
        node, kind = int(words[1]), words[2]
        index, count = int(words[3]), int(words[4])
        chunks = self._chunks.setdefault((node, kind), [])
        if index == 0:
            chunks.clear()  # the message before this one was cut off
        elif index != len(chunks):
            return None
        chunks.append(words[5])
        if len(chunks) < count:
            return None
        return Message(node, kind, json.loads("".join(self._chunks.pop((node, kind)))))
