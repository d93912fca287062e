"""The entry: `accelerate launch trainer/main.py [--config NAME_OR_PATH]... [section.key=value]...`

Exit codes: 0 finished; 2 the user must change something, one line on stderr says what; 1 a defect, with a traceback.
"""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script: Python put trainer/ itself there
    sys.path[0] = str(_HERE.parent)

from trainer import config as configs  # noqa: E402
from trainer import rank_env  # noqa: E402
from trainer.errors import ConfigError, UserError  # noqa: E402
from trainer.settings import RunConfig  # noqa: E402

_OTHERS_WAIT_SECONDS = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the settings before it imports anything heavy, then trains; returns the exit code."""
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        config = configs.load([configs.find(name) for name in arguments.config or ["cifar10"]], overrides)
        if arguments.print_config:
            if rank_env.read().rank == 0:
                print(configs.to_yaml(config), end="")
            return 0
        return _train(config)
    except UserError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        return _say(f"interrupted; the same command goes on from the last checkpoint in {config.folder}", 130)


def _train(config: RunConfig) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record  # late: torch takes 2 s

    from trainer.loop import train
    from trainer.world import World

    @record  # so that torchrun shows the traceback of the rank that failed
    def run() -> UserError | None:
        try:
            with World(config.train) as world:
                train(config, world)
        except UserError as error:
            return error
        return None

    error = run()
    return _refuse(error) if error is not None else 0


def _refuse(error: UserError) -> int:
    return _say(f"samecurve: {error}", 2)


def _say(line: str, code: int) -> int:
    """One line, from rank 0. The others wait: a launcher ends all as soon as one is gone, maybe before 0 has spoken.

    One that nobody has ended by then has met something that rank 0 has not, and speaks for itself.
    """
    rank = rank_env.read().rank
    if rank > 0:
        time.sleep(_OTHERS_WAIT_SECONDS)
        line = f"{line} (seen by rank {rank} on {platform.node()} alone)"
    print(line, file=sys.stderr, flush=True)
    return code


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


if __name__ == "__main__":
    sys.exit(main())
