"""Selects and loads the checkpoint from which a run continues. The result is the same on all ranks."""

from collections.abc import Callable
from pathlib import Path

from trainer.config.changes import changed_settings
from trainer.config.schema import RunConfig
from trainer.distributed.world import World
from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.folder import RunFolder


def load_checkpoint_to_resume(
    config: RunConfig, folder: RunFolder, world: World, log: Callable[[str], None]
) -> TrainingState | None:
    """Returns the newest valid checkpoint of this run, else the one in run.resume, else None. Logs damaged ones.

    Raises FolderError if the checkpoint in run.resume is damaged, has other settings, or lies in this run folder.
    """
    path, damage_messages = world.broadcast_from_rank0(lambda: checkpoint.find_newest_valid(folder.checkpoints))
    for message in damage_messages:
        log(message)
    path = path or _named_checkpoint(config, folder)
    if path is None:
        return None
    state = world.raise_together(lambda: _load(path, config, world.precision))
    if not _is_inside(path, folder):
        state.progress.wandb_run_id = ""  # a new run gets a W&B run of its own
    return state


def check_resume_path(config: RunConfig, folder: RunFolder) -> None:
    """Raises FolderError if run.resume names a checkpoint from which this run cannot start. Loads no weights."""
    path = _named_checkpoint(config, folder)
    if path is not None and checkpoint.find_newest_valid(folder.checkpoints)[0] is None:
        progress = checkpoint.load_progress(path)
        is_auto = config.train.precision == "auto"  # depends on the machine that trains
        _check_progress(path, progress, config, progress.precision if is_auto else config.train.precision)


def _named_checkpoint(config: RunConfig, folder: RunFolder) -> Path | None:
    """Returns the checkpoint that run.resume names, or None. Raises FolderError for one of this run."""
    if config.run.resume in ("auto", "never"):
        return None
    path = Path(config.run.resume).expanduser()
    if _is_inside(path, folder):
        raise FolderError(
            f"run.resume={config.run.resume} is a checkpoint of this run, which always continues from its newest "
            "checkpoint; choose another run.name to start a new run from it"
        )
    return path


def _is_inside(path: Path, folder: RunFolder) -> bool:
    return path.resolve().parent == folder.checkpoints.resolve()


def _load(path: Path, config: RunConfig, precision: str) -> TrainingState:
    state = checkpoint.load(path)
    _check_progress(path, state.progress, config, precision)
    return state


def _check_progress(path: Path, progress: Progress, config: RunConfig, precision: str) -> None:
    """Raises FolderError if a checkpoint belongs to other settings or another precision."""
    changed = changed_settings(progress.settings | {"run.name": config.run.name}, config)
    if changed:
        raise FolderError(f"checkpoint {path} has other settings ({changed}); use the same settings to continue it")
    if progress.precision not in ("", precision):
        raise FolderError(
            f"checkpoint {path} was trained with precision {progress.precision}, but "
            f"train.precision={config.train.precision} selects {precision} on this machine; "
            "continue on a machine of the same kind"
        )
