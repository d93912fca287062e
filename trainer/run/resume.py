"""The run folder in, the checkpoint to go on from out, if there is one; the same on every rank."""

from collections.abc import Callable
from pathlib import Path

from trainer.config.changes import changed_settings
from trainer.config.schema import RunConfig
from trainer.distributed.world import World
from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import TrainingState
from trainer.run.folder import RunFolder


def load_checkpoint_to_resume(
    config: RunConfig, folder: RunFolder, world: World, log: Callable[[str], None]
) -> TrainingState | None:
    """The newest of this run that verifies, else the one that run.resume names. Damaged ones are named by `say`.

    Raises FolderError when the named one is damaged, of other settings, or of this run itself.
    """
    place, damaged = world.broadcast_from_rank0(lambda: checkpoint.newest_valid(folder.checkpoints))
    for line in damaged:
        log(line)
    if config.run.resume not in ("auto", "never"):
        named = Path(config.run.resume).expanduser()
        if named.resolve().parent == folder.checkpoints.resolve():
            raise FolderError(
                f"run.resume={config.run.resume} lies in this run's own folder, which goes on from its newest one; "
                "choose another run.name to branch off"
            )
        place = place or named
    saved = world.raise_together(lambda: _load(place, config, world.precision)) if place is not None else None
    if saved is not None and place is not None and place.resolve().parent != folder.checkpoints.resolve():
        saved.progress.wandb_run_id = ""  # a branch has rows of its own
    return saved


def _load(place: Path, config: RunConfig, precision: str) -> TrainingState:
    saved = checkpoint.load(place)
    changed = changed_settings(saved.progress.settings | {"run.name": config.run.name}, config)
    if changed:
        raise FolderError(f"checkpoint {place} was made with other settings ({changed}); give the same ones")
    if saved.progress.precision not in ("", precision):
        raise FolderError(
            f"checkpoint {place} was trained in {saved.progress.precision}, and here "
            f"train.precision={config.train.precision} means {precision}; go on with it on a machine like that"
        )
    return saved
