"""GradientExchange: order of streams on a GPU (with fake streams), errors in the background thread, slices of sums."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from trainer.distributed import exchange, sharding
from trainer.distributed.buckets import Bucket
from trainer.distributed.exchange import GradientExchange
from trainer.timer import Timer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class RecordingTimer(Timer):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def begin(self) -> None:
        self.events.append("timer begins")

    def end(self) -> None:
        self.events.append("timer ends")


class FakeStream:
    def __init__(self, name: str, events: list[str]) -> None:
        self.name, self.events = name, events

    def wait_stream(self, stream: "FakeStream") -> None:
        self.events.append(f"{self.name} waits for {stream.name}")


@pytest.fixture
def stream_events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces CUDA streams and the messages between ranks; returns the list to which they add their events."""
    events: list[str] = []
    compute_stream = FakeStream("compute", events)

    @contextlib.contextmanager
    def enter_stream(stream: FakeStream) -> Iterator[None]:
        events.append(f"enter {stream.name}")
        yield
        events.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream("exchange", events))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: compute_stream)
    monkeypatch.setattr(torch.cuda, "stream", enter_stream)
    monkeypatch.setattr(exchange, "_send_and_receive", lambda sends, receives: events.append("send and receive"))
    return events


def filled_bucket(*values: float) -> Bucket:
    """Returns a bucket of a rank whose only shard is shard 0."""
    bucket = Bucket(torch.empty(0), len(values))
    bucket.stack.append(((0, 1), torch.tensor(values)))
    return bucket


def test_gpu_exchange_waits_for_the_gradients_and_the_update_waits_for_the_exchange(stream_events: list[str]) -> None:
    gradient_exchange = GradientExchange(0, 2, GPU, RecordingTimer(stream_events))
    send = ["exchange waits for compute", "enter exchange", "send and receive", "send and receive", "leave exchange"]
    gradient_exchange.send(filled_bucket(1.0, 2.0), num_shards=2)
    assert stream_events == send
    gradient_exchange.send(filled_bucket(3.0, 4.0), num_shards=2)
    gradient_exchange.wait()
    assert stream_events == [*send, *send, "timer begins", "compute waits for exchange", "timer ends"]


def test_single_gpu_uses_no_stream_and_no_timer(stream_events: list[str]) -> None:
    bucket = filled_bucket(1.0, 2.0)
    gradient_exchange = GradientExchange(0, 1, GPU, RecordingTimer(stream_events))
    gradient_exchange.send(bucket, num_shards=1)
    gradient_exchange.wait()
    assert stream_events == [] and bucket.total is not None and bucket.total.tolist() == [1.0, 2.0]


def test_cpu_exchange_runs_in_the_background_until_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    peers_are_ready = threading.Event()
    monkeypatch.setattr(exchange, "_send_and_receive", lambda sends, receives: peers_are_ready.wait(30))
    events: list[str] = []
    buckets = [filled_bucket(1.0, 2.0), filled_bucket(3.0, 4.0)]
    gradient_exchange = GradientExchange(0, 2, CPU, RecordingTimer(events))
    for bucket in buckets:
        gradient_exchange.send(bucket, num_shards=2)
    assert [bucket.total for bucket in buckets] == [None, None] and events == []
    peers_are_ready.set()
    gradient_exchange.wait()
    assert all(bucket.total is not None for bucket in buckets) and events == ["timer begins", "timer ends"]


def test_error_in_the_background_thread_is_raised_by_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sends: object, receives: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(exchange, "_send_and_receive", fail)
    gradient_exchange = GradientExchange(0, 2, CPU, Timer())
    gradient_exchange.send(filled_bucket(1.0, 2.0), num_shards=2)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        gradient_exchange.wait()


@pytest.mark.parametrize(("world_size", "num_shards"), [(2, 3), (3, 2), (3, 8)])
def test_all_ranks_get_the_sum_along_the_tree(
    monkeypatch: pytest.MonkeyPatch, world_size: int, num_shards: int
) -> None:
    """Ranks are threads, and messages are put into a table. The length divides by no world size."""
    shards = [tensor * 10.0**position for position, tensor in enumerate(torch.randn(num_shards, 7))]
    rank_of_thread = threading.local()
    messages: dict[tuple[int, int, int, int], Tensor] = {}
    rounds = [0] * world_size
    barrier = threading.Barrier(world_size, timeout=60)

    def send_and_receive(sends: list[tuple[Tensor, int, int]], receives: list[tuple[Tensor, int, int]]) -> None:
        rank = rank_of_thread.value
        rounds[rank] += 1
        for tensor, peer, tag in sends:
            messages[rounds[rank], rank, peer, tag] = tensor.clone()
        barrier.wait()
        for tensor, peer, tag in receives:
            tensor.copy_(messages.pop((rounds[rank], peer, rank, tag)))
        barrier.wait()

    monkeypatch.setattr(exchange, "_send_and_receive", send_and_receive)
    totals: dict[int, Tensor | None] = {}

    def run_rank(rank: int) -> None:
        rank_of_thread.value = rank
        bucket = Bucket(torch.empty(0), 7)
        first, end = sharding.split_evenly(num_shards, world_size)[rank]
        for shard in range(first, end):
            sharding.push_block(bucket.stack, (shard, shard + 1), shards[shard].clone(), num_shards, bucket.add)
        GradientExchange(rank, world_size, CPU, Timer())._exchange(bucket, num_shards)
        totals[rank] = bucket.total

    run_in_threads(run_rank, world_size)
    blocks = [((shard, shard + 1), tensor) for shard, tensor in enumerate(shards)]
    expected = sharding.tree_sum(blocks, num_shards, lambda left, right: left + right)
    assert not messages
    for rank in range(world_size):
        total = totals[rank]
        assert total is not None and torch.equal(total, expected)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
