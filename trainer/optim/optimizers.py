"""Builds the optimizer of a network, with learning rates of their own for parts of it or for kinds of weights.

To add an optimizer, write a function like `adamw` and list it in OPTIMIZERS in config/plugins.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.plugins import OPTIMIZERS, load_plugin
from trainer.config.schema import OptimSettings
from trainer.errors import ConfigError
from trainer.models.inspect import find_module, is_under
from trainer.optim import compiler_import
from trainer.optim.muon import Muon

Groups = list[dict[str, Any]]
"""Parameter groups as torch.optim takes them: {"params": [weights]}, with two optional keys. "part" is a name from
optim.lr_parts. "kind" is "matrices", "head" (the last linear layer's weights) or "vectors" (biases, norms, tokens)."""


def sgd(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Returns stochastic gradient descent with momentum, with torch's fused kernel."""
    optimizer = torch.optim.SGD(
        groups,
        optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        for weight in group["params"] if optim.momentum else ():
            # PyTorch allocates the buffers in the first step, and does not initialize them if that step is skipped.
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def adamw(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Returns Adam with decoupled weight decay, in torch's fused kernel. (Loshchilov, Hutter, arXiv 1711.05101.)"""
    beta1, beta2 = optim.betas
    return torch.optim.AdamW(groups, optim.lr, betas=(beta1, beta2), weight_decay=optim.weight_decay, fused=True)


def muon(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Returns Muon for matrices, which updates head and vectors by SGD. (Jordan et al. 2024.)"""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(groups, optim.lr, optim.muon_momentum, optim.momentum, optim.weight_decay, dtype)


def build_optimizer(network: nn.Module, optim: OptimSettings, precision: str = "fp32") -> torch.optim.Optimizer:
    """Returns the optimizer that the settings name, over all trainable weights.

    All weights are in one group unless the settings or the optimizer need several. A checkpoint stores the groups, so
    the same settings must give the same groups in every version.
    precision: that of the forward and backward pass. Weights and their updates are always fp32.
    Raises ConfigError for a learning rate without weights that it applies to.
    """
    compiler_import.skip_for_optimizer_methods()
    groups = parameter_groups(network, optim)
    optimizer: torch.optim.Optimizer = load_plugin(OPTIMIZERS, optim.name)(groups, optim, precision)
    compiler_import.skip_for_step(optimizer)
    return optimizer


def parameter_groups(network: nn.Module, optim: OptimSettings) -> Groups:
    """Returns the groups of trainable weights that get the same learning rate. Raises ConfigError."""
    groups: Groups = [{"params": [weight for weight in network.parameters() if weight.requires_grad]}]
    if optim.lr_parts:
        groups = _split_by_part(network, optim)
    if optim.name == "muon" or optim.lr_vectors is not None or optim.lr_head is not None:
        groups = [subgroup for group in groups for subgroup in _split_by_kind(network, optim, group)]
    return groups


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether step() changes nothing when the attribute `found_inf`, float32 [] on the device, is 1.

    PyTorch's fused optimizers support it for GradScaler. Other optimizers ignore it and update the weights.
    """
    is_from_torch = type(optimizer).__module__.startswith("torch.optim.")
    return isinstance(optimizer, Muon) or (is_from_torch and bool(optimizer.defaults.get("fused")))


def restore_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a checkpoint's optimizer state, and converts its tensors to the memory layout of their weights.

    A fused kernel walks through a weight and its state in memory order, so that both must have the same layout.
    """
    optimizer.load_state_dict(state)
    for weight, weight_state in optimizer.state.items():
        for name, value in weight_state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                weight_state[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def set_learning_rates(optimizer: torch.optim.Optimizer, optim: OptimSettings, lr_factor: float) -> None:
    """Sets the learning rate of each group to its peak times lr_factor, in [0, 1]. Call it before each step."""
    lr_by_kind = {"vectors": optim.lr_vectors, "head": optim.lr_head}
    lr_by_part = optim.lr_by_part
    for group in optimizer.param_groups:
        peak = lr_by_part.get(group.get("part", ""), lr_by_kind.get(group.get("kind", "")))
        group["lr"] = lr_factor * (optim.lr if peak is None else peak)
        if "lr_factor" in group:
            group["lr_factor"] = lr_factor


def _split_by_part(network: nn.Module, optim: OptimSettings) -> Groups:
    """Returns a group for each name in optim.lr_parts, and a last one for all other trainable weights.

    A weight under several of the names belongs to the longest one.
    """
    setting = f"optim.lr_parts={optim.lr_parts}"
    weights_by_part: dict[str, list[Tensor]] = {name: [] for name in optim.lr_by_part}
    for part in weights_by_part:
        find_module(network, part, setting)
    other_weights: list[Tensor] = []
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            parts = [part for part in weights_by_part if is_under(name, part)]
            (weights_by_part[max(parts, key=len)] if parts else other_weights).append(weight)
    for part, weights in weights_by_part.items():
        if not weights:
            raise ConfigError(f"{setting}: the rate of '{part}' applies to no trainable weight; remove it")
    groups: Groups = [{"params": weights, "part": part} for part, weights in weights_by_part.items()]
    return [*groups, {"params": other_weights}] if other_weights else groups


def _split_by_kind(network: nn.Module, optim: OptimSettings, group: dict[str, Any]) -> Groups:
    """Splits a group into matrices, head and vectors, without empty groups."""
    heads = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear)][-1:]
    if optim.lr_head is not None and not any(head.requires_grad for head in heads):
        raise ConfigError(f"optim.lr_head={optim.lr_head}: the network has no trainable linear layer; set it to null")
    weights_by_kind: dict[str, list[Tensor]] = {"matrices": [], "head": [], "vectors": []}
    for weight in group["params"]:
        # Channel scales and learned tokens are vectors too, even with more than one dimension.
        is_vector = weight.numel() == max(weight.shape, default=1) or weight.shape[0] == 1
        kind = "head" if any(weight is head for head in heads) else "vectors" if is_vector else "matrices"
        weights_by_kind[kind].append(weight)
    return [group | {"params": weights, "kind": kind} for kind, weights in weights_by_kind.items() if weights]
