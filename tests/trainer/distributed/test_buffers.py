"""Buffers: BatchNorm statistics as one vector that is saved, restored, and changed by the mean of the shards."""

import torch
from torch import nn

from trainer.distributed.buffers import Buffers


def build_network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    net.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
    return net


def test_forward_pass_updates_the_flat_vectors() -> None:
    net = build_network()
    buffers = Buffers(net)
    net(torch.randn(5, 3, 8, 8))
    running_mean = net[1].running_mean  # type: ignore[index]
    offset = 2  # the constant comes first
    assert torch.equal(buffers.floats[offset : offset + 4], running_mean) and (running_mean != 0).all()
    assert buffers.counters.tolist() == [1, 1] and int(net.state_dict()["1.num_batches_tracked"]) == 1


def test_buffers_of_frozen_modules_are_not_included() -> None:
    net = build_network()
    net[1].eval()  # type: ignore[index]
    buffers = Buffers(net)
    assert buffers.floats.numel() == 2 + 8 and buffers.counters.numel() == 1
    net[1].running_mean.fill_(-0.0)  # type: ignore[index]
    assert (buffers.floats[2:6] == 0).all() and not buffers.floats[2:6].signbit().any()


def test_restore_after_a_nan_batch_returns_to_the_saved_values() -> None:
    net = build_network()
    buffers = Buffers(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    buffers.save()
    net(torch.full((5, 3, 8, 8), torch.nan))
    assert not torch.isfinite(buffers.floats).all()
    buffers.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_restore_with_condition_0_changes_nothing() -> None:
    net = build_network()
    buffers = Buffers(net)
    buffers.save()
    before = buffers.floats.clone()
    net(torch.randn(5, 3, 8, 8))
    after = buffers.floats.clone()
    buffers.restore(condition=torch.tensor(0.0))
    assert torch.equal(buffers.floats, after) and not torch.equal(before, after)
    buffers.restore(condition=torch.tensor(1.0))
    assert torch.equal(buffers.floats, before)


def test_mean_change_gives_the_mean_of_the_shards_statistics() -> None:
    net = build_network()
    buffers = Buffers(net)
    shards = torch.randn(3, 5, 3, 8, 8)
    buffers.save()
    change_sum = torch.zeros_like(buffers.floats)
    running_means = []
    for shard in shards:
        buffers.restore()
        net(shard)
        running_means.append(net[1].running_mean.clone())  # type: ignore[index]
        changes = torch.empty_like(change_sum)
        buffers.write_changes(out=changes)
        change_sum += changes
    buffers.apply_mean_change(change_sum, 3)
    torch.testing.assert_close(net[1].running_mean, torch.stack(running_means).mean(0))  # type: ignore[index]


def test_mean_change_keeps_the_bits_of_a_constant_buffer() -> None:
    net = build_network()
    buffers = Buffers(net)
    for _ in range(10):
        buffers.save()
        changes = torch.empty_like(buffers.floats)
        buffers.write_changes(out=changes)
        buffers.apply_mean_change(changes * 3, 3)
    assert net.state_dict()["constant"].tolist() == torch.tensor([0.1, 1 / 3]).tolist()
