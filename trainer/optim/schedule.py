"""The learning rate as a pure function of the optimizer step. No torch: launchers show it before anything starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from trainer.config.plugins import SCHEDULES, load_plugin


def constant(progress: float) -> float:
    return 1.0


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine. (Loshchilov and Hutter, arXiv 1608.03983.)"""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


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
        curve: Callable[[float], float] = load_plugin(SCHEDULES, self.name)
        return curve((step - self.warmup_steps) / max(1, after_warmup))
