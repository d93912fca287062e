"""`samecurve evaluate RUN [data.*]...`: a run and a data set of the same classes in, its scores on that out."""

import argparse
import sys
from pathlib import Path
from typing import Any

from launch import forecast
from launch.commands.arguments import add_run, add_weights
from launch.hardware import this_machine
from launch.runs.run import find_run_or_weights, has_begun
from launch.torchrun import choose_layout, config_arguments, plan_ranks, run_plan
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.run.folder import RunFolder

_MAY_BE_SET = {
    "data.name", "data.root", "data.download", "data.cache_dir", "data.validation_fraction", "run.seed",
    "eval.batch_size", "eval.tta", "loss.name", "train.device", "train.precision", "train.threads_per_rank",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "its name under --root, or its path; or a file of weights")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test", help="default: test")
    add_weights(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="processes; default: one a GPU, or one on the CPU")
    parser.add_argument("--json", action="store_true", help="the scores as an object, as summary.json has them")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    path = find_run_or_weights(arguments.run, arguments.root)
    for override in overrides:
        name = override.partition("=")[0]
        if name not in _MAY_BE_SET:
            raise ConfigError(f"{name} does not change an evaluation; what does: {', '.join(sorted(_MAY_BE_SET))}")
    own = _run_of(path)
    if own is None and not arguments.config and not any(word.startswith("data.name=") for word in overrides):
        raise ConfigError(f"{path} is in no run's folder, whose data could be taken; set data.name, or give --config")
    files = [*([str(own / "config.yaml")] if own else []), *arguments.config]
    config = forecast.load_settings(files, overrides)
    if own is not None and not any(word.startswith(("data.root=", "data.name=")) for word in overrides):
        overrides = [*_where_it_was(own, config), *overrides]
    machine = this_machine()
    layout = choose_layout(config, machine, arguments.ranks)
    script = [
        str(machine.repository / "trainer" / "inference" / "evaluate.py"),
        str(path),
        "--weights",
        arguments.weights,
    ]
    script += ["--split", arguments.split, *(["--json"] if arguments.json else [])]
    script += [*(["--allow-pickle"] if arguments.allow_pickle else []), *config_arguments(files), *overrides]
    plan = plan_ranks(f"samecurve evaluate {path.name}", config, machine, layout, script)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return run_plan(plan, path, "Nothing in it was changed")


def _run_of(path: Path) -> Path | None:
    """The run's folder that weights lie in."""
    places = [path, *path.resolve().parents[:2]]
    return next((place for place in places if has_begun(place)), None)


def _where_it_was(run: Path, config: RunConfig) -> list[str]:
    """The run's data, from wherever this is called: its data.root is relative to where it was started."""
    if Path(config.data.root).is_dir():
        return []
    environment: Any = RunFolder(run).read_json("environment.json") or {}
    place = Path(environment.get("directory", "")) / config.data.root
    return [f"data.root={place}"] if place.is_dir() else ["data.download=false"]
