"""A network in, an optimizer out. Parts of it, or weights of three kinds, may have learning rates of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer import compiler_import, names
from trainer.errors import ConfigError
from trainer.settings import Optim

Groups = list[dict[str, Any]]
"""What torch's optimizers take: {"params": [...], "part": a name, "kind": "matrices", "head" or "vectors"}, the latter
two where they matter."""


def sgd(groups: Groups, optim: Optim, precision: str) -> torch.optim.Optimizer:
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


def adamw(groups: Groups, optim: Optim, precision: str) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, torch's own. (Loshchilov and Hutter, arXiv 1711.05101.)"""
    first, second = optim.betas
    return torch.optim.AdamW(groups, optim.lr, betas=(first, second), weight_decay=optim.weight_decay, fused=True)


def muon(groups: Groups, optim: Optim, precision: str) -> torch.optim.Optimizer:
    """Muon for matrices, SGD for head and vectors."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Muon(groups, optim.lr, optim.muon_momentum, optim.momentum, optim.weight_decay, dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added. (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024.)

    A convolution's weights [out, in, height, width] are one matrix, [out, in * height * width]. Before its update each
    matrix is scaled to rows of norm 1 (root mean square), so that the learning rate is an angle. Head and vectors have
    nothing to make orthogonal: Nesterov's momentum moves them.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float,
        momentum: float,
        sgd_momentum: float,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """weight_decay: the share of head and vectors that a step at the peak learning rate takes off; matrices, whose
        norm is fixed, have none. dtype: what matrices are made orthogonal in."""
        super().__init__(groups, {"lr": lr, "lr_factor": 1.0, "kind": "matrices", "weight_decay": weight_decay})
        self._momentum, self._sgd_momentum = momentum, sgd_momentum
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes nothing where `found_inf`, float32 [] on the device, is 1: PyTorch's own way to forbid a step."""
        found: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            is_matrices = group["kind"] == "matrices"
            momentum = self._momentum if is_matrices else self._sgd_momentum
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            bad = weights[0].new_zeros(()) if found is None else found
            gradients = [torch.where(bad > 0, 0.0, weight.grad) for weight in weights]
            means = [self._mean(weight) for weight in weights]
            torch._foreach_mul_(means, momentum * (1 - bad) + bad)
            torch._foreach_add_(means, gradients)
            moves = torch._foreach_add(gradients, means, alpha=momentum)
            torch._foreach_mul_(moves, 1 - bad)
            if is_matrices:
                for weight, move in zip(weights, moves, strict=True):
                    weight.mul_(torch.where(bad > 0, 1.0, len(weight) ** 0.5 / weight.norm().clamp(min=1e-12)))
                    weight.add_(orthogonal(move.flatten(1), self._dtype).view(move.shape), alpha=-group["lr"])
            else:
                torch._foreach_add_(weights, moves, alpha=-group["lr"])
                torch._foreach_mul_(weights, 1 - group["weight_decay"] * group["lr_factor"] * (1 - bad))

    def _mean(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        found: Tensor = state["momentum_buffer"]
        return found


def orthogonal(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 3) -> Tensor:
    """The nearest orthogonal matrix, roughly: all singular values of [m, n] are brought near 1, m <= n or not.

    Newton and Schulz's iteration with the quintic polynomial that grows small values fastest; bfloat16 will do.
    (Jordan et al. 2024; Bernstein and Newhouse, arXiv 2409.20325.)
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.to(dtype)
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


# To add an optimizer, write it above, list it here, and name it in trainer/settings.py.
OPTIMIZERS: dict[str, Callable[[Groups, Optim, str], torch.optim.Optimizer]] = {
    "sgd": sgd,
    "adamw": adamw,
    "muon": muon,
}


def build(module: nn.Module, optim: Optim, precision: str = "fp32") -> torch.optim.Optimizer:
    """The named optimizer of all weights that are trained: in one group where one learning rate does for all.

    precision: the training's; weights and their updates are fp32 whatever it is.
    """
    compiler_import.avoid()
    groups: Groups = [{"params": [weight for weight in module.parameters() if weight.requires_grad]}]
    if optim.lr_parts:
        groups = _by_part(module, optim)
    if optim.name == "muon" or optim.lr_vectors is not None or optim.lr_head is not None:
        groups = [finer for group in groups for finer in _by_kind(module, optim, group)]
    optimizer = OPTIMIZERS[optim.name](groups, optim, precision)
    compiler_import.unwrap_step(optimizer)
    return optimizer


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() changes nothing where the attribute `found_inf`, float32 [] on the device, is 1. PyTorch's fused
    optimizers do, as its GradScaler asks of them; others would take the step."""
    return isinstance(optimizer, Muon) or bool(optimizer.defaults.get("fused"))


def _by_part(module: nn.Module, optim: Optim) -> Groups:
    """The trained weights under each name of optim.lr_parts and under no longer one, then those under none."""
    setting = f"optim.lr_parts={optim.lr_parts}"
    parts: dict[str, list[Tensor]] = {name: [] for name in optim.lr_of_parts}
    for name in parts:
        names.find(module, name, setting)
    rest: list[Tensor] = []
    for own_name, weight in module.named_parameters():
        if weight.requires_grad:
            over = [name for name in parts if names.is_under(own_name, name)]
            (parts[max(over, key=len)] if over else rest).append(weight)
    for name, weights in parts.items():
        if not weights:
            raise ConfigError(f"{setting}: no weight that is trained has the rate of '{name}'; leave it out")
    groups: Groups = [{"params": weights, "part": name} for name, weights in parts.items()]
    return [*groups, {"params": rest}] if rest else groups


def _by_kind(module: nn.Module, optim: Optim, group: dict[str, Any]) -> Groups:
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


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a checkpoint's state. Its tensors get the layout of the parameters: fused kernels run over both at once."""
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_lr(optimizer: torch.optim.Optimizer, optim: Optim, lr_factor: float) -> None:
    """Sets the rate of every group to its peak times a factor in [0, 1]; called before each step."""
    kinds = {"vectors": optim.lr_vectors, "head": optim.lr_head}
    parts = optim.lr_of_parts
    for group in optimizer.param_groups:
        peak = parts.get(group.get("part", ""), kinds.get(group.get("kind", "")))
        group["lr"] = lr_factor * (optim.lr if peak is None else peak)
        if "lr_factor" in group:
            group["lr_factor"] = lr_factor
