"""Muon: orthogonalized updates of matrices, SGD for other weights."""

import pytest
import torch
from torch import nn

from trainer.config.schema import OptimSettings
from trainer.optim.muon import orthogonalize
from trainer.optim.optimizers import build_optimizer, set_learning_rates


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix_rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(side, matrix_rank))[0] for side in shape)
    matrix = left @ torch.diag(torch.linspace(0.3, 1.0, matrix_rank)) @ right.T
    singular_values = torch.linalg.svdvals(orthogonalize(7 * matrix))
    assert float(singular_values.min()) > 0.6 and float(singular_values.max()) < 1.3
    in_singular_basis = left.T @ orthogonalize(matrix) @ right
    assert float((in_singular_basis - in_singular_basis.diag().diag()).abs().max()) < 1e-4


def test_muon_updates_matrices_by_orthogonal_steps_and_other_weights_by_sgd() -> None:
    network = small_network()
    settings = OptimSettings(name="muon", lr=0.1, lr_vectors=0.2, lr_head=0.3, momentum=0.85, weight_decay=0.01)
    optimizer = build_optimizer(network, settings)
    before = {key: weight.detach().clone() for key, weight in network.named_parameters()}
    set_learning_rates(optimizer, settings, 0.5)
    gradients = {}
    for key, weight in network.named_parameters():
        weight.grad = gradients[key] = torch.randn_like(weight)
    optimizer.step()
    for key in ("0.weight", "2.weight"):
        scaled = before[key] * (len(before[key]) ** 0.5 / before[key].norm())
        update = (scaled - network.get_parameter(key)).detach().flatten(1) / 0.05
        torch.testing.assert_close(update, orthogonalize(gradients[key].flatten(1)), rtol=1e-3, atol=1e-4)
    for key, rate in (("4.weight", 0.15), ("4.bias", 0.1), ("0.bias", 0.1)):
        expected = (before[key] - rate * 1.85 * gradients[key]) * (1 - 0.01 * 0.5)
        torch.testing.assert_close(network.get_parameter(key).detach(), expected)


def test_muon_momentum_accumulates_over_steps() -> None:
    network = small_network()
    settings = OptimSettings(name="muon", lr=0.1, momentum=0.8, muon_momentum=0.6)
    optimizer = build_optimizer(network, settings)
    for value in (1.0, 2.0):
        for weight in network.parameters():
            weight.grad = torch.full_like(weight, value)
        optimizer.step()
    buffers = {key: optimizer.state[weight]["momentum_buffer"] for key, weight in network.named_parameters()}
    for key, buffer in buffers.items():
        momentum = 0.6 if key in ("0.weight", "2.weight") else 0.8
        torch.testing.assert_close(buffer, torch.full_like(buffer, momentum * 1.0 + 2.0))


def test_muon_orthogonalizes_in_bf16_only_when_training_in_bf16() -> None:
    updates = {}
    for precision in ("fp32", "fp16", "bf16"):
        network = small_network()
        before = network[0].weight.detach().clone()
        optimizer = build_optimizer(network, OptimSettings(name="muon", lr=0.1), precision)
        for weight in network.parameters():
            weight.grad = torch.ones_like(weight).cumsum(0)
        optimizer.step()
        updates[precision] = network[0].weight.detach() - before * (len(before) ** 0.5 / before.norm())
    assert torch.equal(updates["fp16"], updates["fp32"]) and not torch.equal(updates["bf16"], updates["fp32"])
    torch.testing.assert_close(updates["bf16"], updates["fp32"], rtol=0.03, atol=1e-3)


def test_muon_leaves_tokens_and_scales_to_sgd_and_keeps_zero_weights_finite() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.full((6, 1, 1), 1e-6))
            self.position_embedding = nn.Parameter(torch.zeros(1, 4, 6))
            self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            nn.init.zeros_(self.middle.weight)

    network = Network()
    optimizer = build_optimizer(network, OptimSettings(name="muon"))
    kinds = {group["kind"]: [tuple(weight.shape) for weight in group["params"]] for group in optimizer.param_groups}
    vectors = [(1, 1, 6), (6, 1, 1), (1, 4, 6), (6,), (2,)]
    assert kinds == {"matrices": [(6, 6)], "head": [(2, 6)], "vectors": vectors}
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all(torch.isfinite(weight).all() for weight in network.parameters())
