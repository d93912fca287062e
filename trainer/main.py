"""The training script: `accelerate launch trainer/main.py [--config NAME_OR_PATH]... [section.key=value]...`

Exit codes: 0 finished; 75 stopped on request, with a checkpoint; 2 the user must change something, one line on stderr
says what; 130 interrupted before training; 1 a defect, with a traceback, or another rank is gone.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script, Python puts trainer/ itself there
    sys.path[0] = str(_HERE.parent)

from trainer.config.load import as_overrides, find_config_file, help_text, load_config, to_yaml
from trainer.config.schema import RunConfig
from trainer.distributed.environment import read_environment
from trainer.errors import ConfigError, PeerError, UserError
from trainer.process.temporary import LauncherFolder, remove_stale_folders
from trainer.run.exit import (
    exit_process,
    is_outcome_requested,
    report_peer_error,
    report_user_error,
    would_repeat_failure,
    write_outcome,
)
from trainer.run.stop import LAUNCHER_END, StopSignals
from trainer.text.streams import protect_streams

_RANK0_EXIT_SECONDS = 1.0  # rank 0 exits first: a launcher ends all ranks as soon as one has exited
_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the settings before anything heavy is imported, then trains. Returns the exit code.

    argv: by default the arguments of this process, whose streams are then replaced by ones that end no run.
    """
    if argv is None:
        protect_streams()
    try:
        env = read_environment()
    except UserError as error:
        return report_user_error(error, is_reporter=True)
    if would_repeat_failure(env.rank):
        return 2
    try:
        arguments, words = _parser().parse_known_args(argv)
        files = [find_config_file(name) for name in arguments.config or ["cifar10"]]
        config = load_config(files, as_overrides(words))
        if arguments.print_config:
            if env.rank == 0:
                print(to_yaml(config), end="")
            return 0
    except UserError as error:  # perhaps on this machine only, so its first rank reports it
        return report_user_error(error, is_reporter=env.local_rank == 0)
    signals = StopSignals(is_reporter=env.rank == 0)
    if env.local_rank == 0:
        remove_stale_folders()
    launcher_folder = LauncherFolder(signals.launcher_pid if env.local_rank == 0 else 0)
    try:
        code = _train(config, signals)
        if code in (0, _STOPPED):
            launcher_folder.remove()
        return code
    except KeyboardInterrupt:
        if env.rank == 0:
            print(f"interrupted before training started; {config.folder} is unchanged", file=sys.stderr)
        return 130
    finally:
        signals.close()


def _train(config: RunConfig, signals: StopSignals) -> int:
    from torch.distributed.elastic.multiprocessing.errors import record  # lazy import: torch takes 2 s

    from trainer.distributed.world import World
    from trainer.session import train

    env = read_environment()

    @record  # so that torchrun shows the traceback of the rank that failed
    def run() -> int:
        try:
            world = World(config.train)
        except UserError as error:
            return report_user_error(error, is_reporter=env.local_rank == 0)
        except PeerError as error:
            return report_peer_error(error, env.rank)
        try:
            with world:
                stopped = train(config, world, signals)
        except UserError as error:
            return report_user_error(error, is_reporter=world.is_rank0)
        except PeerError as error:
            return report_peer_error(error, world.rank)
        if world.is_rank0:
            write_outcome(_STOPPED if stopped else 0, stopped)
        if stopped and not world.is_rank0:
            time.sleep(_RANK0_EXIT_SECONDS)
        if stopped == LAUNCHER_END and env.restarts_left and not signals.has_lost_launcher:
            return 1  # another machine has lost its launcher; ours starts the ranks again without it
        # Any other code makes a launcher with restarts left start the run again.
        return _STOPPED if stopped and not env.restarts_left and not is_outcome_requested() else 0

    return run() or 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; write --config NAME_OR_PATH and section.key=value (--help lists every setting)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="trainer/main.py",
        description="Trains an image classifier with the same training curve on any number of ranks.",
        usage="%(prog)s [--config NAME_OR_PATH]... [section.key=value]...",
        epilog="settings and their defaults:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="NAME_OR_PATH",
        help="a YAML file, or the name of one in configs/; may be repeated, later files override earlier ones",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings without training")
    return parser


if __name__ == "__main__":
    exit_process(main())
