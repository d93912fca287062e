"""Runs `samecurve report RUN [RUN...]`: writes report.html for one run, or compares several runs on one page.

A folder of runs, such as a sweep, stands for all its runs.
"""

import argparse
import os
from pathlib import Path

from launch.commands.arguments import add_root_option, print_note
from launch.runs.find import find_runs_of
from trainer.errors import FolderError
from trainer.text.escape import escape


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `samecurve report`."""
    text = "names of runs or of folders of runs, such as a sweep, under --root, or paths"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    add_root_option(parser)
    default = "default: report.html in the run folder; for several runs, in the folder that contains them all"
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"report to write; {default}")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Writes the report, for a single run its figures too, and prints the report's path.

    Raises FolderError if a run cannot be found or read, or a file cannot be written.
    """
    run_folders = find_runs_of(arguments.runs, arguments.root, print_note)
    from trainer.report.figures import write_run_figures  # lazy imports: 0.1 s
    from trainer.report.html import REPORT_FILE, write_report

    is_comparison = len(run_folders) > 1
    common_folder = Path(os.path.commonpath([folder.resolve().parent for folder in run_folders]))
    out = arguments.out or (common_folder if is_comparison else run_folders[0]) / REPORT_FILE
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for problem in write_report(run_folders, out):
            print_note(problem)
        if not is_comparison:
            write_run_figures(run_folders[0])
    except OSError as error:
        raise FolderError(f"{out} cannot be written ({error.strerror}); choose another path with --out") from None
    print(escape(out))
    return 0
