"""Reports steps whose loss or gradient is not finite, and ends the run when they exceed train.max_bad_steps."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.sampler import BatchSampler
from trainer.run.checkpoint import Progress
from trainer.step import StepOutcome
from trainer.tracking.jsonl import NullJsonLines

_LAG_STEPS = 8


class _PendingStep(NamedTuple):
    step: int
    skipped: Tensor
    """float32 []; on a GPU's host, valid once `copied` has happened"""
    copied: torch.cuda.Event | None
    outcome: StepOutcome


class SkippedSteps:
    """Finds out which steps the device skipped.

    With a GPU the flag of a step is read `lag_steps` steps later, so that the CPU does not wait for the current step.
    The lag is constant, so all ranks read the flag of a step at the same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._pending: deque[_PendingStep] = deque()

    @property
    def lag_steps(self) -> int:
        return _LAG_STEPS if self._is_gpu else 0

    def add(self, step: int, outcome: StepOutcome) -> None:
        """Adds a step's outcome; starts to copy its `skipped` flag to the CPU."""
        skipped, copied = outcome.skipped, None
        if self._is_gpu:
            host_flag = torch.empty((), pin_memory=True)
            skipped, copied = host_flag.copy_(skipped, non_blocking=True), torch.cuda.Event()
            copied.record()
        self._pending.append(_PendingStep(step, skipped, copied, outcome))

    def pop_skipped(self, lag_steps: int = 0) -> Iterator[tuple[int, StepOutcome]]:
        """Yields each skipped step once, except for the last `lag_steps` steps. Waits for the steps before those."""
        while len(self._pending) > lag_steps:
            pending = self._pending.popleft()
            if pending.copied is not None:
                pending.copied.synchronize()
            if pending.skipped.item():
                yield pending.step, pending.outcome


class NonFiniteGuard:
    """Records skipped steps and compares their number to train.max_bad_steps.

    The number is part of the run's progress, so a resumed run has the same limit as an uninterrupted one.
    """

    def __init__(
        self,
        progress: Progress,
        batches: BatchSampler,
        max_bad_steps: int,
        log: Callable[[str], None],
        all_reduce_sum: Callable[[Tensor], Tensor],
    ) -> None:
        self._progress, self._batches, self._max_bad_steps = progress, batches, max_bad_steps
        self._log, self._all_reduce_sum = log, all_reduce_sum

    def limit_error(self) -> str:
        """Returns the error message for a resumed run that has skipped too many steps already, or ""."""
        if self._progress.bad_steps <= self._max_bad_steps:
            return ""
        return (
            f"{self._progress.bad_steps} steps of this run were skipped because loss or gradient was not finite, more "
            f"than train.max_bad_steps={self._max_bad_steps}. Raise it to continue without those steps, or start a new "
            "run with another run.name"
        )

    def record(self, skipped_steps: Iterable[tuple[int, StepOutcome]], bad_steps_file: NullJsonLines) -> str:
        """Writes skipped steps to bad_steps.jsonl and counts them. A collective: call it on every rank.

        Returns the error message for the first step that exceeds train.max_bad_steps, or "".
        """
        errors = [self._record_step(step, outcome, bad_steps_file) for step, outcome in skipped_steps]
        return next(filter(None, errors), "")

    def _record_step(self, step: int, outcome: StepOutcome, bad_steps_file: NullJsonLines) -> str:
        loss_sum = float(self._all_reduce_sum(outcome.loss_sum()))
        epoch, ids = self._batches.epoch_of(step), self._batches.sample_ids(step).tolist()
        bad_steps_file.write({"step": step, "epoch": epoch, "loss_sum": loss_sum, "ids": ids})
        problem = f"step {step:,}: loss or gradient was not finite (its samples are in bad_steps.jsonl)"
        previous = self._progress.bad_steps
        is_within_limit = previous < self._max_bad_steps
        # A step over the limit that is not completed yet does not count: the resumed run will take it again.
        self._progress.bad_steps += is_within_limit or step < self._progress.step
        if is_within_limit:
            self._log(f"{problem}; skipped, {self._progress.bad_steps} of at most {self._max_bad_steps}")
            return ""
        return (
            f"{problem}, after {previous} skipped steps; a checkpoint was saved. Lower optim.lr, set "
            "train.clip_grad_norm, check those samples, or raise train.max_bad_steps to continue without them"
        )
