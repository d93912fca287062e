"""`samecurve predict RUN IMAGE...`: a run and images in, the most probable classes of each out."""

import argparse

from launch import runs
from launch.status import add_run
from trainer.errors import DataError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "its name under --root, or its path; or a file of weights")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files of any kind and size, or folders of them"
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes of each image; default: 3")
    add_weights(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, where there is one")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", const="json", dest="form", help="a list of objects")
    form.add_argument("--csv", action="store_const", const="csv", dest="form", help="a row for each class of an image")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """How the commands on a run's network are told which."""
    text = "final, best, latest or a step; default: the final ones, or the latest of a run that has none yet"
    parser.add_argument("--weights", default="auto", metavar="WHICH", help=text)
    text = "a file of weights may be a pickled module, which can run any code when it is loaded"
    parser.add_argument("--allow-pickle", action="store_true", help=text)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """2 when an image could not be read: the others are told all the same."""
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: wanted 1 or more")
    path = runs.locate_weights(arguments.run, arguments.root)
    from trainer import predict  # late: torch

    images = predict.paths(arguments.images)  # before the network is read: a typing mistake is told at once
    predictor = predict.load(path, arguments.weights, arguments.device, arguments.allow_pickle)
    problems = predict.show(predictor.each(images, arguments.top), arguments.form or "text", len(images))
    if problems:
        raise DataError(f"{problems} of {len(images)} images could not be read; all others are predicted")
    return 0
