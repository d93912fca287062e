"""Lets the ranks of one attempt find each other in a store that may hold stale entries of earlier attempts.

torchrun keeps its store when it restarts ranks, and torch uses the same keys in each attempt: a rank may read the
address of a dead process and try to reach it (pytorch issue 135712). torchrun's restart count does not tell attempts
apart, because each machine has a count of its own. So the ranks agree on an attempt id that no dead rank can know, and
form the process group under keys with that id.
"""

import json
import secrets
import time
from typing import Protocol

_POLL_SECONDS = 0.01


class Store(Protocol):
    """The methods of torch's store that the rendezvous uses."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def agree_on_attempt_id(store: Store, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Returns an id that all ranks of this attempt share and that no earlier attempt used.

    Each rank publishes a random token. Rank 0 proposes a new id together with the tokens that it has read. A rank that
    finds its own token in the proposal accepts the id. When a rank replaces a stale token of its predecessor, rank 0
    makes a new proposal. When all ranks have accepted one proposal, rank 0 publishes its id as agreed.

    Raises TimeoutError if not all ranks arrive in time.
    """
    deadline = time.monotonic() + timeout_seconds
    token = secrets.token_hex(8)
    store.set(f"token/{rank}", token)
    if rank == 0:
        return _propose(store, world_size, deadline)
    accepted_id = ""
    while True:
        proposal = json.loads(_read(store, "proposal") or "{}")
        has_own_token = bool(proposal) and proposal["tokens"][rank : rank + 1] == [token]
        if has_own_token and proposal["attempt_id"] != accepted_id:
            accepted_id = proposal["attempt_id"]
            store.set(f"accepted/{rank}", accepted_id)
        if accepted_id and _read(store, "agreed") == accepted_id:
            return accepted_id
        _sleep_until_next_poll(deadline, f"rank {rank} got no answer from rank 0")


def _propose(store: Store, world_size: int, deadline: float) -> str:
    """Proposes ids as rank 0 until all ranks accept one; returns it."""
    proposed_tokens: list[str] = []
    attempt_id = ""
    while True:
        tokens = [_read(store, f"token/{rank}") for rank in range(world_size)]
        if tokens != proposed_tokens:
            proposed_tokens, attempt_id = tokens, secrets.token_hex(8)
            store.set("proposal", json.dumps({"tokens": tokens, "attempt_id": attempt_id}))
        missing = [rank for rank in range(1, world_size) if _read(store, f"accepted/{rank}") != attempt_id]
        if not missing:
            store.set("agreed", attempt_id)
            return attempt_id
        _sleep_until_next_poll(deadline, f"rank {', '.join(map(str, missing[:8]))} did not come")


def _read(store: Store, key: str) -> str:
    """Returns the value of a key, or "" if the store has no such key."""
    return store.get(key).decode() if store.check([key]) else ""


def _sleep_until_next_poll(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(problem)
    time.sleep(_POLL_SECONDS)
