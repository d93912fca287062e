"""Saves checkpoints while training goes on: the loop is held for a copy of the state, a thread writes it.

One save is in flight at a time; the next one waits for it. A save that fails costs nothing but itself: it is told, the
checkpoints before it stay, and the next one that is due is tried as ever.
"""

import copy
import time
from collections.abc import Callable
from threading import Thread
from typing import Protocol

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.checkpoint import State
from trainer.errors import FolderError
from trainer.folder import DISK_ERRORS, RunFolder, cannot_be_written, reason

_FIRST_GUESS_SECONDS = 5.0  # until a save has been timed


class Saver(Protocol):
    seconds: float
    """what the slowest save has taken so far, from the copy to the disk"""

    def save(self, state: State, best_step: int | None) -> None:
        """Takes a copy and returns; best_step: a checkpoint to be kept besides the newest ones."""

    def finish(self) -> None:
        """Waits for the save in flight. Raises FolderError when the last one failed."""


class NoSaver:
    """What every rank but the first is given."""

    seconds = 0.0

    def save(self, state: State, best_step: int | None) -> None: ...
    def finish(self) -> None: ...


class BackgroundSaver:
    def __init__(self, folder: RunFolder, keep: int, say: Callable[[str], None]) -> None:
        self._folder, self._keep, self._say = folder, keep, say
        self._snapshot = Snapshot()
        self._writing: Thread | None = None
        self._problem: BaseException | None = None
        self.seconds = _FIRST_GUESS_SECONDS
        self._timed = False
        self._written_step = -1

    def save(self, state: State, best_step: int | None) -> None:
        self._wait()
        if isinstance(self._problem, FolderError):  # told already
            self._problem = None
        self._raise_problem()
        if state.progress.step == self._written_step:
            return
        began = time.perf_counter()
        copied = self._snapshot.take(state)
        self._writing = Thread(target=self._write, args=(copied, best_step, began), name="checkpoint")
        self._writing.start()

    def finish(self) -> None:
        self._wait()
        self._raise_problem()

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _write(self, state: State, best_step: int | None, began: float) -> None:
        """In the thread. A failure is told here; the last one of a run is also raised, by finish()."""
        step, folder = state.progress.step, self._folder
        self._problem = None
        try:
            if folder.made_anew():
                self._say(f"run folder {folder.path} had been removed while the run was on; it is made anew")
            folder.flush_metrics()  # or a machine that loses power would lose lines that no one writes again
            checkpoint.save(folder.checkpoints, state)
            checkpoint.prune(folder.checkpoints, self._keep, best_step)
            folder.status("running", step)
            self._written_step = step
        except DISK_ERRORS as error:
            what = f"checkpoint of step {step:,} in {folder.checkpoints}"
            self._problem = cannot_be_written(what, error)
            self._say(f"{what} was not written ({reason(error)}); training goes on, the next one due is tried as ever")
        except FolderError as error:  # another run has begun in a folder that was removed
            self._problem = error
            self._say(f"checkpoint of step {step:,} was not written: {error}")
        except BaseException as error:  # a defect: raised in the main thread, by the next save or at the end
            self._problem = error
        seconds = time.perf_counter() - began
        self.seconds = max(self.seconds, seconds) if self._timed else seconds
        self._timed = True


class Snapshot:
    """Copies a state into memory of its own, so that it can be written while training changes the original."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, state: State) -> State:
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
        return State(model, optimizer, dict(state.scaler), copy.deepcopy(state.progress))

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        memory = self._memory.get(name)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[name] = memory
        return memory.copy_(tensor.detach(), non_blocking=True)
