"""Measures loss, accuracy and speed of training. The sums stay on the device until a row of metrics is due."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from trainer.optim.losses import quantize_losses
from trainer.step import ShardResult, StepOutcome
from trainer.timer import Timer

# Outcomes are counted in groups: a dozen small operations in each step take some per cent of a small network's time.
_STEPS_PER_GROUP = 32
_LOGITS_PER_GROUP = 1 << 18
# Slow steps are counted after this time at the latest: tensors of an outcome lie between blocks of memory that the next
# step needs, and the allocator then takes new blocks. ResNet-18 at batch 128 has steps of over a second; its memory
# grew by a fifth within 30 such steps.
_SECONDS_PER_GROUP = 0.2


class Meter:
    """Measures loss, accuracy and speed of training. Every rank measures its shards; reading sums over all ranks."""

    def __init__(
        self,
        sums: list[float],
        sum_over_ranks: Callable[[Tensor], Tensor],
        device: torch.device,
        time_shares: Mapping[str, Timer] = MappingProxyType({}),
    ) -> None:
        """Creates a meter.

        sums: initial loss sum, number of correct predictions and number of samples; zeros on all ranks but one.
        sum_over_ranks: returns the sum of a float64 tensor over all ranks.
        time_shares: timers whose time is reported as a share of the training time, by metric name.
        """
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device)
        self._sum_over_ranks = sum_over_ranks
        self._time_shares = time_shares
        self._grad_norm: Tensor | None = None
        self._outcomes: list[StepOutcome] = []
        self._window_samples = 0
        self._window_start = self._last_count = time.perf_counter()
        self._session_samples, self._session_seconds = 0, 0.0

    def start(self) -> None:
        """Starts the clock. Time before this call is not training time."""
        self._window_start = time.perf_counter()

    def add(self, outcome: StepOutcome, samples: int) -> None:
        """Adds the outcome of a step.

        samples: size of the global batch. A skipped step adds to the speed, but not to loss and accuracy.
        """
        self._outcomes.append(outcome)
        self._window_samples += samples
        self._grad_norm = outcome.grad_norm
        logits = sum(result.logits.numel() for result in outcome.results)
        is_full = len(self._outcomes) * max(1.0, logits * _STEPS_PER_GROUP / _LOGITS_PER_GROUP) >= _STEPS_PER_GROUP
        if is_full or time.perf_counter() - self._last_count > _SECONDS_PER_GROUP:
            self._count_outcomes()

    def _count_outcomes(self) -> None:
        """Adds the collected outcomes to the sums: loss sum, correct predictions, samples."""
        self._last_count = time.perf_counter()
        shards = [
            (result, outcome.skipped) for outcome in self._outcomes for result in outcome.results if result.weight
        ]
        self._outcomes.clear()
        shards.sort(key=_shard_size)  # the sums are exact, so the order does not change them
        for size, same_size_shards in itertools.groupby(shards, _shard_size):
            results, skipped = zip(*same_size_shards, strict=True)
            is_counted = torch.stack(skipped) == 0
            losses = quantize_losses(torch.stack([result.loss_sum for result in results]))
            predictions = torch.cat([result.logits for result in results]).argmax(1)
            correct = (predictions == torch.cat([result.labels for result in results])).view(-1, size).sum(1)
            shard_sums = torch.stack([losses, correct.double(), torch.full_like(losses, size)])
            self._sums += torch.where(is_counted, shard_sums, 0.0).sum(1)

    def read(self) -> dict[str, float]:
        """Returns the metrics since the last reading and starts a new window.

        Over all ranks: loss, accuracy, samples_per_second. Of this rank: the time shares and, on a GPU,
        gpu_memory_bytes (the peak). grad_norm: of the last step, if the step has a gradient norm.
        """
        sums = self._sums_of_all_ranks()
        if self._grad_norm is not None:
            sums = torch.cat([sums, self._grad_norm.to(sums).view(1)])
        loss_sum, correct, samples, *grad_norm = sums.tolist()
        seconds = time.perf_counter() - self._window_start  # after tolist(): on a GPU it waits for the last step
        self._session_samples += self._window_samples
        self._session_seconds += seconds
        metrics = {
            "loss": loss_sum / samples if samples else math.nan,
            "accuracy": correct / samples if samples else math.nan,
            "samples_per_second": self._window_samples / seconds,
        }
        metrics |= {name: min(1.0, timer.read() / seconds) for name, timer in self._time_shares.items()}
        if grad_norm:
            metrics["grad_norm"] = grad_norm[0]
        if sums.is_cuda:
            metrics["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(sums.device)
        self._grad_norm = None
        self._sums.zero_()
        self._window_samples = 0
        self._window_start = time.perf_counter()
        return metrics

    def window_sums(self) -> list[float]:
        """Returns loss sum, correct predictions and samples since the last reading, over all ranks."""
        return self._sums_of_all_ranks().tolist()

    def _sums_of_all_ranks(self) -> Tensor:
        self._count_outcomes()
        return self._sum_over_ranks(self._sums.clone())

    @property
    def mean_samples_per_second(self) -> float:
        """Mean speed over all readings of this session; 0 before the first reading."""
        return self._session_samples / self._session_seconds if self._session_seconds else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside the `with` block."""
        pause_start = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - pause_start


def _shard_size(shard: tuple[ShardResult, Tensor]) -> int:
    return len(shard[0].labels)
