"""Runs trainer/main.py's main() as a rank in a forked process, with or without a fault in the trainer.

A new Python process imports for six seconds. The fork server imports this module once for all tests. The forked ranks
are as real as torchrun's: separate processes, a gloo group and the launcher's variables.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sklearn.datasets
import torch._dynamo
import torch.distributed.elastic.multiprocessing.errors
import torchvision.models

import trainer.loop
from trainer import build, main, session
from trainer.config.plugins import MODELS
from trainer.config.schema import DataSettings
from trainer.data import digits, loader
from trainer.data.augment import Augment
from trainer.data.dataset import ArrayDataset
from trainer.data.loader import Samples, Shard
from trainer.nonfinite import SkippedSteps
from trainer.run import checkpoint
from trainer.run.watchdog import RankWatchdog, Watchdog
from trainer.step import Step
from trainer.tracking import wandb, wandb_mode
from trainer.tracking.logger import MetricLogger

__all__ = ["sklearn", "torch", "torchvision", "trainer"]  # some are imported only so that forked ranks have them


def become_rank(env: dict[str, str], log: str) -> None:
    """Sets the launcher's variables, redirects stdout and stderr to `log`, and changes to the log's folder."""
    multiprocessing.set_start_method("fork", force=True)  # as in a new process, for DataLoader's workers
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(Path(log).parent)


def run_rank(env: dict[str, str], log: str, argv: list[str], fault: str) -> None:
    """Runs the trainer with the arguments `argv`, then exits. fault: a key of FAULTS, or "" for none."""
    become_rank(env, log)
    sys.argv = ["trainer/main.py", *argv]
    # Many ranks on few cores are slow to connect; tests of these limits use no forked ranks.
    wandb_mode._CONNECT_TIMEOUT_SECONDS = wandb._INIT_TIMEOUT_SECONDS = 60.0
    if fault:
        FAULTS[fault]()
    code = main.main(argv)
    sys.stdout.flush()
    os._exit(code)  # a normal exit would run pytest's exit handlers


def run_rank_of_launcher(env: dict[str, str], log: str, argv: list[str], fault: str) -> None:
    """Runs the trainer as a child of this process, which takes the part of torchrun. The child's pid is in a file."""
    pid = os.fork()
    if not pid:
        Path(log).with_name(f"pid-{env.get('RANK', '0')}").write_text(str(os.getpid()))
        rank_variables = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}
        run_rank(rank_variables | env, log, argv, fault)
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status))


def call_before_images(action: Callable[[int], None]) -> None:
    """Makes Step._prepare_images call `action` first, with the number of the call, from 1."""
    prepare_images = Step._prepare_images
    calls = itertools.count(1)

    def prepare_images_after_action(self: Step, index: int, samples: Samples) -> torch.Tensor:
        action(next(calls))
        return prepare_images(self, index, samples)

    Step._prepare_images = prepare_images_after_action  # type: ignore[method-assign]


def tiny_network() -> None:
    """Replaces LeNet by a network with BatchNorm and dropout."""
    MODELS["lenet"] = "support.workers.tiny:tiny"


def named_dropout() -> None:
    """Replaces LeNet by a network whose dropout is in a module of its own class."""
    MODELS["lenet"] = "support.workers.tiny:with_named_dropout"


def idle_weights() -> None:
    """Adds weights to LeNet: some without any influence on the loss, some that influence it for bright samples only."""
    MODELS["lenet"] = "support.workers.tiny:IdleWeights"


def stuck_rank() -> None:
    """Rank 1 hangs at its sixth batch. Rank 0 never reports a hang, and exits last."""
    tiny_network()
    if os.environ["RANK"] == "0":
        RankWatchdog._find_problem = lambda _: ""  # type: ignore[method-assign]
        answer = RankWatchdog._answer_hang

        def answer_late(self: RankWatchdog) -> None:
            write_log = self._write_log
            self._write_log = lambda line: (time.sleep(2), write_log(line))[1]
            answer(self)

        RankWatchdog._answer_hang = answer_late  # type: ignore[method-assign]
    call_before_images(lambda call: time.sleep(600 if os.environ["RANK"] == "1" and call == 6 else 0))


def other_data() -> None:
    """Rank 1 has a copy of the data set with another label."""
    tiny_network()
    load = digits.load

    def load_with_other_label(data: DataSettings) -> ArrayDataset:
        dataset = load(data)
        dataset.train.labels[3] = 9 - dataset.train.labels[3]
        return dataset

    if os.environ["RANK"] == "1":
        digits.load = load_with_other_label


def nan_image(sample_id: int = 7) -> None:
    """Turns one sample's image into NaN. Replaces LeNet by a network with BatchNorm."""
    tiny_network()
    prepare_images = Step._prepare_images

    def prepare_images_with_nan(self: Step, index: int, samples: Samples) -> torch.Tensor:
        is_bad = (samples.ids == sample_id).view(-1, 1, 1, 1)
        return torch.where(is_bad, torch.nan, prepare_images(self, index, samples))

    Step._prepare_images = prepare_images_with_nan  # type: ignore[method-assign]


