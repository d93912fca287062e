"""PyTorch's optimizers without its compiler.

They import it when the first one is made, for seconds, to tell it to leave them alone; each step tells it again. Where
nothing is compiled there is nobody to tell. Without the compiler a training starts in half the time.
"""

import inspect
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

C = TypeVar("C", bound=type[Optimizer])


def optimizer(kind: C) -> C:
    """An optimizer class of PyTorch's whose steps are made as they are written, and import nothing."""
    step: Any = inspect.unwrap(kind.step)  # under what tells the compiler, and switches gradients off
    return type(kind.__name__, (kind,), {"step": torch.no_grad()(step)})  # type: ignore[return-value]


def leave_alone() -> None:
    """Has the methods of all optimizers called as they are: what each would ask the compiler for is set to itself."""
    for method in vars(Optimizer).values():
        own = getattr(method, "__wrapped__", None)
        if own is not None and not hasattr(own, "__dynamo_disable"):  # torch/_compile.py keeps its answer there
            own.__dynamo_disable = own


leave_alone()
SGD, AdamW = optimizer(torch.optim.SGD), optimizer(torch.optim.AdamW)
