"""What a run tells in: JSON lines, TensorBoard event files and a W&B run out. Rank 0 has these; others have Tracker."""

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


def wandb_run_id(config: RunConfig, folder: RunFolder, of_checkpoint: str) -> str:
    """That of the folder, else of the checkpoint from which the run goes on, else a new one; empty without W&B, where
    the checkpoint has none either. Kept in the folder. Raises UserError, and OSError."""
    is_disabled = os.environ.get("WANDB_MODE") == "disabled"
    if is_disabled and config.log.wandb == "online":
        raise UserError("log.wandb=online: WANDB_MODE=disabled forbids it; unset that, or set log.wandb=off")
    if config.log.wandb == "off" or is_disabled:
        return of_checkpoint
    path = folder.path / "wandb" / "run-id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(of_checkpoint or secrets.token_hex(4))
    return path.read_text().strip()


def build_trackers(
    config: RunConfig, folder: RunFolder, first_step: int, run_id: str, log: Callable[[str], None]
) -> list[Tracker]:
    """The trackers that the settings ask for, the one that others read first; run_id: of the W&B run; `say` prints a
    line for the user."""
    trackers: list[Tracker] = [MetricsFile(folder.metrics, log)]
    if config.log.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        trackers.append(WandbTracker(config, folder, run_id, log))  # before TensorBoard: it alone can refuse
    if config.log.tensorboard:
        trackers.append(TensorBoardTracker(folder.path / "tensorboard", first_step, log))
    return trackers
