"""Parameters in, an optimizer out."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.settings import Optim


def sgd(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, torch's own."""
    return torch.optim.SGD(
        parameters,
        optim.lr,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def adamw(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, torch's own. (Loshchilov and Hutter, arXiv 1711.05101.)"""
    first, second = optim.betas
    return torch.optim.AdamW(parameters, optim.lr, betas=(first, second), weight_decay=optim.weight_decay, fused=True)


# To add an optimizer, write it above, list it here, and name it in trainer/settings.py.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], Optim], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads a checkpoint's state. Its tensors get the layout of the parameters: fused kernels run over both at once."""
    optimizer.load_state_dict(state)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group; called before each step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
