"""Writes checkpoints in a background thread while training continues. Training pauses only while the
state is copied.

One save runs at a time; the next one waits for it. If a save fails, the writer logs the reason and keeps the earlier
checkpoints, and the next save that is due is attempted normally. On a full disk, older checkpoints give way, but never
the newest valid one.
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from trainer.errors import FolderError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.files import DISK_ERRORS, error_reason, is_disk_full, write_error
from trainer.run.folder import RunFolder

T = TypeVar("T")

_FIRST_ESTIMATE_SECONDS = 1.0  # until the first save has been timed


class CheckpointWriter(Protocol):
    slowest_save_seconds: float
    """the longest save so far, including the copy; an estimate until the first one ends"""
    is_last_saved: bool
    """False after finish() if the last checkpoint did not fit on the disk"""

    def save(self, state: TrainingState, best_step: int | None) -> None:
        """Copies the state and starts to write it. best_step: step of the best checkpoint, which
        is kept besides the newest ones; None: there is none.
        """

    def wait(self) -> None:
        """Waits until the current save has succeeded, or has failed and logged why."""

    def finish(self, has_final_weights: bool = False) -> None:
        """Waits for the current save. Raises FolderError if it failed, for example on a full disk.

        has_final_weights: model.safetensors is on the disk. Then a checkpoint that does not fit raises no error, if all
        rows of the trackers are on the disk, too; the older ones stay.
        """

    def write_with_room(self, write: Callable[[], object]) -> None:
        """Calls `write`, on a full disk again and again, each time without one more of the older checkpoints.

        Raises the last error of `write` when only the newest valid checkpoint is left.
        """


class NullCheckpointWriter:
    """Writes nothing. For every rank except rank 0."""

    slowest_save_seconds = 0.0
    is_last_saved = True

    def save(self, state: TrainingState, best_step: int | None) -> None: ...
    def wait(self) -> None: ...
    def finish(self, has_final_weights: bool = False) -> None: ...
    def write_with_room(self, write: Callable[[], object]) -> None: ...


class BackgroundCheckpointWriter:
    """Rank 0's writer, with a thread for each save."""

    def __init__(
        self,
        folder: RunFolder,
        keep: int,
        progress: Progress,
        flush_rows: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """keep: how many of the newest checkpoints to keep.
        progress: the progress that this session starts from; at step 0 for a new run.
        flush_rows: flushes the rows of all trackers to disk; raises OSError.
        """
        self._folder, self._keep, self._flush_rows, self._log = folder, keep, flush_rows, log
        self._snapshot = Snapshot()
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._unsaved: tuple[TrainingState, int | None] | None = None  # did not fit on a full disk
        self._last_step = progress.step
        self._written_step = progress.step if progress.step else -1  # -1: none
        self._best_step = progress.best.step if progress.best else -1
        self._validity_by_name: dict[str, bool] = {}
        self._has_timed_save = False
        self.slowest_save_seconds = _FIRST_ESTIMATE_SECONDS
        self.is_last_saved = True

    def save(self, state: TrainingState, best_step: int | None) -> None:
        self.wait()
        if self._error is not None and not isinstance(self._error, FolderError):  # _write has logged a FolderError
            raise self._error
        if state.progress.step == self._written_step:
            return
        start = time.perf_counter()
        snapshot = self._snapshot.take(state)
        self._thread = Thread(target=self._write, args=(snapshot, best_step, start), name="checkpoint")
        self._thread.start()

    def finish(self, has_final_weights: bool = False) -> None:
        self.wait()
        if self._unsaved is not None and has_final_weights and self._has_flushed_rows():
            self._write(*self._unsaved, time.perf_counter(), is_needed=False)
            if self._unsaved is not None:
                self._error, self.is_last_saved = None, False
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def write_with_room(self, write: Callable[[], object]) -> None:
        self.wait()
        self._write_with_room(write)

    def _write_with_room(self, write: Callable[[], T]) -> T:
        while True:
            try:
                return write()
            except DISK_ERRORS as error:
                if not is_disk_full(error):
                    raise
                removed = checkpoint.remove_oldest(
                    self._folder.checkpoints, self._last_step, 1, self._best_step, self._validity_by_name
                )
                if removed is None:
                    raise
                self._log(f"the disk is full; removed the older checkpoint {removed} to make room")

    def _write(self, state: TrainingState, best_step: int | None, start: float, is_needed: bool = True) -> None:
        """Runs in the thread. Logs an error at once and stores it for finish() to raise.

        is_needed: the result of the run is not on the disk yet.
        """
        self._last_step = step = state.progress.step
        folder = self._folder
        name = f"checkpoint of step {step:,} in {folder.checkpoints}"
        self._error = self._unsaved = None
        try:
            if folder.restore_if_removed():
                self._log(f"run folder {folder.path} was removed during the run; created it again")
            path = self._write_with_room(lambda: self._save(state))
            self._written_step = step
        except (*DISK_ERRORS, FolderError) as error:
            self._unsaved = (state, best_step) if is_disk_full(error) else None
            self._error = error if isinstance(error, FolderError) else write_error(name, error)
            effect = "training continues"
            if not is_needed:
                effect = f"the run is complete without it; a longer run would continue from {self._newest_name()}"
            self._log(f"{name} was not written ({error_reason(error)}); {effect}")
        except BaseException as error:  # a bug: the next save() or finish() raises it in the main thread
            self._error = error
            self._log(f"{name} was not written because of a bug in samecurve: {error!r}")
        else:
            self._prune(path, best_step)
        seconds = time.perf_counter() - start
        self.slowest_save_seconds = max(self.slowest_save_seconds, seconds) if self._has_timed_save else seconds
        self._has_timed_save = True

    def _newest_name(self) -> str:
        newest, _ = checkpoint.find_newest_valid(self._folder.checkpoints)
        return "the first step" if newest is None else newest.name

    def _has_flushed_rows(self) -> bool:
        try:
            self._flush_rows()
        except DISK_ERRORS:
            return False
        return True

    def _save(self, state: TrainingState) -> Path:
        # Rows before the checkpoint: a run that resumes from it does not log them again, so they must be on disk.
        self._flush_rows()
        return checkpoint.save(self._folder.checkpoints, state)

    def _prune(self, newest: Path, best_step: int | None) -> None:
        """Removes old checkpoints. Keeps the best checkpoint until a better one has been written."""
        if best_step is not None and (self._folder.checkpoints / checkpoint.folder_name(best_step)).is_dir():
            self._best_step = best_step
        try:
            checkpoint.prune(self._folder.checkpoints, self._keep, newest, {self._best_step}, self._validity_by_name)
            self._folder.write_status("running", self._written_step)
        except OSError as error:
            reason = error_reason(error)
            self._log(f"{newest.name} was written, but tidying {self._folder.path} failed ({reason})")


class Snapshot:
    """Copies a training state, so that a thread can write the copy while training changes the original."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, state: TrainingState) -> TrainingState:
        """Returns a copy. The copy is valid until the next call, which reuses its memory."""
        model = {name: self._copy(f"model.{name}", tensor) for name, tensor in state.model.items()}
        optimizer_state = {
            index: {
                name: self._copy(f"{index}.{name}", value) if isinstance(value, Tensor) else value
                for name, value in entry.items()
            }
            for index, entry in state.optimizer["state"].items()
        }
        optimizer = {"state": optimizer_state, "param_groups": copy.deepcopy(state.optimizer["param_groups"])}
        if any(tensor.is_cuda for tensor in state.model.values()):
            torch.cuda.current_stream().synchronize()
        return TrainingState(model, optimizer, dict(state.scaler), copy.deepcopy(state.progress), state.metadata)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)
