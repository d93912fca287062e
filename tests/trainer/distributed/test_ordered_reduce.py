"""The sum over shards in one process; that ranks change nothing is in test_virtual_ranks.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trainer.distributed import buckets
from trainer.distributed.buffers import Buffers
from trainer.distributed.exchange import GradientExchange
from trainer.distributed.ordered_reduce import OrderedReduction
from trainer.timer import Timer


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Conv2d(2, 6, (1, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.used, self.norm = nn.Linear(6, 4), nn.BatchNorm1d(4)
        self.unused, self.frozen = nn.Linear(6, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.frozen(self.used(self.image(x.view(-1, 2, 1, 3)).flatten(1))))
        return found


Alone = Callable[[Network, Buffers], OrderedReduction]


@pytest.fixture(params=[1 << 21, 8], ids=str)
def alone_with(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Alone:
    """In one bucket, or in several."""
    monkeypatch.setattr(buckets, "_BUCKET_ELEMENTS", request.param)

    def build(net: Network, buffers: Buffers) -> OrderedReduction:
        exchange = GradientExchange(0, 1, torch.device("cpu"), Timer())
        return OrderedReduction(net.parameters(), buffers, exchange)

    return build


def gradients(reduction: OrderedReduction, net: Network, buffers: Buffers, shards: list[Tensor]) -> dict[str, Tensor]:
    buffers.begin()
    reduction.begin(len(shards))
    for number, shard in enumerate(shards):
        reduction.begin_shard(number, is_last=number == len(shards) - 1)
        loss = net(shard).square().sum()
        reduction.forward_done()
        loss.backward()
        reduction.end_shard()
    reduction.finish()
    for parameter in net.parameters():  # a fused update goes through both as they lie in memory
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}
    net.zero_grad()
    return found


def test_it_is_the_sum_along_the_tree(alone_with: Alone) -> None:
    net = Network()
    buffers = Buffers(net)
    shards = list(torch.randn(3, 5, 6))
    alone = []
    for shard in shards:
        net.zero_grad()
        net(shard).square().sum().backward()
        alone.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    net.zero_grad()
    found = gradients(alone_with(net, buffers), net, buffers, shards)
    for name, first in alone[0].items():
        assert torch.equal(found[name], (first + alone[1][name]) + alone[2][name])
    assert not {"unused.weight", "frozen.weight"} & set(found)


def test_a_gradient_that_some_shards_have_is_their_sum_and_one_that_none_has_is_none(alone_with: Alone) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = alone_with(net, buffers)
    for wanted in ((True, False, True), (False, False), (False, True)):  # which shards lack nothing
        shards = [torch.full((2, 6), number + 1.0) for number in range(len(wanted))]
        buffers.begin()
        reduction.begin(len(shards))
        for number, has_all in enumerate(wanted):
            reduction.begin_shard(number, is_last=number == len(shards) - 1)
            loss = net(shards[number]).sum() + (net.unused(shards[number]).sum() if has_all else 0)
            reduction.forward_done()
            loss.backward()
            reduction.end_shard()
        reduction.finish()
        sums = [2.0 * (number + 1) * has_all for number, has_all in enumerate(wanted)]
        found = net.unused.weight.grad
        assert (found is None) == (not any(wanted)) and (found is None or bool((found == sum(sums)).all()))
        assert net.used.weight.grad is not None
        net.zero_grad()


def test_the_next_step_begins_anew(alone_with: Alone) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = alone_with(net, buffers)
    shards = list(torch.randn(5, 4, 6))
    first = gradients(reduction, net, buffers, shards)
    gradients(reduction, net, buffers, shards[:2])
    again = gradients(reduction, net, buffers, shards)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_memory_does_not_grow_with_the_shards(alone_with: Alone) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = alone_with(net, buffers)
    gradients(reduction, net, buffers, list(torch.randn(64, 4, 6)))
    reduction.begin(1)
    assert max(len(bucket.spare) for bucket in reduction._buckets) <= 8  # log2 of 64, and two
    assert max(len(bucket._views) for bucket in reduction._buckets) <= 8
