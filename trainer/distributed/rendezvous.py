"""The ranks of one attempt find each other in a store that may still hold what those of earlier attempts left there.

torchrun keeps its store when it starts ranks again, and torch looks for its peers under the same keys each time: a rank
may find, and try to reach, the address of one that is gone (pytorch issue 135712). torchrun's count of restarts is no
way out: each machine counts its own. So the ranks agree on a word that only the living can know, and meet under it.
"""

import json
import secrets
import time
from typing import Protocol

_POLL_SECONDS = 0.01


class Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def agree_on_attempt_id(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """A word that all ranks of this attempt have, and no earlier one had. Raises TimeoutError when not all come.

    Each rank says hello with a token of its own. Rank 0 answers with all the tokens it sees and a new word; who finds
    its own token there accepts the word. A token of a rank that is gone is replaced as soon as its successor comes, and
    rank 0 answers anew; when all have accepted one answer, it says so.
    """
    until = time.monotonic() + timeout_seconds
    token = secrets.token_hex(8)
    store.set(f"hello/{rank}", token)
    if rank == 0:
        return _invite(store, world_size, until)
    accepted = ""
    while True:
        answer = json.loads(_read(store, "answer") or "{}")
        if answer and answer["tokens"][rank : rank + 1] == [token] and answer["word"] != accepted:
            accepted = answer["word"]
            store.set(f"accepted/{rank}", accepted)
        if accepted and _read(store, "agreed") == accepted:
            return accepted
        _wait(until, f"rank {rank} heard nothing from rank 0")


def _invite(store: Store, world_size: int, until: float) -> str:
    tokens: list[str] = []
    word = ""
    while True:
        seen = [_read(store, f"hello/{rank}") for rank in range(world_size)]
        if seen != tokens:
            tokens, word = seen, secrets.token_hex(8)
            store.set("answer", json.dumps({"tokens": tokens, "word": word}))
        missing = [rank for rank in range(1, world_size) if _read(store, f"accepted/{rank}") != word]
        if not missing:
            store.set("agreed", word)
            return word
        _wait(until, f"rank {', '.join(map(str, missing[:8]))} did not come")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(until: float, problem: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(problem)
    time.sleep(_POLL_SECONDS)
