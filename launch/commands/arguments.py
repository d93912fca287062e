"""Command-line arguments that several commands share: a run, the folder of all runs, a run's weights."""

import argparse
from pathlib import Path


def add_run(parser: argparse.ArgumentParser, text: str = "its name under --root, or its path", **how: bool) -> None:
    """How the commands on runs are told which."""
    parser.add_argument("run", metavar="RUN", nargs="?" if how.get("optional") else None, help=text)
    add_root(parser)


def add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="FOLDER", help="of all runs; default: runs")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """How the commands on a run's network are told which."""
    text = "final, best, latest or a step; default: the final ones, or the latest of a run that has none yet"
    parser.add_argument("--weights", default="auto", metavar="WHICH", help=text)
    text = "a file of weights may be a pickled module, which can run any code when it is loaded"
    parser.add_argument("--allow-pickle", action="store_true", help=text)
