"""A run's network and a data set of the same classes in, its scores out; on any number of ranks the same ones.

accelerate launch trainer/inference/evaluate.py RUN [--weights WHICH] [--split SPLIT] [--json] [section.key=value]...
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

_HERE = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _HERE:  # run as a script: Python put trainer/ itself there
    sys.path[0] = str(_HERE.parents[1])

import torch

from trainer.config.load import (
    find_config_file,
    load_config,
)
from trainer.config.schema import RunConfig
from trainer.data.augment import Augment
from trainer.data.splits import load_splits
from trainer.distributed.environment import read_environment
from trainer.distributed.world import World
from trainer.errors import (
    ConfigError,
    DataError,
    PeerError,
    UserError,
)
from trainer.format import class_table
from trainer.inference.evaluation import (
    Evaluation,
    evaluate_split,
)
from trainer.inference.saved_model import (
    ModelMetadata,
    SavedModel,
    load_model,
)
from trainer.run.exit import (
    exit_process,
    report_peer_error,
    report_user_error,
)
from trainer.run.files import finite_json


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for what the user must change."""
    env = read_environment()
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        config = load_config([find_config_file(name) for name in arguments.config], overrides)
        world = World(config.train)
    except UserError as error:
        return report_user_error(error, speaks=env.local_rank == 0)
    except PeerError as error:
        return report_peer_error(error, env.rank)
    try:
        with world:
            chosen = (arguments.run, arguments.weights, world.device, arguments.allow_pickle)
            network = world.raise_together(lambda: load_model(*chosen))
            found = evaluate(network, config, world, arguments.split)
    except UserError as error:
        return report_user_error(error, speaks=world.is_rank0)
    except KeyboardInterrupt:
        return 130
    if world.is_rank0:
        _show(found, network, arguments.split, arguments.json)
    return 0


def evaluate(network: SavedModel, config: RunConfig, world: World, split: str = "test") -> Evaluation:
    """On a split of config.data, whose images are brought to the network's size and channels.

    Raises DataError, on every rank, when the data set is missing, has no such split, or other classes.
    """
    about = network.about
    # Nothing is trained: a data set smaller than the run's batch will do.
    fitted = dataclasses.replace(config.data, image_size=about.image_size, channels=about.channels, global_batch_size=1)
    splits = load_splits(fitted, config.run.seed, world)
    if set(splits.classes) != set(about.classes):
        raise DataError(_differ(about, splits.classes))
    part = getattr(splits, split)
    if part is None:
        raise DataError(f"--split {split}: nothing is held out; set data.validation_fraction as the run had it")
    numbers = torch.tensor([about.classes.index(name) for name in splits.classes])  # a folder's are in another order
    part = dataclasses.replace(part, labels=numbers[part.labels])
    shape = part.images.shape[1:]
    feed = Augment(fitted, about.normalization, 0, world.device, shape)
    model = world.accelerator.prepare_model(network.module, device_placement=False, evaluation_mode=True)
    found, _ = evaluate_split(lambda images: model(feed.normalize(images)), part, about.classes, config, world)
    return found


def _differ(about: ModelMetadata, classes: tuple[str, ...]) -> str:
    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")

    return (
        f"the data set's classes are not the network's: got {some(classes)}; wanted {some(about.classes)}. "
        "Give a data set with the same classes (data.name, data.root)"
    )


def _show(found: Evaluation, network: SavedModel, split: str, as_json: bool) -> None:
    scores = asdict(found)
    if as_json:
        told = {"weights": str(network.path), "split": split} | scores
        print(json.dumps(finite_json(told), allow_nan=False))
        return
    from rich.console import Console

    Console(highlight=False).print(class_table(scores["classes"], f"{split} set, by class"))
    several = "" if found.tta_accuracy is None else f", with several views {found.tta_accuracy:.2%}"
    print(
        f"{split} accuracy {found.accuracy:.2%}{several} of {found.num_samples:,} images, loss {found.loss:.4f}; "
        f"weights: {network.path}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; write RUN, options and section.key=value (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trainer/inference/evaluate.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint's, or a file of weights")
    parser.add_argument("--config", action="append", default=[], metavar="NAME_OR_PATH")
    parser.add_argument("--weights", default="auto", metavar="WHICH", help="auto, final, best, latest or a step")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--allow-pickle", action="store_true")
    return parser


if __name__ == "__main__":
    exit_process(main())
