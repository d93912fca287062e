"""`samecurve export RUN --to FORMAT`: exports a trained network and checks the exported file's logits."""

import argparse
import sys
from pathlib import Path

from launch.commands.arguments import add_run_argument, add_weights_options
from launch.runs.find import find_run_or_weights
from trainer.text.escape import escape

_FORMATS = {
    "onnx": "the whole program, for ONNX Runtime and others",
    "torchscript": "the whole program, for C++ and older PyTorch",
    "pt2": "the whole program, as torch.export saves it",
    "safetensors": "the weights, with the metadata to rebuild the network",
    "torch": "the same weights and metadata, as torch.save saves them",
    "pickle": "the whole module, as torch.save saves it; loading it can run any code",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run_argument(parser, "its name under --root, its path, or a file of weights")
    formats = "; ".join(f"{name}: {text}" for name, text in _FORMATS.items())
    parser.add_argument("--to", required=True, choices=_FORMATS, metavar="FORMAT", help=formats)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: export/NAME.SUFFIX in the run folder")
    add_weights_options(parser)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Exports the network and prints the file's path, size and largest difference from the run's logits."""
    path = find_run_or_weights(arguments.run, arguments.root)
    if arguments.to == "pickle":
        print(
            "samecurve: warning: loading a pickled module runs any code in it, and fails after a change to the "
            "network's code; --to torch and --to safetensors save the same weights without these risks",
            file=sys.stderr,
        )
    from trainer.inference.export import export_model  # lazy import: torch

    exported = export_model(path, arguments.to, arguments.out, arguments.weights, arguments.allow_pickle)
    print(
        f"{escape(exported.path)}: {exported.size_bytes:,} bytes; loaded again, it gives the run's logits "
        f"(largest difference {exported.largest_difference:.1e})"
    )
    return 0
