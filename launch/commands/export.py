"""`samecurve export RUN --to FORMAT`: a run in, a file that other programs run out, compared before it is told of."""

import argparse
import sys
from pathlib import Path

from launch.commands.arguments import add_run, add_weights
from launch.runs.run import find_run_or_weights

_FORMATS = {
    "onnx": "the whole program, for ONNX Runtime and others",
    "torchscript": "the whole program, for C++ and older PyTorch",
    "pt2": "the whole program, as torch.export has it",
    "safetensors": "the weights, with what it takes to build the network",
    "torch": "the same as a state dict, by torch.save",
    "pickle": "the whole module by torch.save: to load it can run any code",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "its name under --root, or its path; or a file of weights")
    formats = "; ".join(f"{name}: {text}" for name, text in _FORMATS.items())
    parser.add_argument("--to", required=True, choices=_FORMATS, metavar="FORMAT", help=formats)
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: export/NAME.SUFFIX in the run's folder")
    add_weights(parser)


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run_or_weights(arguments.run, arguments.root)
    if arguments.to == "pickle":
        print(
            "samecurve: warning: whoever loads a pickled module runs any code that is in it, and it cannot be loaded "
            "when its network's code has changed; --to torch and --to safetensors have the same weights without that",
            file=sys.stderr,
        )
    from trainer.inference.export import export_model  # late: torch

    made = export_model(path, arguments.to, arguments.out, arguments.weights, arguments.allow_pickle)
    print(
        f"{made.path}: {made.size_bytes:,} bytes; loaded again, it gives the run's logits "
        f"(largest difference {made.largest_difference:.1e})"
    )
    return 0
