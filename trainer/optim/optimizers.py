"""A network in, an optimizer out. Parts of it, or weights of three kinds, may have learning rates of their own."""

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
"""What torch's optimizers take: {"params": [...], "part": a name, "kind": "matrices", "head" or "vectors"}, the latter
two where they matter."""


def sgd(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, by torch's fused kernel."""
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
            # PyTorch makes these in the first step, and leaves them as they come from memory where that is skipped.
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def adamw(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, torch's own. (Loshchilov and Hutter, arXiv 1711.05101.)"""
    first, second = optim.betas
    return torch.optim.AdamW(groups, optim.lr, betas=(first, second), weight_decay=optim.weight_decay, fused=True)


def muon(groups: Groups, optim: OptimSettings, precision: str) -> torch.optim.Optimizer:
    """Muon for matrices, SGD for head and vectors."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(groups, optim.lr, optim.muon_momentum, optim.momentum, optim.weight_decay, dtype)


def build_optimizer(module: nn.Module, optim: OptimSettings, precision: str = "fp32") -> torch.optim.Optimizer:
    """The named optimizer of all weights that are trained: in one group where one learning rate does for all.

    precision: the training's; weights and their updates are fp32 whatever it is.
    """
    compiler_import.avoid()
    groups: Groups = [{"params": [weight for weight in module.parameters() if weight.requires_grad]}]
    if optim.lr_parts:
        groups = _by_part(module, optim)
    if optim.name == "muon" or optim.lr_vectors is not None or optim.lr_head is not None:
        groups = [finer for group in groups for finer in _by_kind(module, optim, group)]
    optimizer: torch.optim.Optimizer = load_plugin(OPTIMIZERS, optim.name)(groups, optim, precision)
    compiler_import.unwrap_step(optimizer)
    return optimizer


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() changes nothing where the attribute `found_inf`, float32 [] on the device, is 1. PyTorch's fused
    optimizers do, as its GradScaler asks of them; others would take the step."""
    return isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))


def _by_part(module: nn.Module, optim: OptimSettings) -> Groups:
    """The trained weights under each name of optim.lr_parts and under no longer one, then those under none."""
    setting = f"optim.lr_parts={optim.lr_parts}"
    parts: dict[str, list[Tensor]] = {name: [] for name in optim.lr_of_parts}
    for name in parts:
        find_module(module, name, setting)
    rest: list[Tensor] = []
    for own_name, weight in module.named_parameters():
        if weight.requires_grad:
            over = [name for name in parts if is_under(own_name, name)]
            (parts[max(over, key=len)] if over else rest).append(weight)
    for name, weights in parts.items():
        if not weights:
            raise ConfigError(f"{setting}: no weight that is trained has the rate of '{name}'; leave it out")
    groups: Groups = [{"params": weights, "part": name} for name, weights in parts.items()]
    return [*groups, {"params": rest}] if rest else groups


def _by_kind(module: nn.Module, optim: OptimSettings, group: dict[str, Any]) -> Groups:
    heads = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)][-1:]
    if optim.lr_head is not None and not any(head.requires_grad for head in heads):
        raise ConfigError(f"optim.lr_head={optim.lr_head}: the network has no linear layer that is trained; unset it")
    kinds: dict[str, list[Tensor]] = {"matrices": [], "head": [], "vectors": []}
    for weight in group["params"]:
        # Scales of channels and learned tokens are vectors too, whatever their shape.
        is_vector = weight.numel() == max(weight.shape, default=1) or weight.shape[0] == 1
        kind = "head" if any(weight is head for head in heads) else "vectors" if is_vector else "matrices"
        kinds[kind].append(weight)
    return [group | {"params": weights, "kind": kind} for kind, weights in kinds.items() if weights]


def restore_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a checkpoint's state. Its tensors get the layout of the parameters: fused kernels run over both at once."""
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_learning_rates(optimizer: torch.optim.Optimizer, optim: OptimSettings, lr_factor: float) -> None:
    """Sets the rate of every group to its peak times a factor in [0, 1]; called before each step."""
    kinds = {"vectors": optim.lr_vectors, "head": optim.lr_head}
    parts = optim.lr_of_parts
    for group in optimizer.param_groups:
        peak = parts.get(group.get("part", ""), kinds.get(group.get("kind", "")))
        group["lr"] = lr_factor * (optim.lr if peak is None else peak)
        if "lr_factor" in group:
            group["lr_factor"] = lr_factor
