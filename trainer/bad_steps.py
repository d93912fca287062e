"""A step whose loss or gradient is not finite in, a line on its samples out; so many are skipped and no more."""

from collections.abc import Callable

from trainer.checkpoint import Progress
from trainer.trackers import Lines


class BadSteps:
    """Counts in the run's progress, so that a run that goes on is allowed no more than one that never stopped."""

    def __init__(self, progress: Progress, allowed: int, say: Callable[[str], None]) -> None:
        self._progress, self._allowed, self._say = progress, allowed, say

    def skip(self, lines: Lines, epoch: int, loss_sum: float, ids: list[int]) -> str:
        """Notes the step in hand and counts it. Returns what to tell the user when it is one too many, which is not
        counted, or nothing.

        loss_sum: over all ranks; ids: the samples of the global batch.
        """
        step = self._progress.step
        lines.write({"step": step, "epoch": epoch, "loss_sum": loss_sum, "ids": ids})
        what = f"step {step:,}: loss or gradient was not finite (its samples are in bad_steps.jsonl)"
        if self._progress.bad_steps >= self._allowed:
            return (
                f"{what}, after {self._progress.bad_steps} steps skipped for that; the checkpoint before it is kept. "
                "Lower optim.lr, set train.clip_grad_norm, look at those samples, or raise train.max_bad_steps to go "
                "on without them"
            )
        self._progress.bad_steps += 1
        self._say(f"{what}; skipped, {self._progress.bad_steps} of at most {self._allowed}")
        return ""
