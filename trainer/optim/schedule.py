"""Computes the learning rate from the optimizer step. Imports no torch: the launcher prints the schedule beforehand.

To add a schedule, write a function like `cosine` and list it in SCHEDULES in config/plugins.py. It maps progress since
the end of the warmup, in [0, 1), to a factor in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.config.plugins import SCHEDULES, load_plugin


def constant(progress: float) -> float:
    """Returns 1: the learning rate stays at its peak."""
    return 1.0


def cosine(progress: float) -> float:
    """Falls from 1 to 0 along half a cosine. (Loshchilov and Hutter, arXiv 1608.03983.)"""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Falls from 1 to 0 in a straight line."""
    return 1 - progress


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate schedule: a linear warmup, then the named curve up to the last step."""

    name: str
    warmup_steps: int
    total_steps: int

    def lr_factor(self, step: int) -> float:
        """Returns the factor, in [0, 1], that optim.lr is multiplied by at an optimizer step, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        steps_after_warmup = self.total_steps - self.warmup_steps
        curve: Callable[[float], float] = load_plugin(SCHEDULES, self.name)
        return curve((step - self.warmup_steps) / max(1, steps_after_warmup))
