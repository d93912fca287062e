"""Saves checkpoints while training goes on: the loop is held for a copy of the state, a thread writes it.

One save is in flight at a time; the next one waits for it. A save that fails costs nothing but itself: it is told, the
checkpoints before it stay, and the next one that is due is tried as ever.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.files import DISK_ERRORS, error_reason, write_error
from trainer.run.folder import RunFolder

_FIRST_GUESS_SECONDS = 1.0  # until a save has been timed


class CheckpointWriter(Protocol):
    seconds: float
    """what the slowest save has taken so far, from the copy to the disk"""

    def save(self, state: TrainingState, best_step: int | None) -> None:
        """Takes a copy and returns; best_step: a checkpoint to be kept besides the newest ones."""

    def wait(self) -> None:
        """Waits for the save in flight; whether it went well is told by then."""

    def finish(self) -> None:
        """The same. Raises FolderError when the last one failed, for want of room or the like."""


class NullCheckpointWriter:
    """What every rank but the first is given."""

    seconds = 0.0

    def save(self, state: TrainingState, best_step: int | None) -> None: ...
    def wait(self) -> None: ...
    def finish(self) -> None: ...


class BackgroundCheckpointWriter:
    def __init__(
        self, folder: RunFolder, keep: int, begun: Progress, flush: Callable[[], None], log: Callable[[str], None]
    ) -> None:
        """begun: where the run begins or goes on; flush: puts all rows so far on the disk, or raises OSError."""
        self._folder, self._keep, self._flush, self._log = folder, keep, flush, log
        self._snapshot = Snapshot()
        self._writing: Thread | None = None
        self._problem: BaseException | None = None
        self._written_step = begun.step if begun.step else -1
        self._best_step = begun.best.step if begun.best else -1
        self._sound: dict[str, bool] = {}
        self._timed = False
        self.seconds = _FIRST_GUESS_SECONDS

    def save(self, state: TrainingState, best_step: int | None) -> None:
        self.wait()
        if self._problem is not None and not isinstance(self._problem, FolderError):  # that one is told already
            raise self._problem
        if state.progress.step == self._written_step:
            return
        began = time.perf_counter()
        copied = self._snapshot.take(state)
        self._writing = Thread(target=self._write, args=(copied, best_step, began), name="checkpoint")
        self._writing.start()

    def finish(self) -> None:
        self.wait()
        if self._problem is not None:
            raise self._problem

    def wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _write(self, state: TrainingState, best_step: int | None, began: float) -> None:
        """In the thread. A failure is told here; the last one of a run is also raised, by finish()."""
        step, folder = state.progress.step, self._folder
        what = f"checkpoint of step {step:,} in {folder.checkpoints}"
        self._problem = None
        try:
            if folder.made_anew():
                self._log(f"run folder {folder.path} had been removed while the run was on; it is made anew")
            # A run that goes on from here writes no row again: a machine that loses power must not lose one.
            self._flush()
            place = checkpoint.save(folder.checkpoints, state)
            self._written_step = step
        except (*DISK_ERRORS, FolderError) as error:
            self._problem = error if isinstance(error, FolderError) else write_error(what, error)
            self._log(
                f"{what} was not written ({error_reason(error)}); training goes on, the next one due is tried as ever"
            )
        except BaseException as error:  # a defect: raised in the main thread, by the next save or at the end
            self._problem = error
            self._log(f"{what} was not written, by a defect: {error!r}")
        else:
            self._tidy(place, best_step)
        seconds = time.perf_counter() - began
        self.seconds = max(self.seconds, seconds) if self._timed else seconds
        self._timed = True

    def _tidy(self, place: Path, best_step: int | None) -> None:
        """Older ones go; the last best one that was written stays until there is a better one."""
        if best_step is not None and (self._folder.checkpoints / checkpoint.folder_name(best_step)).is_dir():
            self._best_step = best_step
        try:
            checkpoint.prune(self._folder.checkpoints, self._keep, place, {self._best_step}, self._sound)
            self._folder.status("running", self._written_step)
        except OSError as error:
            self._log(f"after {place.name} was written, {self._folder.path} cannot be tidied ({error_reason(error)})")


class Snapshot:
    """Copies a state into memory of its own, so that it can be written while training changes the original."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> TrainingState:
        """The state as it is now. The copy before is written over: the memory is used again."""
        model = {name: self._copy(f"model.{name}", tensor) for name, tensor in state.model.items()}
        entries = {
            index: {
                name: self._copy(f"{index}.{name}", value) if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for index, entry in state.optimizer["state"].items()
        }
        groups = copy.deepcopy(state.optimizer["param_groups"])
        optimizer = {"state": entries, "param_groups": groups}
        if any(tensor.is_cuda for tensor in state.model.values()):
            torch.cuda.current_stream().synchronize()
        return TrainingState(model, optimizer, dict(state.scaler), copy.deepcopy(state.progress), state.metadata)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name] = memory
        return memory.copy_(tensor.detach(), non_blocking=True)
