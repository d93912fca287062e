"""The samecurve command: `samecurve COMMAND ...`. Each command's work is in a room of its own, imported when called.

Exit codes: 0 done; 2 the user must change something, one line on stderr says what; 75 the run was stopped with a
checkpoint; 1 it failed.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script: Python put launch/ itself there
    sys.path[0] = str(_HERE.parent)

# name: (room, help, whether settings follow)
COMMANDS = {
    "train": ("launch.commands.train", "train on this machine: all its GPUs, or CPU ranks", True),
    "doctor": ("launch.doctor.command", "tell what would go wrong here, in a job, or among ranks", True),
    "submit": ("launch.slurm.submit", "check the settings, then queue a SLURM job", True),
    "status": ("launch.commands.status", "all runs in a table, or one run in detail", False),
    "logs": ("launch.commands.logs", "what a rank of a run has to say", False),
    "stop": ("launch.commands.stop", "ask a run to save and end, or take it out of SLURM's queue", False),
    "report": ("launch.commands.report", "report.html of a run, or of several side by side", False),
    "dashboard": ("launch.commands.dashboard", "a W&B workspace and a report of all metrics that the runs have", False),
    "evaluate": (
        "launch.commands.evaluate",
        "a run's network on its test set, or on another of the same classes",
        True,
    ),
    "predict": ("launch.commands.predict", "the most probable classes of images, by a run's network", False),
    "export": ("launch.commands.export", "a run's network as ONNX, TorchScript, pt2, or weights alone", False),
    "sweep": ("launch.commands.sweep", "a grid of settings with several seeds, and their mean and deviation", True),
    "verify": ("launch.verify.command", "prove on this machine that ranks and kills change no bit of a run", True),
    "batch": ("launch.slurm.batch", "", True),
    "node": ("launch.slurm.node", "", True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read it has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("launch", "trainer"):
            raise
        print(
            f"samecurve: {sys.executable} has no package {error.name}; activate the virtual environment that samecurve "
            "is installed in (in a job: before sbatch, or by SAMECURVE_PYTHON in slurm/site.sh)",
            file=sys.stderr,
        )
        return 2


def _run(words: list[str]) -> int:
    parser = _parser(words[0] if words else "")
    if not words:
        parser.print_help()
        return 2
    from trainer.errors import ConfigError, UserError

    arguments, rest = parser.parse_known_args(words)
    room, _, takes_settings = COMMANDS[arguments.command]
    try:
        if rest and not takes_settings:
            raise ConfigError(f"'{rest[0]}' is not known here; samecurve {arguments.command} --help lists the options")
        for word in rest:
            if word.startswith("-") or "=" not in word:
                hint = f"samecurve {arguments.command} --help lists the options"
                raise ConfigError(f"'{word}' is neither an option nor a setting (section.key=value); {hint}")
        return int(importlib.import_module(room).main(arguments, rest))
    except UserError as error:
        print(f"samecurve: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"samecurve: {message}; samecurve --help lists all", file=sys.stderr)
        sys.exit(2)


def _parser(called: str) -> argparse.ArgumentParser:
    """Only the command that is called has its options filled in: `--help` must not wait for the others' imports."""
    parser = _Parser(
        prog="samecurve",
        description="Trains image classifiers with the same curve on all hardware.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (room, text, takes_settings) in COMMANDS.items():
        usage = f"samecurve {name} [options]" + (" [section.key=value]..." if takes_settings else "")
        if text:
            command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        else:  # called by our own scripts
            command = commands.add_parser(name, allow_abbrev=False)
        if name != called:
            continue
        if takes_settings:
            command.usage = usage
            command.add_argument(
                "--config",
                action="append",
                default=[],
                metavar="NAME_OR_PATH",
                help="a YAML file or a NAME of configs/",
            )
        importlib.import_module(room).add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
