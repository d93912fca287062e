"""What the steps since the last line add up to, and how long they took; sums stay on the device until a line is due."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.step import ShardResult, StepOutcome, quantize_losses
from trainer.timer import Timer

# Steps are counted some at once: a dozen small operations at each step are some per cent of a small network's time.
_STEPS_AT_ONCE = 32
_LOGITS_AT_ONCE = 1 << 18
# Slow steps are counted as often as this: what is kept of one lies amid memory that the next one wants again and then
# finds elsewhere. ResNet-18 at batch 128, with steps of over a second, grew by a fifth within 30 of them.
_SECONDS_AT_ONCE = 0.2


class Meter:
    """Loss, accuracy and speed of training. Every rank has one over its own slices; reading adds the ranks up."""

    def __init__(
        self,
        sums: list[float],
        add_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
        shares: Mapping[str, Timer] = MappingProxyType({}),
    ) -> None:
        """sums: loss sum, correct predictions and samples to begin with, on one rank only; shares: what is told as a
        share of the time, by its name."""
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device)
        self._add_ranks = add_ranks
        self._shares = shares
        self._grad_norm: Tensor | None = None
        self._outcomes: list[StepOutcome] = []
        self._timed_samples = 0
        self._since = self._counted = time.perf_counter()
        self._all_samples, self._all_seconds = 0, 0.0

    def start(self) -> None:
        """Starts the clock: what came before is not training time."""
        self._since = time.perf_counter()

    def add(self, outcome: StepOutcome, samples: int) -> None:
        """A step, and how many samples took its time on all ranks: those of a step that was skipped too, which do not
        count."""
        self._outcomes.append(outcome)
        self._timed_samples += samples
        self._grad_norm = outcome.grad_norm
        logits = sum(result.logits.numel() for result in outcome.results)
        many = len(self._outcomes) * max(1.0, logits * _STEPS_AT_ONCE / _LOGITS_AT_ONCE) >= _STEPS_AT_ONCE
        if many or time.perf_counter() - self._counted > _SECONDS_AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Adds up the steps that have not been: loss sum, correct predictions, samples."""
        self._counted = time.perf_counter()
        counting = [(each, outcome.skipped) for outcome in self._outcomes for each in outcome.results if each.weight]
        self._outcomes.clear()
        counting.sort(key=_size)  # the sums are exact: in any order the same
        for size, some in itertools.groupby(counting, _size):
            results, skipped = zip(*some, strict=True)
            keeps = torch.stack(skipped) == 0
            losses = quantize_losses(torch.stack([result.loss_sum for result in results]))
            predictions = torch.cat([result.logits for result in results]).argmax(1)
            hits = (predictions == torch.cat([result.labels for result in results])).view(-1, size).sum(1)
            found = torch.stack([losses, hits.double(), torch.full_like(losses, size)])
            self._sums += torch.where(keeps, found, 0.0).sum(1)

    def read(self) -> dict[str, float]:
        """loss, accuracy and samples_per_second since the last reading, over all ranks; of this rank the shares, and
        how much of its GPU's memory was taken at most; grad_norm of the last step, if it has one. Begins anew."""
        sums = self._of_all_ranks()
        if self._grad_norm is not None:
            sums = torch.cat([sums, self._grad_norm.to(sums).view(1)])
        loss_sum, correct, samples, *grad_norm = sums.tolist()
        seconds = time.perf_counter() - self._since  # after the sums: on a GPU these wait for the last step
        self._all_samples += self._timed_samples
        self._all_seconds += seconds
        line = {
            "loss": loss_sum / samples if samples else math.nan,
            "accuracy": correct / samples if samples else math.nan,
            "samples_per_second": self._timed_samples / seconds,
        }
        line |= {name: min(1.0, watch.read() / seconds) for name, watch in self._shares.items()}
        if grad_norm:
            line["grad_norm"] = grad_norm[0]
        if sums.is_cuda:
            line["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(sums.device)
        self._grad_norm = None
        self._sums.zero_()
        self._timed_samples = 0
        self._since = time.perf_counter()
        return line

    def total(self) -> list[float]:
        """loss sum, correct predictions and samples since the last reading, over all ranks."""
        return self._of_all_ranks().tolist()

    def _of_all_ranks(self) -> Tensor:
        self._count()
        return self._add_ranks(self._sums.clone())

    @property
    def mean_samples_per_second(self) -> float:
        """Over all readings of this session."""
        return self._all_samples / self._all_seconds if self._all_seconds else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def _size(counting: tuple[ShardResult, Tensor]) -> int:
    return len(counting[0].labels)
