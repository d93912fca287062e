"""Checks settings against a layout of ranks and forecasts the run: slices, steps, learning rates, run folder.

Imports no torch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.durations import Durations, steps_per_epoch
from trainer.config.load import find_config_file, load_config
from trainer.config.schema import RunConfig
from trainer.config.validate import check_precision, check_ranks
from trainer.distributed.sharding import split_evenly
from trainer.optim.schedule import Schedule
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord


@dataclass(frozen=True, slots=True)
class RankLayout:
    """The number of nodes and ranks of a run, and their device."""

    nodes: int
    ranks_per_node: int
    device: str
    """gpu or cpu"""

    @property
    def world_size(self) -> int:
        """Returns the number of ranks on all nodes."""
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        ranks = f"{self.ranks_per_node} {self.device} rank{'s' if self.ranks_per_node > 1 else ''}"
        return f"{self.nodes} nodes x {ranks}" if self.nodes > 1 else ranks


def load_settings(files: Sequence[str], overrides: Sequence[str]) -> RunConfig:
    """Returns the settings that trainer/main.py will load for the same arguments. Raises ConfigError."""
    return load_config([find_config_file(name) for name in files or ["cifar10"]], overrides)


def check_run(config: RunConfig, layout: RankLayout) -> None:
    """Raises UserError for problems that show before a rank starts, so that a job does not fail after hours in a queue.

    Checks the ranks, the global batch and the run folder, in milliseconds. launch/preflight.py also checks what needs
    torch.
    """
    from trainer.data.image_counts import check_batch_size  # lazy import: 0.1 s

    check_ranks(config, layout.world_size)
    precision = config.train.precision
    check_precision(precision, on_gpu=layout.device == "gpu", source=f"train.precision={precision}")
    check_batch_size(config.data, _count_training_images(config))
    folder = RunFolder(config.folder)
    folder.check_settings(config)
    folder.check_writable()


def describe_run(config: RunConfig, layout: RankLayout) -> tuple[tuple[str, str], ...]:
    """Returns the forecast of a run as (name, text). Raises DataError if the number of images cannot be determined."""
    num_images = _count_training_images(config)
    batch_size = config.data.global_batch_size
    durations = Durations.from_config(config, steps_per_epoch(num_images, batch_size, config.data.drop_last))
    epochs = durations.total_steps / durations.steps_per_epoch
    slices = _describe_slices(batch_size, layout.world_size, config.train.virtual_ranks)
    return (
        ("ranks", str(layout)),
        ("model", f"{config.model.name} on {config.data.name}, {num_images:,} training images"),
        ("global batch", f"{batch_size:,} samples = {slices}{_describe_virtual_ranks(config)}"),
        ("steps", f"{durations.steps_per_epoch:,} per epoch, {durations.total_steps:,} in total ({epochs:g} epochs)"),
        ("learning rate", ", ".join(_describe_learning_rates(config, durations))),
        ("run folder", f"{config.folder} ({_describe_state(config.folder, durations.total_steps)})"),
    )


def _count_training_images(config: RunConfig) -> int:
    from trainer.data.image_counts import count_training_images  # lazy import: 0.1 s

    return count_training_images(config.data)


def _describe_slices(global_batch_size: int, world_size: int, virtual_ranks: int | None) -> str:
    """Describes the samples of each rank, such as "8 x 64" or "2 x 171 + 1 x 170". Whole shards belong to one rank."""
    if world_size == 1:
        return "1 slice"
    bounds = split_evenly(global_batch_size, virtual_ranks or world_size)
    counts = Counter(
        sum(end - start for start, end in bounds[first:last]) for first, last in split_evenly(len(bounds), world_size)
    )
    return " + ".join(f"{counts[size]} x {size}" for size in sorted(counts, reverse=True))


def _describe_virtual_ranks(config: RunConfig) -> str:
    shards = config.train.virtual_ranks
    return "" if shards is None else f", in {shards} virtual ranks: bit-identical on any number of ranks"


def _describe_learning_rates(config: RunConfig, durations: Durations) -> Iterator[str]:
    """Yields the schedule, and the learning rate at the first step, the end of the warmup, the middle and the end."""
    schedule = Schedule.from_config(config, durations)
    last_step = durations.total_steps - 1
    yield config.schedule.name
    for step in sorted({0, min(durations.warmup_steps, last_step), durations.total_steps // 2, last_step}):
        yield f"{config.optim.lr * schedule.lr_factor(step):.4g} at step {step + 1:,}"
    for name, rate in config.optim.lr_by_part.items():
        yield f"{name} {rate / config.optim.lr:.4g} times that"


def _describe_state(path: Path, total_steps: int) -> str:
    """Describes what the run will do with the run folder."""
    status = RunRecord(path).status
    if not status:
        return "new"
    if status["state"] == "finished":
        if status["step"] < total_steps:
            return f"finished at step {status['step']:,}; continues to step {total_steps:,}"
        return f"finished at step {status['step']:,}; its results are shown, it is not trained again"
    return f"continues the run, whose state is {status['state']}"
