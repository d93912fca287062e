"""PyTorch's backward pass and optimizers without its compiler.

They import it when the first one is made, for seconds, to tell it to leave them alone; each step tells it again. Here
optimizers are never compiled, train.compile or not, so that there is nobody to tell, and a training starts in half the
time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.optim import Optimizer


def leave_alone() -> None:
    """Has the methods of all optimizers called as they are: what each would ask the compiler for is set to itself."""
    for method in vars(Optimizer).values():
        own = getattr(method, "__wrapped__", None)
        if own is not None and not hasattr(own, "__dynamo_disable"):  # torch/_compile.py keeps its answer there
            own.__dynamo_disable = own


def backward(result: Tensor, gradient: Tensor) -> None:
    """result.backward(gradient), both float [] of one type: PyTorch's own imports sympy to compare their shapes."""
    _engine_run_backward((result,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def as_written(step: Callable[..., None]) -> Any:
    """A step without gradients of its own, and without what PyTorch's optimizers put around one: marks for its profiler
    and calls of hooks, which take twice as long as the update of a small network."""
    found = torch.no_grad()(step)
    found.hooked = True  # type: ignore[attr-defined]  # torch/optim/optimizer.py leaves it alone then
    return found


class SGD(torch.optim.SGD):
    """By the fused kernel itself: sorting all weights by device and type, as PyTorch's own step does before it, takes a
    small network longer than the update. All weights that are trained are on one device, in one type."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for group in self.param_groups:
            for weight in group["params"] if group["momentum"] else ():
                # Now: a first step that is forbidden would leave them as they come from memory.
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @as_written
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            torch._fused_sgd_(
                weights,
                [weight.grad for weight in weights],
                [self.state[weight]["momentum_buffer"] for weight in weights] if group["momentum"] else [],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )


class AdamW(torch.optim.AdamW):
    step = as_written(inspect.unwrap(torch.optim.AdamW.step))  # as it is under what tells the compiler
