"""Muon: momentum whose matrices are made orthogonal before they are added to the weights."""

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added. (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024.)

    A convolution's weights [out, in, height, width] are one matrix, [out, in * height * width]. Before its update each
    matrix is scaled to rows of norm 1 (root mean square), so that the learning rate is an angle. Head and vectors have
    nothing to make orthogonal: Nesterov's momentum moves them.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
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
                    weight.add_(orthogonalize(move.flatten(1), self._dtype).view(move.shape), alpha=-group["lr"])
            else:
                torch._foreach_add_(weights, moves, alpha=-group["lr"])
                torch._foreach_mul_(weights, 1 - group["weight_decay"] * group["lr_factor"] * (1 - bad))

    def _mean(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        found: Tensor = state["momentum_buffer"]
        return found


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 3) -> Tensor:
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
