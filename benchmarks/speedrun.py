"""The speedrun recipe against airbench94, whose loop runs on this CPU as its author wrote it.

    python benchmarks/speedrun.py --images FOLDER [--whole own|peer|both|none] [--rounds 5] [--seed 0]

By turns: seconds a step of airbench94 (bf16 by autocast, and fp32) and of configs/speedrun94.yaml at each of its image
sizes; from these the time that the steps of a whole training take. airbench94 is given 8 epochs; its package takes 9.9.
With --whole samecurve (own), airbench94 (peer), or both are also trained to the end, one after the other, and their
accuracy on the test set is told, plain and with test-time augmentation. Writes speedrun.json and speedrun.md.
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
from turns import Contestant, race, script

from trainer.config.load import find_config_file, flatten, load_config
from trainer.config.schema import RunConfig

AIRBENCH_BATCH, AIRBENCH_EPOCHS, IMAGES = 1024, 8, 50_000
_STEPS = 4  # a turn: taken singly, airbench94's were slower than in its whole training


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--config", default="speedrun94")
    parser.add_argument("--whole", choices=["own", "peer", "both", "none"], default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16", help="airbench94's, for --whole")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"goal": 0.7}
    if arguments.rounds:
        result |= _race(arguments)
    if arguments.whole in ("own", "both"):
        result["samecurve"] = _own(arguments)
    if arguments.whole in ("peer", "both"):
        result["airbench94"] = _airbench(arguments)
    if arguments.whole == "both":
        result["ratio_whole"] = round(result["samecurve"]["seconds"] / result["airbench94"]["seconds"], 3)
    text = _text(result)
    print(text)
    report.write(arguments.output, "speedrun", __doc__, result, text)
    return 0


def _race(arguments: argparse.Namespace) -> dict[str, Any]:
    """Some steps of each a turn."""
    config = load_config([find_config_file(arguments.config)], [])
    size, epochs = config.data.global_batch_size, config.train.epochs
    sizes = config.data.progressive_sizes or [config.data.side_pixels]
    theirs = {
        precision: Contestant(
            f"airbench94, {precision}",
            script(
                "airbench94",
                report.given(arguments, batch_size=AIRBENCH_BATCH, epochs=AIRBENCH_EPOCHS, precision=precision),
            ),
        )
        for precision in ("bf16", "fp32")
    }
    own = {
        side: Contestant(f"samecurve, {side} pixels", _own_steps(arguments, config, side))
        for side in sorted(set(sizes))
    }
    race([*theirs.values(), *own.values()], arguments.rounds, _STEPS, 2)
    seconds = {name: statistics.median(each.seconds) for name, each in theirs.items()}
    airbench = {name: one * AIRBENCH_EPOCHS * (IMAGES // AIRBENCH_BATCH) for name, one in seconds.items()}
    steps = IMAGES // size
    one_step = {side: statistics.median(each.seconds) for side, each in own.items()}
    by_step = [one_step[sizes[step // steps * len(sizes) // epochs]] for step in range(epochs * steps)]
    total = sum(by_step[: config.train.max_steps])
    return {
        "images_per_second": {each.name: round(AIRBENCH_BATCH / seconds[name], 1) for name, each in theirs.items()}
        | {each.name: round(size / one_step[side], 1) for side, each in own.items()},
        "seconds_of_all_steps": {"samecurve": round(total)}
        | {f"airbench94, {name}": round(other) for name, other in airbench.items()},
        "ratio_of_steps": {name: round(total / other, 3) for name, other in airbench.items()},
    }  # fmt: skip


def _own_steps(arguments: argparse.Namespace, config: RunConfig, side: int) -> list[str]:
    flat = flatten(config)
    kept = ("data.augment", "data.crop", "data.normalize", "optim.", "loss.", "train.precision")
    overrides = [f"{name}={value}" for name, value in flat.items() if name.startswith(kept) and value is not None]
    overrides += [f"data.progressive_sizes=[{side}]", f"model.depth={config.model.depth}"]
    overrides += [f"model.widths={config.model.widths}"]
    settings = report.given(
        arguments, model=config.model.name, batch_size=config.data.global_batch_size, overrides=overrides,
        precision=config.train.precision,
    )  # fmt: skip
    return script("samecurve", settings)


def _own(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        command = [
            sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "--config", arguments.config,
            "data.name=image_folder", f"data.root={arguments.images}", f"run.root={root}", "run.name=run",
            f"train.threads_per_rank={arguments.threads}", f"run.seed={arguments.seed}", "log.wandb=off",
        ]  # fmt: skip
        command += [f"data.cache_dir={arguments.cache}"] if arguments.cache else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(root) / "run" / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(root) / "run" / "metrics.jsonl").read_text().splitlines()]
        trained = max(line["seconds"] for line in lines if line["split"] == "train")
    test = summary["test"]
    return {"seconds": round(trained), "accuracy": test["accuracy"], "tta_accuracy": test["tta_accuracy"]}


def _airbench(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        result = str(Path(root) / "result.json")
        settings = report.given(
            arguments, batch_size=AIRBENCH_BATCH, epochs=AIRBENCH_EPOCHS, precision=arguments.precision,
            seed=arguments.seed, result=result,
        )  # fmt: skip
        subprocess.run(script("airbench94", settings), check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(Path(result).read_text())
    return found | {"seconds": round(found["seconds"]), "precision": arguments.precision}


def _text(result: dict[str, Any]) -> str:
    text = ""
    if "images_per_second" in result:
        rows = [f"{name} | {speed:,.0f}" for name, speed in result["images_per_second"].items()]
        text += report.table(" | images/s", rows) + "\n"
        rows = [f"{name} | {seconds:,}" for name, seconds in result["seconds_of_all_steps"].items()]
        text += report.table("steps of a whole training | seconds", rows) + "\n"
        ratios = ", ".join(f"{ratio} of airbench94's in {name}" for name, ratio in result["ratio_of_steps"].items())
        text += f"samecurve's steps take {ratios}.\n\n"
    rows = [
        f"{name} | {found['seconds']:,} | {found['accuracy']:.2%} | {found['tta_accuracy']:.2%}"
        for name in ("samecurve", "airbench94")
        if (found := result.get(name))
    ]
    if rows:
        text += report.table("trained to the end | seconds | plain | with test-time augmentation", rows)
    return text


if __name__ == "__main__":
    raise SystemExit(main())
