"""Ranks agree on a word in a store full of what is no longer true."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.distributed.rendezvous import agree_on_attempt_id


class Store(dict[str, bytes]):
    """torch's store, as far as it is used; the real one is under every test that starts torchrun."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def meet(store: Store, delays: list[float]) -> list[str]:
    def rank(number: int) -> str:
        time.sleep(delays[number])
        return agree_on_attempt_id(store, number, len(delays), timeout_seconds=10)

    with ThreadPoolExecutor(len(delays)) as pool:
        return list(pool.map(rank, range(len(delays))))


@pytest.mark.parametrize("delays", [[0.0, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 0.1, 0.3]])
def test_all_have_one_word_and_a_new_one_each_time(delays: list[float]) -> None:
    store, seen = Store(), set()
    for _ in range(3):
        words = meet(store, delays)
        assert len(set(words)) == 1
        seen |= set(words)
    assert len(seen) == 3


def test_what_a_dead_attempt_left_is_not_believed() -> None:
    store = Store()
    (old,) = set(meet(store, [0.0, 0.0]))
    # The next attempt's rank 0 comes first and sees a hello, an acceptance and an agreement, all of the dead.
    assert json.loads(store["answer"])["word"] == old
    (new,) = set(meet(store, [0.0, 0.3]))
    assert new != old


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(TimeoutError, match="rank 1, 2 did not come"):
        agree_on_attempt_id(Store(), 0, 3, timeout_seconds=0.05)
    with pytest.raises(TimeoutError, match="rank 1 heard nothing from rank 0"):
        agree_on_attempt_id(Store(), 1, 3, timeout_seconds=0.05)
