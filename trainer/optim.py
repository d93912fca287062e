"""Parameters in, an optimizer out; epochs become steps once, and the learning rate is a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.settings import Optim, RunConfig


def sgd(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum, torch's own."""
    return torch.optim.SGD(
        parameters, optim.lr, momentum=optim.momentum, nesterov=optim.nesterov, weight_decay=optim.weight_decay
    )


def adamw(parameters: Iterable[nn.Parameter], optim: Optim) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay, torch's own. (Loshchilov and Hutter, arXiv 1711.05101.)"""
    first, second = optim.betas
    return torch.optim.AdamW(parameters, optim.lr, betas=(first, second), weight_decay=optim.weight_decay)


# To add an optimizer, write it above, list it here, and name it in trainer/settings.py.
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], Optim], torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine. (Loshchilov and Hutter, arXiv 1608.03983.)"""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": constant, "cosine": cosine, "linear": linear}


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate's course: 0 towards 1 over the warmup, then by name down to the last step."""

    name: str
    warmup_steps: int
    total_steps: int

    def lr_factor(self, step: int) -> float:
        """What optim.lr is multiplied by for optimizer step `step`, from 0; in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        after_warmup = self.total_steps - self.warmup_steps
        return SCHEDULES[self.name]((step - self.warmup_steps) / max(1, after_warmup))


@dataclass(frozen=True, slots=True)
class Durations:
    """Everything that the settings give in epochs, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    def due(self, step: int, every_epochs: int, every_steps: int = 0) -> bool:
        """Whether something done every so many epochs or steps is due after `step` steps (0: never by that clock)."""
        by_steps = every_steps > 0 and step % every_steps == 0
        by_epochs = every_epochs > 0 and step % (every_epochs * self.steps_per_epoch) == 0
        return by_steps or by_epochs

    def due_within(self, step: int, steps: int, every_epochs: int) -> bool:
        """Whether something that is done every so many epochs, and at the end, falls into the next so many steps."""
        period = every_epochs * self.steps_per_epoch
        return step + steps >= self.total_steps or (period > 0 and (step + steps) // period > step // period)


def durations(config: RunConfig, steps_per_epoch: int) -> Durations:
    """The one place where epochs become steps."""
    total = config.train.epochs * steps_per_epoch
    if config.train.max_steps is not None:
        total = min(total, config.train.max_steps)
    return Durations(steps_per_epoch, total, min(total, round(config.schedule.warmup_epochs * steps_per_epoch)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group; called before each step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
