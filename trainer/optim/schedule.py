"""Computes the learning rate from the optimizer step. Imports no torch: the launcher prints the schedule beforehand.

To add a schedule, write a function like `cosine` and list it in SCHEDULES in config/plugins.py. It maps progress since
the end of the warmup, in [0, 1), to a factor in [0, 1].
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trainer.config.durations import Durations
from trainer.config.plugins import SCHEDULES, load_plugin
from trainer.config.schema import RunConfig

_SMALLEST_JUMP = 0.001  # of the peak learning rate


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

    @classmethod
    def from_config(cls, config: RunConfig, durations: Durations) -> "Schedule":
        """Returns the schedule of a run."""
        return cls(config.schedule.name, durations.warmup_steps, durations.total_steps)


def describe_changed_length(settings: Mapping[str, Any], step: int, config: RunConfig, durations: Durations) -> str:
    """Describes the jump of the learning rate when a run goes on with another length; empty without a jump.

    settings: of the checkpoint from which the run continues, by full name. step: of that checkpoint.
    """
    if not step or "train.epochs" not in settings:
        return ""
    old_train = replace(config.train, epochs=settings["train.epochs"], max_steps=settings.get("train.max_steps"))
    old_durations = Durations.from_config(replace(config, train=old_train), durations.steps_per_epoch)
    before, after = (
        config.optim.lr * Schedule.from_config(config, length).lr_factor(min(step, length.total_steps - 1))
        for length in (old_durations, durations)
    )
    if abs(after - before) < _SMALLEST_JUMP * config.optim.lr:
        return ""
    return (
        f"the run now ends at step {durations.total_steps:,} instead of {old_durations.total_steps:,}, which changes "
        f"the {config.schedule.name} schedule: the learning rate jumps from {before:.3g} to {after:.3g} at step "
        f"{step + 1:,}"
    )
