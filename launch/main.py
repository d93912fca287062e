"""Runs `samecurve COMMAND ...`. The module of a command is imported only when that command is called.

Exit codes: 0 success; 1 the run failed; 2 the user must change something, as one line on stderr explains; 75 the run
stopped with a checkpoint; 130 interrupted; 141 the reader of the output closed it.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_LAUNCH_FOLDER = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _LAUNCH_FOLDER:  # run as a script: Python put launch/ itself here
    sys.path[0] = str(_LAUNCH_FOLDER.parent)

from trainer.text.escape import escape
from trainer.text.streams import protect_streams, stdout_error


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module with add_arguments(parser) and main(arguments, overrides), and its line in --help."""

    module: str
    help: str = ""
    """empty: the command is hidden, because only our own scripts call it"""
    takes_settings: bool = False
    """whether --config and section.key=value are accepted"""
    only_prints: bool = False
    """the command ends when its output cannot be printed; others finish their work"""


COMMANDS = {
    "train": Command("launch.commands.train", "train on this machine, on all GPUs or on CPU ranks", True),
    "doctor": Command("launch.doctor.command", "find problems of this machine, of a job or between ranks", True, True),
    "submit": Command("launch.slurm.submit", "check the settings and queue a SLURM job", True),
    "status": Command("launch.commands.status", "show a table of all runs, or one run in detail", only_prints=True),
    "logs": Command("launch.commands.logs", "show the log of a rank of a run", only_prints=True),
    "stop": Command("launch.commands.stop", "stop a run with a checkpoint, or remove it from the SLURM queue"),
    "report": Command("launch.commands.report", "write report.html for one run, or for several runs side by side"),
    "dashboard": Command("launch.commands.dashboard", "create a W&B workspace and report of all metrics of runs"),
    "evaluate": Command(
        "launch.commands.evaluate", "score a trained network on its test set, or on another set of these classes", True
    ),
    "predict": Command("launch.commands.predict", "print the most probable classes of images", only_prints=True),
    "export": Command("launch.commands.export", "export a trained network as ONNX, TorchScript, pt2 or weights only"),
    "sweep": Command(
        "launch.commands.sweep", "run a grid of settings with several seeds; print means and deviations", True
    ),
    "verify": Command(
        "launch.verify.command", "prove on this machine that ranks and kills do not change any bit of a run", True
    ),
    "batch": Command("launch.slurm.batch", takes_settings=True),
    "node": Command("launch.slurm.node", takes_settings=True),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in `argv` and returns the exit code.

    argv: by default the arguments of this process, whose streams are then replaced by ones that raise no errors.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(words[0]) if words else None
    only_prints = command is None or command.only_prints
    if argv is None:
        protect_streams(ends_on_closed_pipe=only_prints)
    try:
        try:
            code = _run_command(words)
        except SystemExit:  # --help
            sys.stdout.flush()
            raise
        lost = stdout_error()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        return 141
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("launch", "trainer"):
            raise
        print(
            f"samecurve: {sys.executable} has no package {error.name}; activate the virtual environment in which "
            "samecurve is installed (in a job: activate it before sbatch, or set SAMECURVE_PYTHON in slurm/site.sh)",
            file=sys.stderr,
        )
        return 2
    if lost is not None and only_prints:
        print(f"samecurve: standard output cannot be written ({lost.strerror}); free space there", file=sys.stderr)
        return code or 2
    return code


def _run_command(words: list[str]) -> int:
    parser = build_parser(words[0] if words else "")
    if not words:
        parser.print_help()
        return 2
    from trainer.errors import ConfigError, UserError, suggest_choice

    if words[0] not in COMMANDS and not words[0].startswith("-"):
        visible = [name for name, command in COMMANDS.items() if command.help]
        print(f"samecurve: no command '{words[0]}'; {suggest_choice(words[0], visible)}", file=sys.stderr)
        return 2
    arguments, overrides = parser.parse_known_args(words)
    command = COMMANDS[arguments.command]
    try:
        if command.takes_settings and overrides:
            from trainer.config.load import as_overrides  # lazy import: 0.1 s

            overrides = as_overrides(overrides)
        for word in overrides:
            advice = f"samecurve {arguments.command} --help lists the options"
            if not command.takes_settings:
                raise ConfigError(f"'{word}' is not an option of this command; {advice}")
            if word.startswith("-") or "=" not in word:
                raise ConfigError(f"'{word}' is neither an option nor a setting (section.key=value); {advice}")
        return int(importlib.import_module(command.module).main(arguments, overrides))
    except UserError as error:
        print(f"samecurve: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"samecurve: {escape(message)}; samecurve --help lists the commands", file=sys.stderr)
        sys.exit(2)


def build_parser(called: str) -> argparse.ArgumentParser:
    """Returns the parser of all commands, with options for the command `called` only.

    The other commands get no options, because `samecurve --help` must not wait for the imports of their modules.
    """
    parser = _Parser(
        prog="samecurve",
        description="Trains image classifiers with the same training curve on any number of ranks.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if command.help:
            subparser = subparsers.add_parser(name, help=command.help, description=command.help, allow_abbrev=False)
        else:
            subparser = subparsers.add_parser(name, allow_abbrev=False)
        if name != called:
            continue
        if command.takes_settings:
            subparser.usage = f"samecurve {name} [options] [section.key=value]..."
            subparser.epilog = _settings_help(name)
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            subparser.add_argument(
                "--config",
                action="append",
                default=[],
                metavar="NAME_OR_PATH",
                help="a YAML file, or the name of one in configs/; may be repeated, later files override earlier ones",
            )
        importlib.import_module(command.module).add_arguments(subparser)
    return parser


def _settings_help(command: str) -> str:
    """Returns the list of all settings for `train`, and for other commands where that list is."""
    if command != "train":
        return "samecurve train --help lists all settings"
    from trainer.config.load import help_text  # lazy import: 0.1 s

    return "settings and their defaults:\n" + help_text()


if __name__ == "__main__":
    sys.exit(main())
