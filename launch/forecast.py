"""The settings and a layout of ranks in, what the run will be out: slices, steps, learning rate, folder. No torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config.durations import Durations, steps_per_epoch
from trainer.config.load import find_config_file, load_config
from trainer.config.schema import RunConfig
from trainer.config.validate import check_pretrained_file, check_ranks
from trainer.errors import DataError
from trainer.optim.schedule import Schedule
from trainer.run.folder import RunFolder


@dataclass(frozen=True, slots=True)
class RankLayout:
    """Who computes."""

    nodes: int
    ranks_per_node: int
    device: str
    """gpu or cpu"""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        ranks = f"{self.ranks_per_node} {self.device} rank{'s' if self.ranks_per_node > 1 else ''}"
        return f"{self.nodes} nodes x {ranks}" if self.nodes > 1 else ranks


def load_settings(files: Sequence[str], overrides: Sequence[str]) -> RunConfig:
    """The settings as trainer/main.py will read them. Raises ConfigError, before anything is started."""
    return load_config([find_config_file(name) for name in files or ["cifar10"]], overrides)


def check(config: RunConfig, world_size: int) -> None:
    """Raises UserError for what can be known before a rank is started, or a job waits a night in a queue."""
    check_ranks(config, world_size)
    images = _training_images(config)
    if config.data.global_batch_size > images:
        raise DataError(
            f"data.global_batch_size={config.data.global_batch_size} is larger than the training set "
            f"of {images} images; lower it"
        )
    folder, weights = RunFolder(config.folder), config.model.pretrained
    folder.fits(config)
    if weights and weights != "hub" and folder.read_json("status.json") is None:  # one that goes on has its own
        check_pretrained_file(config.model, Path(weights).expanduser())


def facts(config: RunConfig, layout: RankLayout) -> tuple[tuple[str, str], ...]:
    """A name and a text each, for people. Raises DataError when the data set's size cannot be known."""
    images = _training_images(config)
    batch = config.data.global_batch_size
    durations = Durations.of(config, steps_per_epoch(images, batch, config.data.drop_last))
    epochs = durations.total_steps / durations.steps_per_epoch
    return (
        ("ranks", str(layout)),
        ("model", f"{config.model.name} on {config.data.name}, {images:,} training images"),
        ("global batch", f"{batch:,} samples = {_slices(batch, layout.world_size)}{_virtual(config)}"),
        ("steps", f"{durations.steps_per_epoch:,} an epoch, {durations.total_steps:,} in all ({epochs:g} epochs)"),
        ("learning rate", ", ".join(_course(config, durations))),
        ("run folder", f"{config.folder} ({_state(config.folder)})"),
    )


def _training_images(config: RunConfig) -> int:
    from trainer.data.registry import count_training_images  # late: 0.1 s

    return count_training_images(config.data)


def _slices(batch: int, ranks: int) -> str:
    """How many samples of a whole global batch each rank has, in as few words as can be."""
    small, more = divmod(batch, ranks)
    if not more:
        return f"{ranks} x {small}" if ranks > 1 else "1 slice"
    return f"{more} x {small + 1} + {ranks - more} x {small}"


def _virtual(config: RunConfig) -> str:
    shards = config.train.virtual_ranks
    return "" if shards is None else f", in {shards} virtual ranks: the same bits on any number of ranks"


def _course(config: RunConfig, durations: Durations) -> Iterator[str]:
    """The learning rate at the first step, the end of the warmup, the middle and the last step."""
    schedule = Schedule(config.schedule.name, durations.warmup_steps, durations.total_steps)
    last = durations.total_steps - 1
    yield config.schedule.name
    for step in sorted({0, min(durations.warmup_steps, last), durations.total_steps // 2, last}):
        yield f"{config.optim.lr * schedule.lr_factor(step):.4g} at step {step + 1:,}"
    for name, rate in config.optim.lr_of_parts.items():
        yield f"{name} {rate / config.optim.lr:.4g} times that"


def _state(folder: Path) -> str:
    """What is there already."""
    status = RunFolder(folder).read_json("status.json")
    if status is None:
        return "new"
    if status["state"] == "finished":
        return f"finished at step {status['step']:,}; it is shown, not trained again"
    return f"goes on with the run that {'is on there' if status['state'] == 'running' else status['state']}"
