"""Optimizers: settings, parameter groups and their learning rates, checkpoints, and skipped steps."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.processes import REPOSITORY, SMALL, CommandResult
from torch import nn

from trainer.config.schema import ModelSettings, OptimSettings
from trainer.errors import ConfigError
from trainer.models.lookup import build_model
from trainer.optim import compiler_import
from trainer.optim.optimizers import (
    adamw,
    build_optimizer,
    restore_state,
    set_learning_rates,
    sgd,
    supports_found_inf,
)

OPTIMIZERS = ["sgd", "adamw", "muon"]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def rates_by_id(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}


def test_settings_reach_torchs_optimizers() -> None:
    settings = OptimSettings(lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.1, betas=[0.7, 0.9])
    group = sgd([{"params": [nn.Parameter(torch.zeros(1))]}], settings, "fp32").param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, 0.8, True, 0.1)
    group = adamw([{"params": [nn.Parameter(torch.zeros(1))]}], settings, "fp32").param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.7, 0.9), 0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_head_and_vectors_have_their_own_rates(name: str) -> None:
    network = small_network()
    settings = OptimSettings(name=name, lr=0.5, lr_vectors=2.0, lr_head=0.25)
    optimizer = build_optimizer(network, settings)
    set_learning_rates(optimizer, settings, 0.1)
    rates = rates_by_id(optimizer)
    expected = {"0.weight": 0.05, "2.weight": 0.05, "4.weight": 0.025}
    for key, weight in network.named_parameters():
        assert rates[id(weight)] == pytest.approx(expected.get(key, 0.2)), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_longest_matching_name_in_lr_parts_gives_the_rate(name: str) -> None:
    network = nn.Sequential(small_network(), nn.Linear(2, 2), nn.Linear(2, 2))
    network[0][0].requires_grad_(False)  # type: ignore[index]
    settings = OptimSettings(name=name, lr=0.5, lr_parts=["0=0.2", "0.4.bias=0.3", "1=0.4"])
    optimizer = build_optimizer(network, settings)
    set_learning_rates(optimizer, settings, 0.1)
    rates = rates_by_id(optimizer)
    rate_by_layer = {"0.2": 0.02, "0.4": 0.02, "1": 0.04, "2": 0.05}  # layer 0.0 is frozen
    expected = {f"{layer}.{key}": rate for layer, rate in rate_by_layer.items() for key in ("weight", "bias")}
    expected["0.4.bias"] = 0.03
    rate_by_name = {key: rates[id(weight)] for key, weight in network.named_parameters() if id(weight) in rates}
    assert rate_by_name == pytest.approx(expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_optimizer_keeps_the_parts_of_its_groups(name: str) -> None:
    network = small_network()
    settings = OptimSettings(name=name, lr_parts=["0=0.2", "2.bias=0.3"])
    optimizer = build_optimizer(network, settings)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    restored = build_optimizer(network, settings)
    restore_state(restored, copy.deepcopy(optimizer.state_dict()))
    parts = [group.get("part") for group in optimizer.param_groups]
    assert [group.get("part") for group in restored.param_groups] == parts
    assert {"0", "2.bias", None} == set(parts)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("4.wight", "did you mean '4.weight'"),
        ("5", "has no '5'; choose from 0, 1, 2, 3, 4"),
        ("3", "the rate of '3' applies to no trainable weight"),
    ],
)
def test_lr_parts_without_weights_is_refused(part: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(small_network(), OptimSettings(lr_parts=[f"{part}=0.1"]))


def test_lr_head_without_linear_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr_head=0\.1: the network has no trainable linear layer"):
        build_optimizer(nn.Sequential(nn.Conv2d(3, 2, 1)), OptimSettings(lr_head=0.1))


def test_one_learning_rate_gives_one_group() -> None:
    optimizer = build_optimizer(small_network(), OptimSettings())
    set_learning_rates(optimizer, OptimSettings(lr=0.3), 0.5)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(6, 0.15)]


def test_frozen_weights_are_in_no_group() -> None:
    network = build_model(ModelSettings(name="speedrun", widths=[4]), 3, 3, 32)
    groups = build_optimizer(network, OptimSettings(name="muon")).param_groups
    trained = [weight for group in groups for weight in group["params"]]
    assert sum(map(torch.numel, trained)) == 4 * 24 * 9 + 4 * 4 * 9 + 2 * 4 + 3 * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_step_with_found_inf_changes_neither_weights_nor_state(name: str, steps_before: int) -> None:
    network = small_network()
    optimizer = build_optimizer(network, OptimSettings(name=name, lr=0.1, weight_decay=0.01))
    assert supports_found_inf(optimizer)
    for _ in range(steps_before):
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    weights = [weight.detach().clone() for weight in network.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(map(torch.equal, weights, network.parameters()))
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            expected = state[index][key] if index in state else torch.zeros_like(value)
            assert torch.equal(value, expected), (index, key)


def test_optimizer_that_ignores_found_inf_is_recognized() -> None:
    assert not supports_found_inf(torch.optim.RMSprop(small_network().parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_from_checkpoint_with_another_memory_layout_is_exact(name: str) -> None:
    settings = OptimSettings(name=name, lr=1e-3, momentum=0.9)
    images = torch.randn(2, 3, 3, 3)

    def train(network: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        for _ in range(num_steps):
            network(images).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    network = small_network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(network, settings)
    train(network, optimizer, 2)
    resumed = small_network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    resumed.load_state_dict({key: value.contiguous() for key, value in network.state_dict().items()})
    resumed_optimizer, state = build_optimizer(resumed, settings), copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry |= {key: value.clone(memory_format=torch.contiguous_format) for key, value in entry.items()}
    restore_state(resumed_optimizer, state)
    train(network, optimizer, 2)
    train(resumed, resumed_optimizer, 2)
    assert all(torch.equal(*pair) for pair in zip(network.parameters(), resumed.parameters(), strict=True))


class ForeignSGD(torch.optim.SGD):
    """An optimizer of another package, which may ignore found_inf."""


def test_foreign_optimizer_keeps_its_step_and_is_not_trusted_with_found_inf() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = ForeignSGD([weight], lr=0.1, fused=True)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))
    compiler_import.skip_for_step(optimizer)
    optimizer.step()
    assert calls == ["hook"] and not supports_found_inf(optimizer)
    assert supports_found_inf(torch.optim.SGD([weight], lr=0.1, fused=True))
    assert not supports_found_inf(torch.optim.SGD([weight], lr=0.1))


def test_training_imports_no_compiler(launch: Callable[..., CommandResult], tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom trainer import main\n"
    settings = [*SMALL, "train.max_steps=2", "train.clip_grad_norm=1", "run.root=runs"]
    program += f"code = main.main({settings!r})\n"
    program += "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules or code)"
    (tmp_path / "program.py").write_text(program)
    result = launch([sys.executable, str(tmp_path / "program.py")])
    assert result.code == 0, result.err
