"""Keeps training from importing PyTorch's compiler, which takes 1.3 s of each process start (torch 2.15, measured).

At the first call of an optimizer's method PyTorch imports the compiler, only to look up that it must not compile the
method. Both functions answer that question in advance. With a PyTorch that asks in another way they have no effect, and
training starts more slowly. On a GPU, virtual ranks import the compiler anyway (torch.use_deterministic_algorithms).
"""

import inspect
import types

import torch
from torch.optim import Optimizer


def skip_for_optimizer_methods() -> None:
    """Stores the answer for every method of Optimizer. Call it before an optimizer is constructed.

    `__dynamo_disable` is a private attribute, in which torch/_compile.py caches the function that the compiler returns.
    There is no public way.
    """
    for method in vars(Optimizer).values():
        wrapped = getattr(method, "__wrapped__", None)
        if wrapped is not None and not hasattr(wrapped, "__dynamo_disable"):
            wrapped.__dynamo_disable = wrapped


def skip_for_step(optimizer: Optimizer) -> None:
    """Replaces step() by the function that PyTorch wraps: without the question, the profiler's label and step hooks.

    Leaves other packages' optimizers alone, whose step() may need its decorators.
    """
    if not type(optimizer).__module__.startswith(("torch.optim.", "trainer.optim.")):
        return
    step = torch.no_grad()(inspect.unwrap(type(optimizer).step))
    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
