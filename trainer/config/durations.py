"""Epochs become steps, once; the learning rate is a pure function of the step. No torch: launchers tell both before
anything is started."""

from dataclasses import dataclass

from trainer.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Durations:
    """Everything that the settings give in epochs, in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> "Durations":
        """The one place where epochs become steps."""
        total = config.train.epochs * steps_per_epoch
        if config.train.max_steps is not None:
            total = min(total, config.train.max_steps)
        return cls(steps_per_epoch, total, min(total, round(config.schedule.warmup_epochs * steps_per_epoch)))

    def due(self, step: int, every_epochs: int, every_steps: int = 0) -> bool:
        """Whether something done every so many epochs or steps is due after `step` steps (0: never by that clock)."""
        by_steps = every_steps > 0 and step % every_steps == 0
        by_epochs = every_epochs > 0 and step % (every_epochs * self.steps_per_epoch) == 0
        return by_steps or by_epochs

    def due_within(self, step: int, steps: int, every_epochs: int) -> bool:
        """Whether something that is done every so many epochs, and at the end, falls into the next so many steps."""
        period = every_epochs * self.steps_per_epoch
        return step + steps >= self.total_steps or (period > 0 and (step + steps) // period > step // period)


def steps_per_epoch(num_samples: int, global_batch_size: int, drop_last: bool) -> int:
    """Optimizer steps of a pass over the training set; the last batch may be short, or left out."""
    full, rest = divmod(num_samples, global_batch_size)
    return full if drop_last or not rest else full + 1
