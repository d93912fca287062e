"""Defines what commands share: the arguments for the run, the folder of all runs and the weights; notes on stderr."""

import argparse
import sys
from pathlib import Path

from trainer.text.escape import escape


def add_run_argument(
    parser: argparse.ArgumentParser,
    help: str = "name of the run under --root, or path of its folder",
    optional: bool = False,
) -> None:
    """Adds RUN and --root."""
    parser.add_argument("run", metavar="RUN", nargs="?" if optional else None, help=help)
    add_root_option(parser)


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Adds --root, the folder of all runs."""
    parser.add_argument(
        "--root", type=Path, default=Path("runs"), metavar="FOLDER", help="folder of all runs; default: runs"
    )


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Adds --weights and --allow-pickle."""
    parser.add_argument(
        "--weights",
        default="auto",
        metavar="WHICH",
        help="final, best, latest or a step; default: final, or latest if the run has no final weights yet",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also load a pickled module as the file of weights; this can run any code in the file",
    )


def print_note(text: str) -> None:
    """Prints a line for the user that is not part of a command's output."""
    print(f"samecurve: {escape(text)}", file=sys.stderr)