def infinite_loss() -> None:
    """Makes the loss, but not the gradient, of the shard with sample 7 infinite."""
    tiny_network()
    forward = Step._forward

    def forward_with_infinite_loss(
        self: Step, shard: Shard, step: int, epoch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_sum, logits = forward(self, shard, step, epoch)
        return (loss_sum + torch.inf if 7 in shard.samples.ids else loss_sum), logits

    Step._forward = forward_with_infinite_loss  # type: ignore[method-assign]


def nan_image_reported_late() -> None:
    """Like nan_image, but the loop reads the flag of a step with a GPU's lag."""
    nan_image()
    SkippedSteps.lag_steps = 8  # type: ignore[assignment, method-assign]


def slow_steps() -> None:
    """Each step except the first takes two more seconds."""
    tiny_network()
    call_before_images(lambda call: time.sleep(2 if call > 1 else 0))


def endless_step() -> None:
    """The second step never ends; it creates the file `asleep` when it begins."""

    def sleep_in_second_step(call: int) -> None:
        if call == 2:
            Path("asleep").touch()
            time.sleep(600)

    tiny_network()
    call_before_images(sleep_in_second_step)


def no_batch() -> None:
    """The third chunk of images never comes; the file `waiting` tells that it is waited for. Chunks have one step."""
    tiny_network()
    loader._CHUNK_BYTES = 1  # type: ignore[misc]
    calls = itertools.count(1)
    fetch = loader._ChunkDataset._fetch

    def fetch_or_wait(self: loader._ChunkDataset, ids: torch.Tensor) -> Samples:
        if next(calls) == 3:
            Path("waiting").touch()
            time.sleep(600)
        return fetch(self, ids)

    loader._ChunkDataset._fetch = fetch_or_wait  # type: ignore[method-assign]


def short_wait() -> None:
    """A start waits for a held run folder for two seconds only."""
    session._FOLDER_WAIT_SECONDS = 2.0


def signal_in_phase() -> None:
    """Rank SIGNAL_RANK sends itself the signal SIGNAL when it enters SIGNAL_PHASE for the third time, or the first
    time if there is only one: a phase of the watchdog, `start` (reading the data set), `writing` (a checkpoint) or
    `end` (after the result). The file `sent` then says so."""
    tiny_network()
    number, phase = signal.Signals[os.environ["SIGNAL"]], os.environ["SIGNAL_PHASE"]
    if os.environ.get("RANK", "0") != os.environ["SIGNAL_RANK"]:
        return
    calls = itertools.count(1)

    def enter(entered: str, is_only: bool = False) -> None:
        if entered == phase and next(calls) == (1 if is_only else 3):
            Path("sent").write_text(f"{number.name} in {phase}")
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    heartbeat, load_splits, write = Watchdog.heartbeat, build.load_splits, checkpoint._write
    log_end = MetricLogger.close

    def heartbeat_after_signal(self: Watchdog, step: int, name: str) -> None:
        enter(name, is_only=name == "result")
        heartbeat(self, step, name)

    def load_splits_after_signal(*arguments: Any) -> Any:
        enter("start", is_only=True)
        return load_splits(*arguments)

    def write_after_signal(*arguments: Any) -> None:
        write(*arguments)
        enter("writing")

    def close_after_signal(self: MetricLogger, failed: bool = False) -> None:
        enter("end", is_only=True)
        log_end(self, failed)

    Watchdog.heartbeat = heartbeat_after_signal  # type: ignore[method-assign]
    build.load_splits = load_splits_after_signal
    checkpoint._write = write_after_signal
    MetricLogger.close = close_after_signal  # type: ignore[method-assign]


def late_rank() -> None:
    """Rank 1 takes 0.15 s longer for each batch."""
    tiny_network()
    call_before_images(lambda call: time.sleep(0.15 if os.environ.get("RANK") == "1" else 0))


def slow_data() -> None:
    """Each chunk of images takes three seconds longer."""
    tiny_network()
    augment_samples = loader._augment_samples

    def augment_slowly(samples: Samples, augment: Augment, epoch: int) -> Samples:
        time.sleep(3.0)
        return augment_samples(samples, augment, epoch)

    loader._augment_samples = augment_slowly


def slow_start() -> None:
    """Reading the data set never ends; it creates the file `started` when it begins."""

    def load_splits_endlessly(*_: object) -> None:
        Path("started").touch()
        time.sleep(600)

    build.load_splits = load_splits_endlessly  # type: ignore[assignment]


def slow_result() -> None:
    """Rank 0 takes nine seconds longer to log its result; the other ranks wait."""
    tiny_network()
    log_summary = MetricLogger.log_summary

    def log_summary_slowly(self: MetricLogger, summary: Mapping[str, Any], weights: Path) -> None:
        time.sleep(9 if os.environ["RANK"] == "0" else 0)
        log_summary(self, summary, weights)

    MetricLogger.log_summary = log_summary_slowly  # type: ignore[method-assign]


FAULTS = {
    "none": lambda: None,
    "tiny": tiny_network,
    "named_dropout": named_dropout,
    "idle_weights": idle_weights,
    "other_data": other_data,
    "nan_image": nan_image,
    "nan_last_image": lambda: nan_image(1432),
    "nan_image_reported_late": nan_image_reported_late,
    "infinite_loss": infinite_loss,
    "stuck_rank": stuck_rank,
    "late": late_rank,
    "slow_start": slow_start,
    "slow_data": slow_data,
    "slow_steps": slow_steps,
    "endless_step": endless_step,
    "no_batch": no_batch,
    "signal_in_phase": signal_in_phase,
    "short_wait": short_wait,
    "slow_result": slow_result,
}
