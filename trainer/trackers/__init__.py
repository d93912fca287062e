"""What a run tells in: JSON lines, TensorBoard event files and a W&B run out. Rank 0 has these; others have Tracker."""

import os
import secrets
from collections.abc import Callable

from trainer.errors import UserError
from trainer.folder import RunFolder
from trainer.settings import RunConfig
from trainer.trackers.event_files import TensorBoard
from trainer.trackers.lines import Metrics
from trainer.trackers.tracker import Tracker
from trainer.trackers.wandb_run import WandB


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


def build(
    config: RunConfig, folder: RunFolder, first_step: int, run_id: str, say: Callable[[str], None]
) -> list[Tracker]:
    """The trackers that the settings ask for, the one that others read first; run_id: of the W&B run; `say` prints a
    line for the user."""
    trackers: list[Tracker] = [Metrics(folder.metrics, say)]
    if config.log.wandb != "off" and os.environ.get("WANDB_MODE") != "disabled":
        trackers.append(WandB(config, folder, run_id, say))  # before TensorBoard: it alone can refuse
    if config.log.tensorboard:
        trackers.append(TensorBoard(folder.path / "tensorboard", first_step, say))
    return trackers
