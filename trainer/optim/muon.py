"""Muon: an optimizer that orthogonalizes the update of each weight matrix."""

from typing import Any

import torch
from torch import Tensor

# torch._foreach_mul_ and torch._foreach_add_ are private, and there is no public way. They stay: torch.optim uses them
# too, because they update all weights of a group in one kernel. A loop would launch a kernel for each weight.


class Muon(torch.optim.Optimizer):
    """Updates matrices by orthogonalized momentum, and other weights by SGD with Nesterov momentum. (Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024.)

    The weights of a convolution, [out, in, height, width], form one matrix [out, in * height * width]. Before its
    update each matrix is scaled to rows of norm 1 (root mean square over the rows), so that the learning rate is an
    angle.

    Parameter groups have a `kind`: "matrices" (the default), or another one for SGD, such as "head" and "vectors". The
    caller sets `lr_factor` of each group, the learning rate divided by its peak, because weight decay follows it.
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
        """momentum: for matrices. sgd_momentum: for other weights.

        weight_decay: the share of a weight that a step at the peak learning rate removes. It does not apply to
        matrices, whose norm is fixed.
        dtype: precision of the orthogonalization.
        """
        super().__init__(groups, {"lr": lr, "lr_factor": 1.0, "kind": "matrices", "weight_decay": weight_decay})
        self._momentum, self._sgd_momentum = momentum, sgd_momentum
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the weights and the momentum.

        Changes nothing if the attribute `found_inf`, float32 [] on the weights' device, is 1. PyTorch's GradScaler and
        fused optimizers share this convention.
        """
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            self._update_group(group, found_inf)

    def _update_group(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        # 1 leaves weights and momentum unchanged, 0 updates them. The value stays on the device: the CPU never waits.
        skip = weights[0].new_zeros(()) if found_inf is None else found_inf
        is_matrices = group["kind"] == "matrices"
        momentum = self._momentum if is_matrices else self._sgd_momentum
        gradients = [torch.where(skip > 0, 0.0, weight.grad) for weight in weights]
        buffers = [self._momentum_buffer(weight) for weight in weights]
        torch._foreach_mul_(buffers, momentum * (1 - skip) + skip)
        torch._foreach_add_(buffers, gradients)
        updates = torch._foreach_add(gradients, buffers, alpha=momentum)
        torch._foreach_mul_(updates, 1 - skip)
        if is_matrices:
            for weight, update in zip(weights, updates, strict=True):
                weight.mul_(torch.where(skip > 0, 1.0, len(weight) ** 0.5 / weight.norm().clamp(min=1e-12)))
                weight.add_(orthogonalize(update.flatten(1), self._dtype).view(update.shape), alpha=-group["lr"])
        else:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            torch._foreach_mul_(weights, 1 - group["weight_decay"] * group["lr_factor"] * (1 - skip))

    def _momentum_buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(matrix: Tensor, dtype: torch.dtype = torch.float32, steps: int = 3) -> Tensor:
    """Returns roughly the nearest orthogonal matrix: brings all singular values of [m, n] near 1, for any m and n.

    Runs the Newton-Schulz iteration with the quintic polynomial that grows small values fastest. bfloat16 is precise
    enough. (Jordan et al. 2024; Bernstein and Newhouse, arXiv 2409.20325.)
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.to(dtype)
    x = x.T if is_tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.T if is_tall else x).to(matrix.dtype)
