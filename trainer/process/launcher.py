"""Finds the launcher of this process and waits for its end.

A launcher that is killed cannot tell its ranks. `samecurve train` with one rank replaces itself by the trainer: its
parent is then the user's shell, which the run must survive (nohup, disown). So only torchrun and `accelerate launch`
count as launchers.
"""

import os
import select
import sys
import time

from trainer.distributed.environment import has_rank_variables

_POLL_SECONDS = 0.5
# Each is set by the launcher for its processes, so the launcher itself was started without it.
_TORCHRUN_VARIABLE, _ACCELERATE_VARIABLE = "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"


def find_launcher() -> int:
    """Returns the pid of the launcher of this process, 0 if there is none.

    The launcher is the nearest ancestor that was started without the variable that it sets: a wrapper script between
    the launcher and this process has it, too.
    """
    if _TORCHRUN_VARIABLE in os.environ and has_rank_variables():  # without them it is left over from another program
        return _ancestor_without(_TORCHRUN_VARIABLE, "")
    if _ACCELERATE_VARIABLE in os.environ:  # or the user has set it in a shell
        return _ancestor_without(_ACCELERATE_VARIABLE, "accelerate")
    return 0


def _ancestor_without(variable: str, word: str) -> int:
    """word: must be part of the ancestor's command."""
    import psutil  # lazy import: only processes of a launcher need it

    try:
        for process in psutil.Process().parents():
            if process.environ().get(variable) != os.environ[variable]:
                return process.pid if any(word in argument for argument in process.cmdline()) else 0
    except psutil.Error:  # of another user, so it is not our launcher; or it has just ended
        pass
    return 0


def wait_for_end(pid: int) -> None:
    """Waits until a process has ended. Does not need to be its parent."""
    if sys.platform == "linux":
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        except OSError:  # an old kernel, or a container that forbids the call
            pass
        else:
            select.select([descriptor], [], [])
            os.close(descriptor)
            return
    import psutil

    try:
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_POLL_SECONDS)
    except psutil.Error:
        return
