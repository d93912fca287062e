"""`samecurve evaluate RUN [data.*]...`: a run and a data set of the same classes in, its scores on that out."""

import argparse
import sys
from pathlib import Path

from launch import forecast, runs, train
from launch.hardware import look
from launch.predict import add_weights
from launch.status import add_run
from trainer.errors import ConfigError

_MAY_BE_SET = ("data.", "eval.", "loss.name=", "train.device=", "train.precision=", "train.threads_per_rank=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "its name under --root, or its path; or a file of weights")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test", help="default: test")
    add_weights(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="processes; default: one a GPU, or one on the CPU")
    parser.add_argument("--json", action="store_true", help="the scores as an object, as summary.json has them")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = runs.locate_weights(arguments.run, arguments.root)
    for override in overrides:
        if not override.startswith(_MAY_BE_SET):
            name = override.partition("=")[0]
            raise ConfigError(
                f"{name} does not change an evaluation; wanted settings of data. and eval., or train.device"
            )
    own = path / "config.yaml"
    files = [*([str(own)] if own.is_file() else []), *arguments.config]
    machine = look()
    config = forecast.load(files, overrides)
    layout = train.choose(config, machine, arguments.ranks)
    script = [str(Path(machine.trainer).with_name("evaluate.py")), str(path), "--weights", arguments.weights]
    script += ["--split", arguments.split, *(["--json"] if arguments.json else []), *train.named(files), *overrides]
    plan = train.command(f"samecurve evaluate {path.name}", config, machine, layout, script)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return train.run(plan, path)
