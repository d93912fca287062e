"""BatchNorm's statistics as one vector: kept, put back, moved by the mean of the shards' moves."""

import torch
from torch import nn

from trainer.distributed.buffers import Buffers


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    net.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
    return net


def test_the_networks_own_buffers_are_moved() -> None:
    net = network()
    buffers = Buffers(net)
    net(torch.randn(5, 3, 8, 8))
    first = net[1].running_mean  # type: ignore[index]
    place = 2  # after the constant
    assert torch.equal(buffers.floats[place : place + 4], first) and (first != 0).all()
    assert buffers.counters.tolist() == [1, 1] and int(net.state_dict()["1.num_batches_tracked"]) == 1


def test_what_is_frozen_keeps_its_own() -> None:
    net = network()
    net[1].eval()  # type: ignore[index]
    buffers = Buffers(net)
    assert buffers.floats.numel() == 2 + 8 and buffers.counters.numel() == 1
    net[1].running_mean.fill_(-0.0)  # type: ignore[index]
    assert (buffers.floats[2:6] == 0).all() and not buffers.floats[2:6].signbit().any()


def test_a_rewind_puts_all_back() -> None:
    net = network()
    buffers = Buffers(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    buffers.begin()
    net(torch.full((5, 3, 8, 8), torch.nan))
    assert not torch.isfinite(buffers.floats).all()
    buffers.rewind()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_the_mean_move_is_what_one_after_the_other_would_not_be() -> None:
    net = network()
    buffers = Buffers(net)
    shards = torch.randn(3, 5, 3, 8, 8)
    buffers.begin()
    total = torch.zeros_like(buffers.floats)
    means = []
    for shard in shards:
        buffers.rewind()
        net(shard)
        means.append(net[1].running_mean.clone())  # type: ignore[index]
        moves = torch.empty_like(total)
        buffers.moves(out=moves)
        total += moves
    buffers.move(total, 3)
    torch.testing.assert_close(net[1].running_mean, torch.stack(means).mean(0))  # type: ignore[index]


def test_a_constant_stays_what_it_is() -> None:
    net = network()
    buffers = Buffers(net)
    for _ in range(10):
        buffers.begin()
        moves = torch.empty_like(buffers.floats)
        buffers.moves(out=moves)
        buffers.move(moves * 3, 3)
    assert net.state_dict()["constant"].tolist() == torch.tensor([0.1, 1 / 3]).tolist()
