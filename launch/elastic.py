"""Runs torchrun with its own arguments, by default for ranks that meet on this machine.

Ends without a traceback where the ranks have said why they ended.

torchrun reports a stop signal, a rank that refuses its settings, and on other machines the end of the first one, by
tracebacks of its own functions and tables of ranks. Exit codes are those of torchrun, and 2 if
the ranks cannot meet.
"""

import contextlib
import os
import socket
import sys
from pathlib import Path

_LAUNCH_FOLDER = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _LAUNCH_FOLDER:  # run as a script: Python put launch/ itself here
    sys.path[0] = str(_LAUNCH_FOLDER.parent)

from trainer.errors import WorldError
from trainer.run.exit import OUTCOME_VARIABLE, read_outcome

_FAILED = 1
_LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"


def main() -> int:
    """Runs torchrun to its end and returns its exit code. Raises ChildFailedError if a rank failed by a defect."""
    if not any(word.startswith("--rdzv-endpoint=") for word in sys.argv):
        try:
            sys.argv[1:1] = one_machine_options()
        except WorldError as error:
            print(f"samecurve: {error}", file=sys.stderr)
            return 2
    is_set = _LOG_LEVEL in os.environ
    os.environ.setdefault(_LOG_LEVEL, "ERROR")  # a store that closes is no news; torch reads the level at its import
    from torch.distributed.elastic.multiprocessing import SignalException  # lazy import: torch takes 2 s
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as run_torchrun

    if not is_set:
        del os.environ[_LOG_LEVEL]  # not for the ranks
    try:
        run_torchrun()
    except SignalException:
        return _FAILED
    except ChildFailedError:
        if _outcome_code() == 2:
            return _FAILED
        raise
    except RendezvousError:  # the first machine has gone
        if _outcome_code() is not None:
            return _FAILED
        raise
    return 0


def one_machine_options() -> list[str]:
    """Returns torchrun's options for ranks that meet on the loopback address of this machine.

    With --standalone, torchrun would look up the machine's own name and the name localhost, which need not be known.
    Raises WorldError without a loopback address.
    """
    families = ((socket.AF_INET, "127.0.0.1", "127.0.0.1:0"), (socket.AF_INET6, "::1", "[::1]:0"))
    for family, address, endpoint in families:
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # a datagram socket sends nothing on connect
            return ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--local-addr={address}"]
    raise WorldError("this machine has no loopback address, where its ranks meet; run: ip link set lo up")


def _outcome_code() -> int | None:
    """Returns how the run ended, as the ranks wrote it; None if they ended without that."""
    path = os.environ.get(OUTCOME_VARIABLE)
    outcome = read_outcome(Path(path)) if path else None
    return None if outcome is None else outcome[0]


if __name__ == "__main__":
    sys.exit(main())
