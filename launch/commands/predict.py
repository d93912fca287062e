"""`samecurve predict RUN IMAGE...`: a run and images in, the most probable classes of each out."""

import argparse

from launch.commands.arguments import add_run, add_weights
from launch.runs.run import find_run_or_weights
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


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """2 when an image could not be read: the others are told all the same."""
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top}: wanted 1 or more")
    path = find_run_or_weights(arguments.run, arguments.root)
    from trainer.inference.predict import (
        expand_paths,
        load_predictor,
        print_predictions,  # late: torch
    )

    images = expand_paths(arguments.images)  # before the network is read: a typing mistake is told at once
    predictor = load_predictor(path, arguments.weights, arguments.device, arguments.allow_pickle)
    problems = print_predictions(predictor.each(images, arguments.top), arguments.form or "text", len(images))
    if problems:
        raise DataError(f"{problems} of {len(images)} images could not be read; all others are predicted")
    return 0
