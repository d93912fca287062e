"""Selects and loads the checkpoint from which a run continues. The result is the same on all ranks."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
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

    Raises FolderError if the checkpoint in run.resume is damaged, has other settings, or lies in this run folder, and
    if a node does not see the checkpoint.
    """
    selected = world.broadcast_from_rank0(lambda: _select(config, folder))
    for message in selected.damage_messages:
        log(message)
    if selected.path is None:
        hosts = world.hosts_where(
            not selected.damage_messages and bool(checkpoint.list_checkpoints(folder.checkpoints))
        )
        if hosts:
            raise FolderError(
                f"run {config.run.name} has checkpoints on {', '.join(hosts)}, but none on {selected.host}, where rank "
                "0 runs; set run.root to a folder that all nodes share"
            )
        return None
    path = folder.checkpoints / selected.path.name if selected.is_own else selected.path  # run.root may differ by node
    if hosts := world.hosts_where(not path.is_dir()):
        raise FolderError(
            f"checkpoint {selected.path} exists on {selected.host}, but not on {', '.join(hosts)}; set run.root to a "
            "folder that all nodes share"
        )
    state = world.raise_together(lambda: _load(path, config, world.precision))
    if not selected.is_own:
        state.progress.wandb_run_id = ""  # a new run gets a W&B run of its own
    return state


def find_start(config: RunConfig, folder: RunFolder) -> tuple[Path, Progress] | None:
    """Returns the checkpoint that load_checkpoint_to_resume() would load, without its weights; None for a new run.

    Raises FolderError as that function does, but not for other nodes.
    """
    path = _select(config, folder).path
    if path is None:
        return None
    progress = checkpoint.load_progress(path)
    is_auto = config.train.precision == "auto"  # depends on the machine that trains
    _check_progress(path, progress, config, progress.precision if is_auto else config.train.precision)
    return path, progress


@dataclass(frozen=True, slots=True)
class _Selected:
    """What rank 0 selects."""

    path: Path | None
    is_own: bool
    """whether the checkpoint lies in the folder of this run"""
    damage_messages: list[str]
    """one for each damaged checkpoint that was skipped"""
    host: str


def _select(config: RunConfig, folder: RunFolder) -> _Selected:
    """Raises FolderError if run.resume has no checkpoint, or lies in the folder of this run."""
    host = socket.gethostname()
    path, damage_messages = checkpoint.find_newest_valid(folder.checkpoints)
    if config.run.resume in ("auto", "never"):
        return _Selected(path, True, damage_messages, host)
    resume_path = Path(config.run.resume).expanduser()
    if folder.path.resolve() in (resume_path.resolve(), resume_path.resolve().parent.parent):
        raise FolderError(
            f"run.resume={config.run.resume} belongs to this run, which always continues from its newest "
            "checkpoint; choose another run.name to start a new run from it"
        )
    if path is not None:
        return _Selected(path, True, damage_messages, host)
    return _Selected(*_find_in(resume_path), host)


def _find_in(path: Path) -> tuple[Path, bool, list[str]]:
    """Returns a checkpoint, or the newest valid one of a run folder. Raises FolderError if there is none."""
    if (path / checkpoint.MANIFEST).is_file():
        return path, False, []
    newest, damage_messages = checkpoint.find_newest_valid(path / "checkpoints")
    if newest is None:
        problem = (
            damage_messages[0] if damage_messages else "no checkpoint in it" if path.is_dir() else "no such folder"
        )
        raise FolderError(
            f"run.resume={path}: {problem}; expected a run folder with a checkpoint, or a checkpoint such as "
            "runs/NAME/checkpoints/step-00000100"
        )
    return newest, False, damage_messages


def _load(path: Path, config: RunConfig, precision: str) -> TrainingState:
    state = checkpoint.load(path)
    _check_progress(path, state.progress, config, precision)
    return state


def _check_progress(path: Path, progress: Progress, config: RunConfig, precision: str) -> None:
    """Raises FolderError if a checkpoint belongs to other settings or another precision."""
    changed = changed_settings(progress.settings, config)
    if changed:
        raise FolderError(f"checkpoint {path} has other settings ({changed}); use the same settings to continue it")
    if progress.precision not in ("", precision):
        raise FolderError(
            f"checkpoint {path} was trained with precision {progress.precision}, but "
            f"train.precision={config.train.precision} selects {precision} on this machine; "
            "continue on a machine of the same kind"
        )
