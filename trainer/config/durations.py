"""Converts epochs to optimizer steps and decides when evaluations and checkpoints are due. Imports no torch."""

from dataclasses import dataclass

from trainer.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Durations:
    """The durations of a run in optimizer steps."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int

    @classmethod
    def from_config(cls, config: RunConfig, steps_per_epoch: int) -> "Durations":
        """Converts the durations that the settings give in epochs."""
        total = config.train.epochs * steps_per_epoch
        if config.train.max_steps is not None:
            total = min(total, config.train.max_steps)
        return cls(steps_per_epoch, total, min(total, round(config.schedule.warmup_epochs * steps_per_epoch)))

    def is_due(self, step: int, every_epochs: int, every_steps: int = 0) -> bool:
        """Returns whether a periodic action is due after `step` steps. A period of 0 is never due."""
        due_by_steps = every_steps > 0 and step % every_steps == 0
        due_by_epochs = every_epochs > 0 and step % (every_epochs * self.steps_per_epoch) == 0
        return due_by_steps or due_by_epochs

    def is_due_within(self, step: int, steps: int, every_epochs: int) -> bool:
        """Returns whether a periodic action, or the end of the run, falls into the next `steps` steps."""
        period = every_epochs * self.steps_per_epoch
        return step + steps >= self.total_steps or (period > 0 and (step + steps) // period > step // period)


def steps_per_epoch(num_samples: int, global_batch_size: int, drop_last: bool) -> int:
    """Returns the optimizer steps in one epoch. The last batch may be smaller than the others, or is dropped."""
    full_batches, remaining_samples = divmod(num_samples, global_batch_size)
    return full_batches if drop_last or not remaining_samples else full_batches + 1
