"""Runs torchrun with its own arguments. Ends without a traceback where the ranks have said why they ended.

torchrun reports a stop signal, and a rank that refuses its settings, by a traceback of its own functions and a table of
all ranks. Exit codes are those of torchrun.
"""

import os
import sys
from pathlib import Path

_LAUNCH_FOLDER = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _LAUNCH_FOLDER:  # run as a script: Python put launch/ itself here
    sys.path[0] = str(_LAUNCH_FOLDER.parent)

from trainer.run.exit import OUTCOME_VARIABLE, read_outcome

_FAILED = 1


def main() -> int:
    """Runs torchrun to its end and returns its exit code. Raises ChildFailedError if a rank failed by a defect."""
    from torch.distributed.elastic.multiprocessing import SignalException  # lazy import: torch takes 2 s
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run_torchrun

    try:
        run_torchrun()
    except SignalException:
        return _FAILED
    except ChildFailedError:
        if _have_ranks_said_why():
            return _FAILED
        raise
    return 0


def _have_ranks_said_why() -> bool:
    """Returns whether a rank has printed an error for the user, in one line."""
    path = os.environ.get(OUTCOME_VARIABLE)
    outcome = read_outcome(Path(path)) if path else None
    return outcome is not None and outcome[0] == 2


if __name__ == "__main__":
    sys.exit(main())
