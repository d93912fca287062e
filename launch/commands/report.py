"""`samecurve report RUN [RUN...]`: runs in, report.html out: of one run in its folder, of several side by side."""

import argparse
import os
from pathlib import Path

from launch.commands.arguments import add_root
from launch.runs.run import find_run
from trainer.errors import FolderError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names under --root, or paths")
    add_root(parser)
    text = "default: report.html in the run's folder; of several runs, in the folder that holds them all"
    parser.add_argument("--out", type=Path, metavar="FILE", help=text)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    paths = [find_run(name, arguments.root) for name in arguments.runs]
    from trainer.report import figures
    from trainer.report.html import REPORT_FILE, write_report
    from trainer.run.record import read_record  # late: 0.1 s

    together = Path(os.path.commonpath([path.resolve().parent for path in paths]))
    out = arguments.out or (paths[0] if len(paths) == 1 else together) / REPORT_FILE
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_report(paths, out)
        if len(paths) == 1:
            pictures = figures.run_figures(read_record(paths[0]))
            figures.write(pictures, paths[0] / figures.FIGURES_FOLDER)
    except OSError as error:
        raise FolderError(f"{out} cannot be written ({error.strerror}); give another place by --out") from None
    print(out)
    return 0
