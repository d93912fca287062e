"""A run's network and a data set of the same classes in, its scores out; on any number of ranks the same ones.

accelerate launch trainer/evaluate.py RUN [--weights WHICH] [--split SPLIT] [--json] [section.key=value]...
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
    sys.path[0] = str(_HERE.parent)

import torch  # noqa: E402

from trainer import config as configs  # noqa: E402
from trainer import data, parts, rank_env, trained  # noqa: E402
from trainer.augment import Augment  # noqa: E402
from trainer.console import by_class  # noqa: E402
from trainer.errors import ConfigError, DataError, PeerError, UserError  # noqa: E402
from trainer.evaluation import Evaluation  # noqa: E402
from trainer.folder import finite  # noqa: E402
from trainer.main import leave, lost, refuse  # noqa: E402
from trainer.settings import RunConfig  # noqa: E402
from trainer.trained import About, Trained  # noqa: E402
from trainer.world import World  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 for what the user must change."""
    env = rank_env.read()
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        config = configs.load([configs.find(name) for name in arguments.config], overrides)
        world = World(config.train)
    except UserError as error:
        return refuse(error, speaks=env.local_rank == 0)
    except PeerError as error:
        return lost(error, env.rank)
    try:
        with world:
            chosen = (arguments.run, arguments.weights, world.device, arguments.allow_pickle)
            network = world.together(lambda: trained.load(*chosen))
            found = evaluate(network, config, world, arguments.split)
    except UserError as error:
        return refuse(error, speaks=world.is_first)
    except KeyboardInterrupt:
        return 130
    if world.is_first:
        _show(found, network, arguments.split, arguments.json)
    return 0


def evaluate(network: Trained, config: RunConfig, world: World, split: str = "test") -> Evaluation:
    """On a split of config.data, whose images are brought to the network's size and channels.

    Raises DataError, on every rank, when the data set is missing, has no such split, or other classes.
    """
    about = network.about
    # Nothing is trained: a data set smaller than the run's batch will do.
    fitted = dataclasses.replace(config.data, image_size=about.image_size, channels=about.channels, global_batch_size=1)
    splits = data.load(fitted, config.run.seed, world)
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
    found, _ = parts.evaluate(lambda images: model(feed.plain(images)), part, about.classes, config, world)
    return found


def _differ(about: About, classes: tuple[str, ...]) -> str:
    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")

    return (
        f"the data set's classes are not the network's: got {some(classes)}; wanted {some(about.classes)}. "
        "Give a data set with the same classes (data.name, data.root)"
    )


def _show(found: Evaluation, network: Trained, split: str, as_json: bool) -> None:
    scores = asdict(found)
    if as_json:
        told = {"weights": str(network.path), "split": split} | scores
        print(json.dumps(finite(told), allow_nan=False))
        return
    from rich.console import Console

    Console(highlight=False).print(by_class(scores["classes"], f"{split} set, by class"))
    several = "" if found.tta_accuracy is None else f", with several views {found.tta_accuracy:.2%}"
    print(
        f"{split} accuracy {found.accuracy:.2%}{several} of {found.num_samples:,} images, loss {found.loss:.4f}; "
        f"weights: {network.path}"
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; write RUN, options and section.key=value (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trainer/evaluate.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, a checkpoint's, or a file of weights")
    parser.add_argument("--config", action="append", default=[], metavar="NAME_OR_PATH")
    parser.add_argument("--weights", default="auto", metavar="WHICH", help="auto, final, best, latest or a step")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--allow-pickle", action="store_true")
    return parser


if __name__ == "__main__":
    leave(main())
