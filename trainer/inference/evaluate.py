"""Evaluates a trained network on a data set of its classes; the scores are equal on any world size.

accelerate launch trainer/inference/evaluate.py RUN [--weights WEIGHTS] [--split SPLIT] [--json] [section.key=value]...
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

_FOLDER = Path(__file__).resolve().parent
if sys.path and Path(sys.path[0] or ".").resolve() == _FOLDER:  # run as a script: Python has put this folder there
    sys.path[0] = str(_FOLDER.parents[1])

from trainer.config.load import find_config_file, load_config
from trainer.config.schema import RunConfig
from trainer.data.augment import Augment
from trainer.data.dataset import list_names
from trainer.data.identity import DATA_FILE, DataIdentity, check_same_data, read_identity
from trainer.data.splits import load_split
from trainer.distributed.environment import read_environment
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError, PeerError, UserError
from trainer.format import class_table
from trainer.inference.evaluation import Evaluation, evaluate_split
from trainer.inference.saved_model import SavedModel, load_model
from trainer.run.exit import exit_process, report_peer_error, report_user_error
from trainer.run.files import finite_json
from trainer.run.reading import content
from trainer.run.record import read_json
from trainer.text.escape import escape
from trainer.text.streams import protect_streams

_ADVICE = "set data.root to the data set to evaluate"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and prints the scores on rank 0. Returns the exit code.

    0: done; 1: another rank is gone; 2: the user must change something; 130: interrupted.
    """
    if argv is None:
        protect_streams()
    try:
        env = read_environment()
    except UserError as error:
        return report_user_error(error, is_reporter=True)
    try:
        arguments, overrides = _parser().parse_known_args(argv)
        config = load_config([find_config_file(name) for name in arguments.config], overrides)
        world = World(config.train)
    except UserError as error:
        return report_user_error(error, is_reporter=env.local_rank == 0)
    except PeerError as error:
        return report_peer_error(error, env.rank)
    try:
        with world:
            model = world.raise_together(
                lambda: load_model(arguments.run, arguments.weights, world.device, arguments.allow_pickle)
            )
            evaluation = evaluate(model, config, world, arguments.split, arguments.data_of)
    except UserError as error:
        return report_user_error(error, is_reporter=world.is_rank0)
    except KeyboardInterrupt:
        return 130
    if world.is_rank0:
        _print_scores(evaluation, model, arguments.split, arguments.json)
    return 0


def evaluate(
    model: SavedModel, config: RunConfig, world: World, split: str = "test", data_of: Path | None = None
) -> Evaluation:
    """Evaluates a model on a split of config.data, and prints notes to stderr. Every rank must call it.

    Images get the network's size and channels. split: test, validation or train. data_of: a run folder; the split must
    then be that of the run. Raises DataError, on every rank, if the data set is missing, lacks the split, has a class
    that the network does not know, or is not the one of data_of.
    """
    metadata = model.metadata
    data = dataclasses.replace(config.data, image_size=metadata.image_size, channels=metadata.channels)
    if split == "validation" and not data.validation_fraction:
        raise DataError(
            f"--split {split}: the data set has no {split} split because data.validation_fraction is 0; set it to the "
            "run's value"
        )
    tensor_split, identity, notes = load_split(data, split, metadata.classes, config.run.seed, world)
    if data_of is not None:
        note = world.broadcast_from_rank0(lambda: _check_data(identity, data_of, data.accept_added_test_images))
        notes = (*notes, note) if note else notes
    counts = tensor_split.labels.bincount(minlength=len(metadata.classes)).tolist()
    if missing := [name for name, count in zip(metadata.classes, counts, strict=True) if not count]:
        classes = "1 class" if len(missing) == 1 else f"{len(missing)} classes"
        notes = (*notes, f"the {split} set has no images of {classes}: {list_names(missing)}")
    if world.is_rank0:
        for note in notes:
            print(f"note: {escape(note)}", file=sys.stderr)
    augment = Augment(data, metadata.normalization, 0, world.device, tensor_split.images.shape[1:])
    module = world.accelerator.prepare_model(model.module, device_placement=False, evaluation_mode=True)
    evaluation, _ = evaluate_split(
        lambda images: module(augment.normalize(images)), tensor_split, metadata.classes, config, world
    )
    return evaluation


def _check_data(identity: DataIdentity, run: Path, accept_added_test_images: bool) -> str:
    """Returns a line for the user, or "". Raises DataError unless the run was trained on this data set."""
    path = run / DATA_FILE
    description = read_json(path, content.DATA)
    if not description:
        return f"{run} has no record of its data set, so the data are not compared with it"
    before = read_identity(description, path, run)
    return check_same_data(before, identity, accept_added_test_images, f"run {run}", _ADVICE)


def _print_scores(evaluation: Evaluation, model: SavedModel, split: str, as_json: bool) -> None:
    scores = dataclasses.asdict(evaluation)
    if as_json:
        print(json.dumps(finite_json({"weights": str(model.path), "split": split} | scores), allow_nan=False))
        return
    from rich.console import Console

    Console(highlight=False, markup=False, emoji=False).print(class_table(scores["classes"], f"{split} set, by class"))
    tta = "" if evaluation.tta_accuracy is None else f", with test-time augmentation {evaluation.tta_accuracy:.2%}"
    print(
        f"{split} accuracy {evaluation.accuracy:.2%}{tta} of {evaluation.num_samples:,} images, "
        f"loss {evaluation.loss:.4f}; weights: {escape(model.path)}"
    )


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of exiting, so that one rank alone reports a mistake."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; expected RUN, options and section.key=value (--help lists the options)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trainer/inference/evaluate.py", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, a checkpoint folder, or a file of weights")
    parser.add_argument(
        "--config", action="append", default=[], metavar="NAME_OR_PATH", help="a YAML file or a NAME of configs/"
    )
    parser.add_argument(
        "--weights", default="auto", metavar="WEIGHTS", help="auto, final, best, latest or a step; default: auto"
    )
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test", help="default: test")
    parser.add_argument(
        "--data-of", type=Path, metavar="FOLDER", help="a run folder; refuse data other than those of that run"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as a JSON object")
    parser.add_argument("--allow-pickle", action="store_true", help="load a pickled module, which can run any code")
    return parser


if __name__ == "__main__":
    exit_process(main())
