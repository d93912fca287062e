"""Compares the speedrun recipe with airbench94, whose author's loop runs on this CPU.

    python benchmarks/speedrun.py --images FOLDER [--whole samecurve|airbench94|both|none] [--rounds 5] [--seed 0]

airbench94 (bf16 by autocast, and fp32) and configs/speedrun94.yaml at each of its image sizes take turns. The time of
all steps of a training follows from their step times; airbench94 trains for 8 epochs here, its package for 9.9.
--whole also trains the chosen recipes to the end, in sequence, and reports their accuracy on the test set, with and
without test-time augmentation. Writes speedrun.json and speedrun.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from turns import Contestant, contestant_command, race

from trainer.config.load import find_config_file, flatten, load_config
from trainer.config.schema import RunConfig

AIRBENCH_BATCH_SIZE, AIRBENCH_EPOCHS, NUM_IMAGES = 1024, 8, 50_000
_STEPS_PER_TURN = 4  # in turns of one step airbench94 was slower than in a whole training
_STEP_SETTINGS = ("data.augment", "data.crop", "data.normalize", "optim.", "loss.", "train.precision")


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    parser.add_argument("--config", default="speedrun94")
    parser.add_argument("--whole", choices=["samecurve", "airbench94", "both", "none"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16", help="of airbench94 with --whole; default: bf16")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"goal": 0.7}
    if arguments.rounds:
        result |= _race(arguments)
    if arguments.whole in ("samecurve", "both"):
        result["samecurve"] = _train_samecurve(arguments)
    if arguments.whole in ("airbench94", "both"):
        result["airbench94"] = _train_airbench(arguments)
    if arguments.whole == "both":
        result["ratio_whole"] = round(result["samecurve"]["seconds"] / result["airbench94"]["seconds"], 3)
    text = _text(result)
    print(text)
    report.write(arguments.output, "speedrun", __doc__, result, text)
    return 0


def _race(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the step times and returns the speeds, and the seconds of all steps of a training."""
    config = load_config([find_config_file(arguments.config)], [])
    airbench = {
        precision: Contestant(f"airbench94, {precision}", _airbench_command(arguments, precision=precision))
        for precision in ("bf16", "fp32")
    }
    samecurve = {
        side: Contestant(f"samecurve, {side} pixels", _step_command(arguments, config, side))
        for side in sorted(set(_image_sizes(config)))
    }
    race([*airbench.values(), *samecurve.values()], arguments.rounds, _STEPS_PER_TURN, 2)
    airbench_steps = AIRBENCH_EPOCHS * (NUM_IMAGES // AIRBENCH_BATCH_SIZE)
    airbench_seconds = {
        contestant.name: statistics.median(contestant.step_seconds) * airbench_steps for contestant in airbench.values()
    }
    step_seconds = {side: statistics.median(contestant.step_seconds) for side, contestant in samecurve.items()}
    samecurve_seconds = _seconds_of_all_steps(config, step_seconds)
    speeds = {
        contestant.name: round(AIRBENCH_BATCH_SIZE / statistics.median(contestant.step_seconds), 1)
        for contestant in airbench.values()
    }
    batch_size = config.data.global_batch_size
    speeds |= {contestant.name: round(batch_size / step_seconds[side], 1) for side, contestant in samecurve.items()}
    all_seconds = {"samecurve": samecurve_seconds} | airbench_seconds
    return {
        "images_per_second": speeds,
        "seconds_of_all_steps": {name: round(seconds) for name, seconds in all_seconds.items()},
        "ratio_of_steps": {name: round(samecurve_seconds / seconds, 3) for name, seconds in airbench_seconds.items()},
    }


def _image_sizes(config: RunConfig) -> list[int]:
    return config.data.progressive_sizes or [config.data.side_pixels]


def _seconds_of_all_steps(config: RunConfig, step_seconds: dict[int, float]) -> float:
    """Returns the seconds of a whole training from the seconds of a step at each image size."""
    sizes, epochs = _image_sizes(config), config.train.epochs
    steps_per_epoch = NUM_IMAGES // config.data.global_batch_size
    by_step = [
        step_seconds[sizes[step // steps_per_epoch * len(sizes) // epochs]] for step in range(epochs * steps_per_epoch)
    ]
    return sum(by_step[: config.train.max_steps])


def _step_command(arguments: argparse.Namespace, config: RunConfig, side: int) -> list[str]:
    """Returns the command of a contestant that takes the recipe's steps at one image size."""
    overrides = [
        f"{name}={value}"
        for name, value in flatten(config).items()
        if name.startswith(_STEP_SETTINGS) and value is not None
    ]
    overrides += [f"data.progressive_sizes=[{side}]", f"model.depth={config.model.depth}"]
    overrides += [f"model.widths={config.model.widths}"]
    settings = report.contestant_settings(
        arguments, model=config.model.name, batch_size=config.data.global_batch_size, overrides=overrides,
        precision=config.train.precision,
    )  # fmt: skip
    return contestant_command("samecurve", settings)


def _airbench_command(arguments: argparse.Namespace, **settings: Any) -> list[str]:
    common = report.contestant_settings(arguments, batch_size=AIRBENCH_BATCH_SIZE, epochs=AIRBENCH_EPOCHS)
    return contestant_command("airbench94", common | settings)


def _train_samecurve(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable, report.MAIN, "--config", arguments.config, *report.data_overrides(arguments),
            f"run.root={root}", "run.name=run", f"train.threads_per_rank={arguments.threads}",
            f"run.seed={arguments.seed}", "log.wandb=off",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(root) / "run" / "summary.json").read_text())
        rows = [json.loads(line) for line in (Path(root) / "run" / "metrics.jsonl").read_text().splitlines()]
        seconds = max(row["seconds"] for row in rows if row["split"] == "train")  # without the last evaluation
    test = summary["test"]
    return {"seconds": round(seconds), "accuracy": test["accuracy"], "tta_accuracy": test["tta_accuracy"]}


def _train_airbench(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        result_path = Path(root) / "result.json"
        command = _airbench_command(
            arguments, precision=arguments.precision, seed=arguments.seed, result=str(result_path)
        )
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result: dict[str, Any] = json.loads(result_path.read_text())
    return result | {"seconds": round(result["seconds"]), "precision": arguments.precision}


def _text(result: dict[str, Any]) -> str:
    text = ""
    if "images_per_second" in result:
        rows = [f"{name} | {speed:,.0f}" for name, speed in result["images_per_second"].items()]
        text += report.table(" | images/s", rows) + "\n"
        rows = [f"{name} | {seconds:,}" for name, seconds in result["seconds_of_all_steps"].items()]
        text += report.table("all steps of a training | seconds", rows) + "\n"
        ratios = ", ".join(f"{ratio} of the time of {name}" for name, ratio in result["ratio_of_steps"].items())
        text += f"samecurve's steps take {ratios}.\n\n"
    rows = [
        f"{name} | {run['seconds']:,} | {run['accuracy']:.2%} | {run['tta_accuracy']:.2%}"
        for name in ("samecurve", "airbench94")
        if (run := result.get(name))
    ]
    if rows:
        text += report.table("trained to the end | seconds | accuracy | with test-time augmentation", rows)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
