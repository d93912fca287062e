"""Names in a network: what find_module and is_under accept, and the error for an unknown name."""

from typing import Any

import pytest
import torch
from torch import nn

from trainer.errors import ConfigError
from trainer.models.inspect import eval_copy, find_module, is_under


def test_find_module_finds_every_module_and_weight() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    for name, target in [*list(network.named_modules())[1:], *network.named_parameters()]:
        assert find_module(network, name, "a setting") is target


def test_find_module_error_for_unknown_name_lists_its_siblings() -> None:
    with pytest.raises(ConfigError) as raised:
        find_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0.wieght", "model.freeze=[0.wieght]")
    problem = "the network has no '0.wieght'; did you mean '0.weight'? choose from 0.bias, 0.weight"
    assert str(raised.value) == f"model.freeze=[0.wieght]: {problem}"


def test_is_under_compares_whole_parts_of_a_name() -> None:
    assert is_under("1.weight", "1") and is_under("1.weight", "1.weight")
    assert not is_under("10.weight", "1") and not is_under("1.weight_scale", "1.weight")


def test_eval_copy_shares_weights_but_not_mode_or_gradients() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    copy: Any = eval_copy(module)
    with torch.no_grad():
        module.get_parameter("0.weight").fill_(7)
        module.get_buffer("1.running_mean").fill_(3)
    assert bool((copy[0].weight == 7).all()) and bool((copy[1].running_mean == 3).all())
    assert not copy.training and module.training and not copy[0].weight.requires_grad
