"""The optimizers are the named ones, with learning rates by kind of weight; Muon's steps are orthogonal."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.processes import REPOSITORY, SMALL, Done
from torch import nn

from trainer.config.schema import ModelSettings, OptimSettings
from trainer.errors import ConfigError
from trainer.models.lookup import build_model
from trainer.optim.muon import orthogonalize
from trainer.optim.optimizers import adamw as adamw_optimizer
from trainer.optim.optimizers import build_optimizer, restore_state, set_learning_rates
from trainer.optim.optimizers import sgd as sgd_optimizer


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def test_optimizers_are_built_as_set() -> None:
    settings = OptimSettings(lr=0.5, momentum=0.8, nesterov=True, weight_decay=0.1, betas=[0.7, 0.9])
    sgd = sgd_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], settings, "fp32").param_groups[0]
    assert (sgd["lr"], sgd["momentum"], sgd["nesterov"], sgd["weight_decay"]) == (0.5, 0.8, True, 0.1)
    adamw = adamw_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], settings, "fp32").param_groups[0]
    assert (adamw["lr"], adamw["betas"], adamw["weight_decay"]) == (0.5, (0.7, 0.9), 0.1)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_matrices_head_and_vectors_have_their_own_rates(name: str) -> None:
    net = small()
    settings = OptimSettings(name=name, lr=0.5, lr_vectors=2.0, lr_head=0.25)  # type: ignore[arg-type]
    made = build_optimizer(net, settings)
    set_learning_rates(made, settings, 0.1)
    rates = {id(weight): group["lr"] for group in made.param_groups for weight in group["params"]}
    expected = {"0.weight": 0.05, "2.weight": 0.05, "4.weight": 0.025}
    for key, weight in net.named_parameters():
        assert rates[id(weight)] == pytest.approx(expected.get(key, 0.2)), key


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_the_longest_name_that_fits_gives_a_part_its_rate(name: str) -> None:
    net = nn.Sequential(small(), nn.Linear(2, 2), nn.Linear(2, 2))
    net[0][0].requires_grad_(False)  # type: ignore[index]
    settings = OptimSettings(name=name, lr=0.5, lr_parts=["0=0.2", "0.4.bias=0.3", "1=0.4"])  # type: ignore[arg-type]
    made = build_optimizer(net, settings)
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight) if weight.requires_grad else None
    set_learning_rates(made, settings, 0.1)
    rates = {id(weight): group["lr"] for group in made.param_groups for weight in group["params"]}
    wanted = {"0.2": 0.02, "0.4": 0.02, "1": 0.04, "2": 0.05}  # 0.0 is not trained
    expected = {f"{layer}.{own}": rate for layer, rate in wanted.items() for own in ("weight", "bias")}
    expected["0.4.bias"] = 0.03
    found = {key: rates[id(weight)] for key, weight in net.named_parameters() if id(weight) in rates}
    assert found == pytest.approx(expected)
    made.step()
    again = build_optimizer(net, settings)
    restore_state(again, copy.deepcopy(made.state_dict()))
    assert [group.get("part") for group in again.param_groups] == [group.get("part") for group in made.param_groups]


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("4.wight", "did you mean '4.weight'"),
        ("5", "has no '5'; choose from 0, 1, 2, 3, 4"),
        ("3", "no weight that is"),
    ],
)
def test_a_part_that_has_no_weights_is_told(part: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        build_optimizer(small(), OptimSettings(lr_parts=[f"{part}=0.1"]))


def test_without_rates_of_their_own_all_weights_are_one_group() -> None:
    made = build_optimizer(small(), OptimSettings())
    set_learning_rates(made, OptimSettings(lr=0.3), 0.5)
    assert [(len(group["params"]), group["lr"]) for group in made.param_groups] == [(6, 0.15)]


def test_what_is_not_trained_is_left_out() -> None:
    net = build_model(ModelSettings(name="speedrun", widths=[4]), 3, 3, 32)
    trained = [
        weight for group in build_optimizer(net, OptimSettings(name="muon")).param_groups for weight in group["params"]
    ]
    assert sum(map(torch.numel, trained)) == 4 * 24 * 9 + 4 * 4 * 9 + 2 * 4 + 3 * 4


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonal_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, rank))[0] for side in shape)
    matrix = left @ torch.diag(torch.linspace(0.3, 1.0, rank)) @ right.T
    values = torch.linalg.svdvals(orthogonalize(7 * matrix))
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3
    rotated = left.T @ orthogonalize(matrix) @ right  # nothing but the singular values has changed
    assert float((rotated - rotated.diag().diag()).abs().max()) < 1e-4


def test_muon_moves_matrices_by_orthogonal_steps_and_the_rest_by_sgd() -> None:
    net = small()
    settings = OptimSettings(name="muon", lr=0.1, lr_vectors=0.2, lr_head=0.3, momentum=0.85, weight_decay=0.01)
    made = build_optimizer(net, settings)
    before = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    set_learning_rates(made, settings, 0.5)
    gradients = {}
    for key, weight in net.named_parameters():
        weight.grad = gradients[key] = torch.randn_like(weight)
    made.step()
    for key in ("0.weight", "2.weight"):
        old = before[key] * (len(before[key]) ** 0.5 / before[key].norm())
        move = (old - net.get_parameter(key)).detach().flatten(1) / 0.05
        torch.testing.assert_close(move, orthogonalize(gradients[key].flatten(1)), rtol=1e-3, atol=1e-4)
    for key, rate in (("4.weight", 0.15), ("4.bias", 0.1), ("0.bias", 0.1)):
        torch.testing.assert_close(
            net.get_parameter(key).detach(), (before[key] - rate * 1.85 * gradients[key]) * (1 - 0.01 * 0.5)
        )


def test_muon_makes_matrices_orthogonal_in_the_precision_of_the_training() -> None:
    moves = {}
    for precision in ("fp32", "fp16", "bf16"):
        net = small()
        before = net[0].weight.detach().clone()
        made = build_optimizer(net, OptimSettings(name="muon", lr=0.1), precision)
        for weight in net.parameters():
            weight.grad = torch.ones_like(weight).cumsum(0)
        made.step()
        moves[precision] = net[0].weight.detach() - before * (len(before) ** 0.5 / before.norm())
    assert torch.equal(moves["fp16"], moves["fp32"]) and not torch.equal(moves["bf16"], moves["fp32"])
    torch.testing.assert_close(moves["bf16"], moves["fp32"], rtol=0.03, atol=1e-3)


def test_training_alone_imports_no_compiler(launch: Callable[..., Done], tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom trainer import main\n"
    settings = [*SMALL, "train.max_steps=2", "train.clip_grad_norm=1", "run.root=runs"]
    program += f"code = main.main({settings!r})\n"
    program += "sys.exit('torch._dynamo' in sys.modules or 'sympy' in sys.modules or code)"
    (tmp_path / "program.py").write_text(program)
    done = launch([sys.executable, str(tmp_path / "program.py")])
    assert done.code == 0, done.err


def test_muon_leaves_tokens_and_scales_to_sgd_and_survives_weights_of_zero() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.full((6, 1, 1), 1e-6))
            self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            nn.init.zeros_(self.middle.weight)

    net = Net()
    made = build_optimizer(net, OptimSettings(name="muon"))
    kinds = {group["kind"]: [tuple(weight.shape) for weight in group["params"]] for group in made.param_groups}
    assert kinds == {"matrices": [(6, 6)], "head": [(2, 6)], "vectors": [(1, 1, 6), (6, 1, 1), (6,), (2,)]}
    for weight in net.parameters():
        weight.grad = torch.ones_like(weight)
    made.step()
    assert all(torch.isfinite(weight).all() for weight in net.parameters())


def test_a_rate_for_a_head_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr_head=0\.1: the network has no linear layer"):
        build_optimizer(nn.Sequential(nn.Conv2d(3, 2, 1)), OptimSettings(lr_head=0.1))


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_an_optimizer_goes_on_from_a_checkpoint_whose_tensors_are_laid_out_otherwise(name: str) -> None:
    settings = OptimSettings(name=name, lr=1e-3, momentum=0.9)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 3, 3)

    def steps(net: nn.Module, made: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            net(images).square().sum().backward()
            made.step()
            made.zero_grad()

    whole = small().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = build_optimizer(whole, settings)
    steps(whole, made, 2)
    again = small().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    again.load_state_dict({key: value.contiguous() for key, value in whole.state_dict().items()})
    made_again, state = build_optimizer(again, settings), copy.deepcopy(made.state_dict())
    for entry in state["state"].values():
        entry |= {key: value.clone(memory_format=torch.contiguous_format) for key, value in entry.items()}
    restore_state(made_again, state)
    steps(whole, made, 2)
    steps(again, made_again, 2)
    assert all(torch.equal(*pair) for pair in zip(whole.parameters(), again.parameters(), strict=True))
