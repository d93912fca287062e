"""A step whose loss or gradient is not finite in, a line on its samples out; so many are skipped and no more."""

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


class _Said(NamedTuple):
    step: int
    skipped: Tensor
    """float32 [], in the CPU's memory when `arrived`"""
    arrived: torch.cuda.Event | None
    outcome: StepOutcome


class SkippedSteps:
    """Which steps the device has skipped. A GPU is heard some steps later, always as many: the CPU does not wait for
    the step in hand, and all ranks hear of a step at the same time."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._said: deque[_Said] = deque()

    @property
    def lag_steps(self) -> int:
        return _LAG_STEPS if self._is_gpu else 0

    def add(self, step: int, outcome: StepOutcome) -> None:
        """What a step says of itself, on the device."""
        skipped, arrived = outcome.skipped, None
        if self._is_gpu:
            on_host = torch.empty((), pin_memory=True)
            skipped, arrived = on_host.copy_(skipped, non_blocking=True), torch.cuda.Event()
            arrived.record()
        self._said.append(_Said(step, skipped, arrived, outcome))

    def heard(self, lag_steps: int = 0) -> Iterator[tuple[int, StepOutcome]]:
        """The steps that were skipped, the last lag_steps left out, each once."""
        while len(self._said) > lag_steps:
            said = self._said.popleft()
            if said.arrived is not None:
                said.arrived.synchronize()
            if said.skipped.item():
                yield said.step, said.outcome


class NonFiniteGuard:
    """Counts in the run's progress, so that a run that goes on is allowed no more than one that never stopped."""

    def __init__(
        self,
        progress: Progress,
        batches: BatchSampler,
        allowed: int,
        log: Callable[[str], None],
        add_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self._progress, self._batches, self._allowed = progress, batches, allowed
        self._log, self._add_ranks = log, add_ranks

    def too_many_before(self) -> str:
        """What to tell the user of a run that goes on after more than are allowed, or nothing."""
        if self._progress.bad_steps <= self._allowed:
            return ""
        return (
            f"{self._progress.bad_steps} steps of this run were skipped because loss or gradient was not finite, more "
            f"than train.max_bad_steps={self._allowed}; raise it to go on without them, or start afresh"
        )

    def note(self, skipped: Iterable[tuple[int, StepOutcome]], lines: NullJsonLines) -> str:
        """Notes steps and counts them. Returns what to tell the user of the first that is one too many, or nothing."""
        problems = [self._note(step, outcome, lines) for step, outcome in skipped]
        return next(filter(None, problems), "")

    def _note(self, step: int, outcome: StepOutcome, lines: NullJsonLines) -> str:
        """One too many that is the step in hand is not counted: the run will meet it again."""
        loss_sum, epoch = float(self._add_ranks(outcome.loss_sum())), self._batches.epoch(step)
        ids = self._batches.ids(step).tolist()
        lines.write({"step": step, "epoch": epoch, "loss_sum": loss_sum, "ids": ids})
        what = f"step {step:,}: loss or gradient was not finite (its samples are in bad_steps.jsonl)"
        before = self._progress.bad_steps
        self._progress.bad_steps += before < self._allowed or step < self._progress.step
        if before >= self._allowed:
            return (
                f"{what}, after {before} steps skipped for that; the run so far is kept. "
                "Lower optim.lr, set train.clip_grad_norm, look at those samples, or raise train.max_bad_steps to go "
                "on without them"
            )
        self._log(f"{what}; skipped, {self._progress.bad_steps} of at most {self._allowed}")
        return ""
