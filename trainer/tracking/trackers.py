"""Builds the trackers of rank 0: metrics.jsonl, W&B and TensorBoard."""

import os
import secrets
from collections.abc import Callable

from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.run.folder import RunFolder
from trainer.tracking.jsonl import MetricsFile
from trainer.tracking.tensorboard import TensorBoardTracker
from trainer.tracking.tracker import Tracker
from trainer.tracking.wandb import WandbTracker


def wandb_run_id(config: RunConfig, folder: RunFolder, checkpoint_run_id: str) -> str:
    """Returns the W&B id of the run: from the run folder, else from the checkpoint, else a new id.

    Stores the id in the run folder. With W&B off it returns checkpoint_run_id, which may be empty.
    Raises UserError if log.wandb=online contradicts WANDB_MODE=disabled, and OSError if the id cannot be stored.
    """
    is_disabled = os.environ.get("WANDB_MODE") == "disabled"
    if is_disabled and config.log.wandb == "online":
        raise UserError("log.wandb=online: WANDB_MODE=disabled forbids it; unset WANDB_MODE, or set log.wandb=off")
    if config.log.wandb == "off" or is_disabled:
        return checkpoint_run_id
    path = folder.path / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(checkpoint_run_id or secrets.token_hex(4))
    return path.read_text().strip()


def build_trackers(
    config: RunConfig, folder: RunFolder, first_step: int, run_id: str, log: Callable[[str], None]
) -> list[Tracker]:
    """Returns the trackers that the settings select. metrics.jsonl comes first, because other trackers read it.

    run_id: id of the W&B run. log: prints a line for the user. Raises UserError if W&B refuses the settings.
    """
    trackers: list[Tracker] = [MetricsFile(folder.metrics, log)]
    if config.log.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        trackers.append(WandbTracker(config, folder, run_id, log))  # before TensorBoard: only W&B can refuse to start
    if config.log.tensorboard:
        trackers.append(TensorBoardTracker(folder.path / "tensorboard", first_step, log))
    return trackers
