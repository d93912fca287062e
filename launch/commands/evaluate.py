"""`samecurve evaluate RUN [data.*]...`: scores a trained network on a data set with the same classes."""

import argparse
import sys
from pathlib import Path

from launch import forecast
from launch.commands.arguments import add_run_argument, add_weights_options
from launch.hardware import this_machine
from launch.runs.find import find_run_or_weights, has_started
from launch.torchrun import choose_layout, config_arguments, plan_ranks, run_plan
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.run.record import RunRecord

_EVALUATION_SETTINGS = {
    "data.name", "data.root", "data.download", "data.cache_dir", "data.validation_fraction",
    "data.accept_added_test_images", "run.seed",
    "eval.batch_size", "eval.tta", "loss.name", "train.device", "train.precision", "train.threads_per_rank",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    add_run_argument(parser, "its name under --root, its path, or a file of weights")
    parser.add_argument("--split", choices=["test", "validation", "train"], default="test", help="default: test")
    add_weights_options(parser)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="number of processes; default: one for each GPU, or one on the CPU"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the scores as a JSON object with the keys of summary.json"
    )


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Starts trainer/inference/evaluate.py on the chosen ranks. Returns its exit code.

    Raises ConfigError for a setting that does not affect an evaluation, or if the data set is unknown.
    """
    path = find_run_or_weights(arguments.run, arguments.root)
    run_folder = _run_folder_of(path)
    _check_overrides(path, run_folder, arguments.config, overrides)
    config_files = [*([str(run_folder / "config.yaml")] if run_folder else []), *arguments.config]
    config = forecast.load_settings(config_files, overrides)
    data_of: list[str] = []
    if run_folder is not None and not _names_data(run_folder, config, overrides):
        overrides = [*_data_overrides(run_folder, config), *overrides]
        data_of = ["--data-of", str(run_folder)]
    machine = this_machine()
    layout = choose_layout(config, machine, arguments.ranks)
    script = [str(machine.install_root / "trainer" / "inference" / "evaluate.py"), str(path)]
    script += ["--weights", arguments.weights, "--split", arguments.split]
    script += [*(["--json"] if arguments.json else []), *(["--allow-pickle"] if arguments.allow_pickle else [])]
    script += [*data_of, *config_arguments(config_files), *overrides]
    plan = plan_ranks(f"samecurve evaluate {path.name}", config, machine, layout, script)
    for note in plan.notes:
        print(f"note: {note}", file=sys.stderr)
    return run_plan(plan, path, "The evaluation changed nothing in it")


def _check_overrides(path: Path, run_folder: Path | None, config: list[str], overrides: list[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0]
        if name not in _EVALUATION_SETTINGS:
            raise ConfigError(
                f"{name} does not change an evaluation; leave it out, or set one of "
                f"{', '.join(sorted(_EVALUATION_SETTINGS))}"
            )
    if run_folder is None and not config and not _sets(overrides, "data.name"):
        raise ConfigError(
            f"{path} is not in a run folder, so its data set is unknown; set data.name, or name a file with --config"
        )


def _names_data(run_folder: Path, config: RunConfig, overrides: list[str]) -> bool:
    """Returns whether the user names the data set, with an override or a file of --config."""
    stored = RunRecord(run_folder).settings
    is_stored = all(stored.get(f"data.{name}") == getattr(config.data, name) for name in ("name", "root"))
    return _sets(overrides, "data.root", "data.name") or not is_stored


def _sets(overrides: list[str], *names: str) -> bool:
    return any(override.partition("=")[0] in names for override in overrides)


def _run_folder_of(path: Path) -> Path | None:
    """Returns the run folder that contains a checkpoint or a file of weights; None if there is none."""
    candidates = [path, *path.resolve().parents[:2]]
    return next((candidate for candidate in candidates if has_started(candidate)), None)


def _data_overrides(run_folder: Path, config: RunConfig) -> list[str]:
    """Returns settings that find the run's data from any working directory.

    A relative data.root counts from the directory in which the run was started, which environment.json records.
    """
    if Path(config.data.root).is_dir():
        return []
    environment = RunRecord(run_folder).environment
    data_root = Path(environment.get("directory", "")) / config.data.root
    return [f"data.root={data_root}"] if data_root.is_dir() else ["data.download=false"]
