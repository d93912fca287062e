"""Settings that may change while a run is unfinished, and the differences between two sets of settings. No torch."""

from typing import Any

from trainer.config.load import flatten
from trainer.config.schema import RunConfig

# Settings that an unfinished run may be continued with in another value: they do not change what it has done so far.
MAY_CHANGE = {
    "run.root", "run.resume", "data.root", "data.download", "data.cache_dir", "data.workers",
    "train.epochs", "train.max_steps", "train.device", "train.threads_per_rank", "train.compile",
    "train.max_bad_steps", "train.time_limit", "train.hang_timeout_seconds", "train.profile",
    "eval.every_epochs", "eval.batch_size",
    "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.keep",
    "log.every_steps", "log.tensorboard", "log.wandb", "log.project", "log.report", "log.figures",
    "log.feature_maps", "log.alerts", "log.artifact",
    "log.group", "log.tags", "log.job_type", "log.notes",
}  # fmt: skip


def changed_settings(before: dict[str, Any], config: RunConfig) -> str:
    """The settings that may not change and did, with both values; empty when there are none."""
    return "; ".join(
        f"{name} was {before[name]}, now {value}"
        for name, value in flatten(config).items()
        if name not in MAY_CHANGE and name in before and before[name] != value
    )
