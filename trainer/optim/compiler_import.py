"""A start of training that does not import PyTorch's compiler, which takes more than a second of each process.

PyTorch imports the compiler at the first call of an optimizer's method, only to learn that the method is not to be
compiled. Another version of PyTorch, which asks in another way, starts slower and is otherwise the same.
"""

import inspect
import types

import torch
from torch.optim import Optimizer


def avoid() -> None:
    """Before an optimizer is made: leaves the answer where torch/_compile.py looks for it, on each method."""
    for method in vars(Optimizer).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            wrapped.__dynamo_disable = wrapped


def unwrap_step(optimizer: Optimizer) -> None:
    """Calls step() without what PyTorch wraps around it: that question, a mark for its profiler, its hooks."""
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
