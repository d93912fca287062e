"""OrderedReduction in one process. test_virtual_ranks.py compares world sizes."""

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
        out: Tensor = self.norm(self.frozen(self.used(self.image(x.view(-1, 2, 1, 3)).flatten(1))))
        return out


BuildReduction = Callable[[Network, Buffers], OrderedReduction]


@pytest.fixture(params=[1 << 21, 8], ids=["one_bucket", "several_buckets"])
def build_reduction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> BuildReduction:
    monkeypatch.setattr(buckets, "_BUCKET_ELEMENTS", request.param)

    def build(net: Network, buffers: Buffers) -> OrderedReduction:
        exchange = GradientExchange(0, 1, torch.device("cpu"), Timer())
        return OrderedReduction(net.parameters(), buffers, exchange)

    return build


def run_step(reduction: OrderedReduction, net: Network, buffers: Buffers, shards: list[Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of the sum over the shards."""
    buffers.save()
    reduction.begin(len(shards))
    for position, shard in enumerate(shards):
        reduction.begin_shard(position, is_last=position == len(shards) - 1)
        loss = net(shard).square().sum()
        reduction.end_forward()
        loss.backward()
        reduction.end_shard()
    reduction.finish()
    for parameter in net.parameters():  # a fused optimizer reads gradient and parameter in memory order
        assert parameter.grad is None or parameter.grad.stride() == parameter.stride()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return gradients


def test_gradient_is_the_sum_of_the_shards_along_the_tree(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    shards = list(torch.randn(3, 5, 6))
    shard_gradients = []
    for shard in shards:
        net.zero_grad()
        net(shard).square().sum().backward()
        shard_gradients.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    net.zero_grad()
    gradients = run_step(build_reduction(net, buffers), net, buffers, shards)
    first, second, third = shard_gradients
    for name in first:
        assert torch.equal(gradients[name], (first[name] + second[name]) + third[name])
    assert not {"unused.weight", "frozen.weight"} & set(gradients)


def test_buffers_change_by_the_mean_of_the_shards(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    shards = list(torch.randn(3, 5, 6))
    buffers.save()
    shard_means = []
    for shard in shards:
        buffers.restore()
        net(shard)
        shard_means.append(net.norm.running_mean.clone())  # type: ignore[union-attr]
    buffers.restore()
    run_step(build_reduction(net, buffers), net, buffers, shards)
    torch.testing.assert_close(net.norm.running_mean, torch.stack(shard_means).mean(0))


def test_gradient_is_none_only_if_no_shard_has_one(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = build_reduction(net, buffers)
    for shards_with_gradient in ((True, False, True), (False, False), (False, True)):
        num_shards = len(shards_with_gradient)
        shards = [torch.full((2, 6), position + 1.0) for position in range(num_shards)]
        buffers.save()
        reduction.begin(num_shards)
        for position, has_gradient in enumerate(shards_with_gradient):
            reduction.begin_shard(position, is_last=position == num_shards - 1)
            loss = net(shards[position]).sum() + (net.unused(shards[position]).sum() if has_gradient else 0)
            reduction.end_forward()
            loss.backward()
            reduction.end_shard()
        reduction.finish()
        expected = sum(2.0 * (position + 1) for position in range(num_shards) if shards_with_gradient[position])
        gradient = net.unused.weight.grad
        if any(shards_with_gradient):
            assert gradient is not None and bool((gradient == expected).all())
        else:
            assert gradient is None
        assert net.used.weight.grad is not None
        net.zero_grad()


def test_gradient_is_complete_after_a_step_without_one(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = build_reduction(net, buffers)
    layers_of_shards = [(set(), set()), ({"used"}, {"unused"})]  # no shard of the second step has all gradients
    for layers_of_shard in layers_of_shards:
        buffers.save()
        reduction.begin(2)
        for position, layers in enumerate(layers_of_shard):
            reduction.begin_shard(position, is_last=position == 1)
            x = net.image(torch.ones(3, 2, 1, 3)).flatten(1)
            loss = x.sum() + sum(net.get_submodule(layer)(x.detach()).sum() for layer in layers)
            reduction.end_forward()
            loss.backward()
            reduction.end_shard()
        reduction.finish()
        has_gradient = [layer.weight.grad is not None for layer in (net.used, net.unused)]
        assert has_gradient == [any(layers_of_shard)] * 2
        net.zero_grad()


def test_step_does_not_depend_on_earlier_steps(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = build_reduction(net, buffers)
    shards = list(torch.randn(5, 4, 6))
    first = run_step(reduction, net, buffers, shards)
    run_step(reduction, net, buffers, shards[:2])
    repeated = run_step(reduction, net, buffers, shards)
    assert all(torch.equal(first[name], repeated[name]) for name in first)


def test_memory_grows_with_the_logarithm_of_the_number_of_shards(build_reduction: BuildReduction) -> None:
    net = Network()
    buffers = Buffers(net)
    reduction = build_reduction(net, buffers)
    run_step(reduction, net, buffers, list(torch.randn(64, 4, 6)))
    reduction.begin(1)
    assert max(len(bucket.free_vectors) for bucket in reduction._buckets) <= 8  # log2 of 64, and two
    assert max(len(bucket._views) for bucket in reduction._buckets) <= 8
