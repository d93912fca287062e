"""Rendezvous: ranks agree on an attempt id in a store with stale entries."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trainer.distributed.rendezvous import agree_on_attempt_id


class Store(dict[str, bytes]):
    """The methods of torch's store that the rendezvous uses. Every test that starts torchrun uses the real store."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def attempt_ids(store: Store, start_delays_seconds: list[float]) -> list[str]:
    """Returns the id that each rank of one attempt gets."""

    def run_rank(rank: int) -> str:
        time.sleep(start_delays_seconds[rank])
        return agree_on_attempt_id(store, rank, len(start_delays_seconds), timeout_seconds=10)

    with ThreadPoolExecutor(len(start_delays_seconds)) as pool:
        return list(pool.map(run_rank, range(len(start_delays_seconds))))


@pytest.mark.parametrize("delays", [[0.0, 0.0, 0.0], [0.2, 0.0, 0.1], [0.0, 0.1, 0.3]])
def test_all_ranks_of_an_attempt_get_one_id_and_each_attempt_a_new_one(delays: list[float]) -> None:
    store = Store()
    ids_of_attempts = [set(attempt_ids(store, delays)) for _ in range(3)]
    assert [len(ids) for ids in ids_of_attempts] == [1, 1, 1]
    assert len(set.union(*ids_of_attempts)) == 3


def test_stale_entries_of_an_earlier_attempt_are_ignored() -> None:
    store = Store()
    (old_id,) = set(attempt_ids(store, [0.0, 0.0]))
    # Rank 0 of the next attempt arrives first, and reads a token, an acceptance and an agreement of dead ranks.
    assert json.loads(store["proposal"])["attempt_id"] == store["agreed"].decode() == old_id
    (new_id,) = set(attempt_ids(store, [0.0, 0.3]))
    assert new_id != old_id


def test_missing_ranks_are_named_in_the_timeout_error() -> None:
    with pytest.raises(TimeoutError, match="rank 1, 2 did not come"):
        agree_on_attempt_id(Store(), 0, 3, timeout_seconds=0.05)
    with pytest.raises(TimeoutError, match="rank 1 got no answer from rank 0"):
        agree_on_attempt_id(Store(), 1, 3, timeout_seconds=0.05)
