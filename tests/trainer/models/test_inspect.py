"""A name finds what named_modules() and named_parameters() have under it, and nothing that only begins like it."""

import pytest
from torch import nn

from trainer.errors import ConfigError
from trainer.models.inspect import find_module, is_under


def test_every_name_of_a_network_is_found() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    for name, found in [*list(net.named_modules())[1:], *net.named_parameters()]:
        assert find_module(net, name, "a setting") is found


def test_a_name_that_is_not_there_is_told_with_those_beside_it() -> None:
    with pytest.raises(ConfigError) as caught:
        find_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0.wieght", "model.freeze=[0.wieght]")
    wanted = "the network has no '0.wieght'; did you mean '0.weight'? choose from 0.bias, 0.weight"
    assert str(caught.value) == f"model.freeze=[0.wieght]: {wanted}"


def test_what_only_begins_alike_is_not_under_a_name() -> None:
    assert is_under("1.weight", "1") and is_under("1.weight", "1.weight")
    assert not is_under("10.weight", "1") and not is_under("1.weight_scale", "1.weight")
