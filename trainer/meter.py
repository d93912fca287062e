"""What the steps since the last line add up to, and how long they took; sums stay on the device until a line is due."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Meter:
    """Loss, accuracy and speed of training. Every rank has one over its own slices; reading adds the ranks up."""

    def __init__(
        self, sums: list[float], samples: int, add_ranks: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        """sums: loss sum and correct predictions to begin with, on one rank only; samples: their global number."""
        self._sums = torch.tensor(sums, dtype=torch.float64, device=device)
        self._samples = samples
        self._add_ranks = add_ranks
        self._timed_samples = 0
        self._since = time.perf_counter()
        self._all_samples, self._all_seconds = 0, 0.0

    def start(self) -> None:
        """Starts the clock: what came before is not training time."""
        self._since = time.perf_counter()

    def add(self, sums: Tensor, samples: int) -> None:
        """A step's [loss sum, correct predictions] of this rank, float64 [2], and its samples on all ranks."""
        self._sums += sums
        self._samples += samples
        self._timed_samples += samples

    def skip(self, samples: int) -> None:
        """Samples that took their time and have no loss that counts."""
        self._timed_samples += samples

    def read(self) -> dict[str, float]:
        """loss, accuracy and samples_per_second since the last reading, over all ranks; begins anew."""
        loss_sum, correct = self.total()
        seconds = time.perf_counter() - self._since  # after the sums: on a GPU these wait for the last step
        self._all_samples += self._timed_samples
        self._all_seconds += seconds
        line = {
            "loss": loss_sum / self._samples if self._samples else math.nan,
            "accuracy": correct / self._samples if self._samples else math.nan,
            "samples_per_second": self._timed_samples / seconds,
        }
        self._sums.zero_()
        self._samples = self._timed_samples = 0
        self._since = time.perf_counter()
        return line

    def total(self) -> list[float]:
        """loss sum and correct predictions since the last reading, over all ranks."""
        return self._add_ranks(self._sums.clone()).tolist()

    @property
    def samples(self) -> int:
        """Samples since the last reading, over all ranks."""
        return self._samples

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
