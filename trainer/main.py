"""The entry: `accelerate launch trainer/main.py [--config NAME_OR_PATH]... [section.key=value]...`

Exit codes: 0 finished; 75 stopped on request, with a checkpoint; 2 the user must change something, one line on stderr
says what; 130 interrupted before training; 1 a defect, with a traceback, or another rank is gone.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script: Python put trainer/ itself there
    sys.path[0] = str(_HERE.parent)

from trainer import config as configs  # noqa: E402
from trainer import outcome, rank_env  # noqa: E402
from trainer.errors import ConfigError, PeerError, UserError  # noqa: E402
from trainer.settings import RunConfig  # noqa: E402
from trainer.stop import Signals  # noqa: E402

_OTHERS_WAIT_SECONDS = 10.0
_FIRST_LEAVES_SECONDS = 1.0
_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the settings before it imports anything heavy, then trains; returns the exit code."""
    env = rank_env.read()
    if outcome.would_repeat(env.rank):
        return 2
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        config = configs.load([configs.find(name) for name in arguments.config or ["cifar10"]], overrides)
        if arguments.print_config:
            if env.rank == 0:
                print(configs.to_yaml(config), end="")
            return 0
    except UserError as error:  # maybe on this machine alone: its first rank says so
        return refuse(error, speaks=env.local_rank == 0)
    signals = Signals(speaks=env.rank == 0)
    try:
        return _train(config, signals)
    except KeyboardInterrupt:
        if env.rank == 0:
            print(f"interrupted before training; nothing is lost in {config.folder}", file=sys.stderr)
        return 130
    finally:
        signals.close()


def _train(config: RunConfig, signals: Signals) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record  # late: torch takes 2 s

    from trainer.loop import train
    from trainer.world import World

    env = rank_env.read()

    @record  # so that torchrun shows the traceback of the rank that failed
    def run() -> int:
        try:
            world = World(config.train)
        except UserError as error:
            return refuse(error, speaks=env.local_rank == 0)
        except PeerError as error:
            return lost(error, env.rank)
        try:
            with world:
                stopped = train(config, world, signals)
        except UserError as error:
            return refuse(error, speaks=world.is_first)
        except PeerError as error:
            return lost(error, world.rank)
        if world.is_first:
            outcome.write(_STOPPED if stopped else 0, stopped)
        if stopped and not world.is_first:
            time.sleep(_FIRST_LEAVES_SECONDS)
        # A launcher with restarts left would start the run again for any other code.
        return _STOPPED if stopped and not env.restarts_left and not outcome.is_asked_for() else 0

    return run() or 0


def refuse(error: UserError, speaks: bool) -> int:
    """One line. Who need not speak waits: a launcher ends all as soon as one is gone, maybe before the line is out.

    One that nobody has ended by then has met something that the others have not, and speaks after all.
    """
    if not speaks:
        time.sleep(_OTHERS_WAIT_SECONDS)
    print(f"samecurve: {error}", file=sys.stderr, flush=True)
    outcome.write(2, str(error))
    return 2


def lost(error: PeerError, rank: int) -> int:
    """One line; every rank speaks: they may have lost each other in different ways."""
    print(f"samecurve: rank {rank}: {error}", file=sys.stderr, flush=True)
    return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; write --config NAME_OR_PATH and section.key=value (--help lists all)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trainer/main.py",
        description="Trains an image classifier on whatever there is, with the same curve on all of it.",
        usage="%(prog)s [--config NAME_OR_PATH]... [section.key=value]...",
        epilog="settings and their defaults:\n" + configs.help_text().replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="NAME_OR_PATH",
        help="a YAML file, or the NAME of one in configs/; later ones win",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and leave")
    return parser


def leave(code: int) -> NoReturn:
    """All files are closed by now. Python's own end would wait for nothing more, and gloo's threads may abort in it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
