"""Builds the trackers of rank 0: metrics.jsonl, W&B and TensorBoard."""

import contextlib
import os
import re
import secrets
from collections.abc import Callable

from trainer.config.schema import RunConfig
from trainer.errors import UserError
from trainer.run.folder import RunFolder
from trainer.run.record import RunRecord
from trainer.tracking.jsonl import MetricsFile
from trainer.tracking.tensorboard import TensorBoardTracker
from trainer.tracking.tracker import GuardedTracker, Tracker, describe_failure
from trainer.tracking.wandb import WandbTracker
from trainer.tracking.wandb_mode import resolve_mode


def wandb_run_id(config: RunConfig, folder: RunFolder, checkpoint_run_id: str) -> str:
    """Returns the W&B id of the run: from the run folder, the checkpoint or WANDB_RUN_ID, else a new id.

    In a trial of a W&B sweep it is WANDB_RUN_ID: W&B accepts no other one. Stores the id in the run folder; if that
    fails, the checkpoints have it. With W&B off it returns checkpoint_run_id, which may be empty.
    Raises UserError as resolve_mode, for an unusable WANDB_RUN_ID, and for a damaged file of the id.
    """
    if resolve_mode(config.log.wandb) == "off":
        return checkpoint_run_id
    path = folder.path / "wandb" / "run-id"
    variable = os.environ.get("WANDB_RUN_ID", "")
    is_trial = bool(variable and os.environ.get("WANDB_SWEEP_ID"))
    if not is_trial and path.is_file() and (stored_id := RunRecord(folder.path).wandb_id):
        return stored_id
    if variable and not re.fullmatch(r"[\w.-]{1,64}", variable, re.ASCII):
        raise UserError(
            "WANDB_RUN_ID: expected up to 64 letters, digits, dots and hyphens; correct it, or run: unset WANDB_RUN_ID"
        )
    run_id = (variable if is_trial else checkpoint_run_id or variable) or secrets.token_hex(4)
    with contextlib.suppress(OSError):  # W&B itself reports a folder that it cannot use
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(run_id)
    return run_id


def build_trackers(
    config: RunConfig, folder: RunFolder, first_step: int, run_id: str, log: Callable[[str], None]
) -> list[Tracker]:
    """Returns the trackers that the settings select. metrics.jsonl comes first, because other trackers read it.

    Leaves out a tracker that fails for a reason that is not in the settings, and prints one line about it.

    run_id: id of the W&B run. log: prints a line for the user. Raises UserError if W&B refuses the settings.
    """
    trackers: list[Tracker] = [MetricsFile(folder.metrics, log)]

    def add(name: str, build: Callable[[], Tracker]) -> None:
        try:
            trackers.append(GuardedTracker(name, build(), log))
        except UserError:
            raise
        except Exception as error:  # every error, as in GuardedTracker
            log(describe_failure(name, error))

    if resolve_mode(config.log.wandb) != "off":
        # Before TensorBoard: only W&B can refuse to start.
        add("W&B", lambda: WandbTracker(config, folder, run_id, log))
    if config.log.tensorboard:
        add("TensorBoard", lambda: TensorBoardTracker(folder.path / "tensorboard", first_step, log))
    return trackers
