"""Times the evaluation of CIFAR-10's 10,000 test images against bare forward passes over batches in memory.

    python benchmarks/evaluation.py --images FOLDER

Both take turns in one process; reports medians over the rounds. Writes evaluation.json and evaluation.md.
"""

import argparse
import statistics
import tempfile
from time import perf_counter

import report
import torch

from trainer.build import build_components
from trainer.config.load import load_config
from trainer.distributed.world import World
from trainer.models.lookup import build_model
from trainer.run.watchdog import NullWatchdog

_RESNET18_ROUNDS = 3  # one takes many seconds


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    parser.add_argument("--models", nargs="+", default=["lenet", "tudui", "resnet18"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    cases, rows = [], []
    for model in arguments.models:
        rounds = min(arguments.rounds, _RESNET18_ROUNDS) if model == "resnet18" else arguments.rounds
        bare, samecurve = _race(arguments, model, rounds)
        ratio = round(statistics.median(theirs / ours for theirs, ours in zip(bare, samecurve, strict=True)), 3)
        cases.append({"model": model, "ratio": ratio, "goal": 0.97, "seconds": samecurve})
        rows.append(f"{model} | {statistics.median(samecurve):.2f} | {ratio:.3f}")
        print(rows[-1], flush=True)
    head = " | seconds for 10,000 images | speed relative to bare forward passes"
    report.write(arguments.output, "evaluation", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


def _race(arguments: argparse.Namespace, model: str, rounds: int) -> tuple[list[float], list[float]]:
    """Returns the seconds of bare forward passes and of samecurve's evaluation, for each round."""
    with tempfile.TemporaryDirectory() as root:
        overrides = [
            *report.data_overrides(arguments), f"model.name={model}", f"run.root={root}", "run.name=run",
            f"train.threads_per_rank={arguments.threads}", "train.precision=fp32",
        ]  # fmt: skip
        config = load_config([], overrides)
        with World(config.train) as world:
            components = build_components(config, world, None, NullWatchdog(), print)
            test = components.splits.test
            network = build_model(config.model, 10, 3, 32).to(memory_format=torch.channels_last).eval()
            batches = [components.augment.normalize(images) for images in test.images.split(config.eval.batch_size)]

            def bare_forward_passes() -> None:
                with torch.no_grad():
                    for batch in batches:
                        network(batch)

            def samecurve_evaluation() -> None:
                components.evaluate(test, config, world, lambda: None)

            contestants = [bare_forward_passes, samecurve_evaluation]
            seconds: list[list[float]] = [[], []]
            for index in range(rounds + 1):
                for number in (1, 0) if index % 2 else (0, 1):
                    start = perf_counter()
                    contestants[number]()
                    if index:  # the first round is a warm-up
                        seconds[number].append(perf_counter() - start)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    raise SystemExit(main())
