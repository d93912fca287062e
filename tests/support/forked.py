"""What a forked rank runs: trainer/main.py's main() in a process that has imported everything already.

A rank started from nothing imports for six seconds. The server that forks these has done so once, for all tests; the
ranks themselves are as real as torchrun's: processes of their own, a gloo group, the launcher's variables.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sklearn.datasets
import torch._dynamo
import torch.distributed.elastic.multiprocessing.errors
import torchvision.models

import trainer.loop
from trainer import main
from trainer.config.plugins import MODELS
from trainer.data import loader, splits
from trainer.data.augment import Augment
from trainer.data.loader import Samples, Shard
from trainer.nonfinite import SkippedSteps
from trainer.run.watchdog import Watchdog
from trainer.step import Step
from trainer.tracking import wandb, wandb_mode
from trainer.tracking.logger import MetricLogger

__all__ = ["sklearn", "torchvision", "trainer"]


def become_rank(env: dict[str, str], log: str) -> None:
    """The launcher's variables, a log for what is printed, and its folder to be in."""
    multiprocessing.set_start_method("fork", force=True)  # as in a process started by hand, for DataLoader's workers
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(Path(log).parent)


def run_rank(env: dict[str, str], log: str, argv: list[str], plant: str) -> None:
    """plant: what is done to the trainer before, a name of PLANTS."""
    become_rank(env, log)
    sys.argv = ["trainer/main.py", *argv]
    wandb_mode._REACH_SECONDS = wandb._DECIDE_SECONDS = 60.0  # tests of these limits are not made of ranks
    if plant:
        PLANTS[plant]()
    code = main.main(argv)
    sys.stdout.flush()
    os._exit(code)  # no test harness's own end: that would run pytest's


def tiny_network() -> None:
    """BatchNorm and dropout in LeNet's place."""
    MODELS["lenet"] = "support.workers.tiny:tiny"


def idle_weights() -> None:
    """LeNet with weights that take no part in any loss, and others that take part in that of bright samples only."""
    MODELS["lenet"] = "support.workers.tiny:Idle"


def stuck_rank() -> None:
    """Rank 1 sleeps where it augments its sixth batch. Rank 0 leaves it to others to call a hang, and leaves last."""
    tiny_network()
    batch = Step._batch
    if os.environ["RANK"] == "0":
        Watchdog._problem = lambda _: ""  # type: ignore[method-assign]
        answer = Watchdog._answer

        def leaves_late(self: Watchdog) -> None:
            keep = self._keep
            self._keep = lambda line: (time.sleep(2), keep(line))[1]
            answer(self)

        Watchdog._answer = leaves_late  # type: ignore[method-assign]

    def sleeps(self: Step, index: int, samples: Samples) -> torch.Tensor:
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 6:
            time.sleep(600)
        return batch(self, index, samples)

    calls: list[int] = []
    Step._batch = sleeps  # type: ignore[method-assign]


def poisoned_sample(number: int = 7) -> None:
    """The image of the sample of this id holds no numbers. LeNet's place is taken by a network with BatchNorm."""
    tiny_network()
    batch = Step._batch

    def poisons(self: Step, index: int, samples: Samples) -> torch.Tensor:
        return torch.where((samples.ids == number).view(-1, 1, 1, 1), torch.nan, batch(self, index, samples))

    Step._batch = poisons  # type: ignore[method-assign]


def infinite_loss() -> None:
    """The loss of the shard that has the sample of id 7 is infinite, and its gradient is not."""
    tiny_network()
    forward = Step._forward

    def spoils(self: Step, shard: Shard, step: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, logits = forward(self, shard, step, epoch)
        return (loss_sum + torch.inf if 7 in shard.own.ids else loss_sum), logits

    Step._forward = spoils  # type: ignore[method-assign]


def poisoned_sample_late() -> None:
    """The same, and the loop hears of a step as late as it does with a GPU."""
    poisoned_sample()
    SkippedSteps.lag_steps = 8  # type: ignore[assignment, method-assign]


def slow_steps() -> None:
    """Each step but the first takes two seconds."""
    tiny_network()
    batch = Step._batch
    calls: list[int] = []

    def waits(self: Step, index: int, samples: Samples) -> torch.Tensor:
        calls.append(1)
        time.sleep(2 if len(calls) > 1 else 0)
        return batch(self, index, samples)

    Step._batch = waits  # type: ignore[method-assign]


def endless_step() -> None:
    """The second step never ends; the file `asleep` tells that it has begun."""
    tiny_network()
    batch = Step._batch
    calls: list[int] = []

    def sleeps(self: Step, index: int, samples: Samples) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            Path("asleep").touch()
            time.sleep(600)
        return batch(self, index, samples)

    Step._batch = sleeps  # type: ignore[method-assign]


def late_rank() -> None:
    """Rank 1 takes 0.15 s longer for each batch."""
    tiny_network()
    batch = Step._batch

    def waits(self: Step, index: int, samples: Samples) -> torch.Tensor:
        time.sleep(0.15 if os.environ.get("RANK") == "1" else 0)
        return batch(self, index, samples)

    Step._batch = waits  # type: ignore[method-assign]


def slow_data() -> None:
    """Each block of images takes three seconds longer."""
    tiny_network()
    augmented = loader._augmented

    def waits(samples: Samples, augment: Augment, epoch: int) -> Samples:
        time.sleep(3.0)
        return augmented(samples, augment, epoch)

    loader._augmented = waits


def slow_start() -> None:
    """Reading the data set takes for ever."""

    def waits(*_: object) -> None:
        Path("started").touch()
        time.sleep(600)

    splits.load_splits = waits  # type: ignore[assignment]


def slow_result() -> None:
    """What is done with the result takes nine seconds, of which the other ranks see nothing."""
    tiny_network()
    finished = MetricLogger.finished

    def waits(self: MetricLogger, summary: Mapping[str, Any], weights: Path) -> None:
        time.sleep(9 if os.environ["RANK"] == "0" else 0)
        finished(self, summary, weights)

    MetricLogger.finished = waits  # type: ignore[method-assign]


PLANTS = {
    "idle": idle_weights,
    "slow_result": slow_result,
    "tiny": tiny_network,
    "stuck": stuck_rank,
    "poisoned": poisoned_sample,
    "poisoned_last": lambda: poisoned_sample(1432),
    "infinite_loss": infinite_loss,
    "poisoned_late": poisoned_sample_late,
    "slow": slow_steps,
    "asleep": endless_step,
    "slow_start": slow_start,
    "late": late_rank,
    "slow_data": slow_data,
}
