"""`samecurve predict RUN IMAGE...`: prints the most probable classes of images."""

import argparse
import sys
from collections import Counter

from launch.commands.arguments import add_run_argument, add_weights_options
from launch.runs.find import find_run_or_weights
from trainer.errors import DataError, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run_argument(parser, "its name under --root, its path, or a file of weights")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files of any format and size, or folders with such files"
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes printed for each image; default: 3")
    add_weights_options(parser)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the first GPU, or the CPU if there is none")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="print a list with one object for each image"
    )
    form.add_argument(
        "--csv", action="store_const", const="csv", dest="format", help="print one row for each class of each image"
    )


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prints the predictions. Raises DataError at the end if an image could not be read; the others are printed."""
    if arguments.top < 1:
        raise UserError(f"--top must be at least 1, got {arguments.top}; give the number of classes to print")
    path = find_run_or_weights(arguments.run, arguments.root)
    from trainer.data.images.files import describe_skipped
    from trainer.inference.predict import expand_paths, load_predictor, print_predictions  # lazy import: torch

    skipped = Counter[str]()
    images = expand_paths(arguments.images, skipped)  # before the network is loaded: a mistyped path fails at once
    if skipped:
        print(f"note: {describe_skipped(skipped)}", file=sys.stderr)
    predictor = load_predictor(path, arguments.weights, arguments.device, arguments.allow_pickle)
    predictions = predictor.predict_each(images, arguments.top)
    num_unreadable = print_predictions(predictions, arguments.format or "text", len(images))
    if num_unreadable:
        raise DataError(
            f"{num_unreadable} of {len(images)} images could not be read; the others were predicted. Replace or leave "
            "out the images printed with an error"
        )
    return 0
