"""Evaluation of CIFAR-10's 10,000 test images against bare forward passes over batches that are ready.

    python benchmarks/evaluation.py --images FOLDER

In one process, one after the other; medians of the rounds. Writes evaluation.json and evaluation.md.
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


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["lenet", "tudui", "resnet18"])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    cases, rows = [], []
    for model in arguments.models:
        ratios, seconds = _race(arguments, model, arguments.rounds if model != "resnet18" else 3)
        ratio = round(statistics.median(ratios), 3)
        cases.append({"model": model, "ratio": ratio, "goal": 0.97, "seconds": seconds})
        rows.append(f"{model} | {statistics.median(seconds):.2f} | {ratio:.3f}")
        print(rows[-1], flush=True)
    head = " | seconds for 10,000 images | speed, of bare forward passes"
    report.write(arguments.output, "evaluation", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


def _race(arguments: argparse.Namespace, model: str, rounds: int) -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory() as root:
        settings = [
            "data.name=image_folder", f"data.root={arguments.images}", f"model.name={model}", f"run.root={root}",
            "run.name=run", f"train.threads_per_rank={arguments.threads}", "train.precision=fp32",
        ]  # fmt: skip
        settings += [f"data.cache_dir={arguments.cache}"] if arguments.cache else []
        config = load_config([], settings)
        with World(config.train) as world:
            made = build_components(config, world, None, NullWatchdog(), print)
            test = made.splits.test
            # As PyTorch has it, without what trainer/pooling.py changes.
            bare = build_model(config.model, 10, 3, 32).to(memory_format=torch.channels_last).eval()
            ready = [made.augment.normalize(images) for images in test.images.split(config.eval.batch_size)]
            ratios, seconds = [], []
            for index in range(rounds + 1):
                times = {}
                for name in ("bare", "own")[:: -1 if index % 2 else 1]:
                    began = perf_counter()
                    if name == "own":
                        made.evaluate(test, config, world, lambda: None)
                    else:
                        with torch.no_grad():
                            for batch in ready:
                                bare(batch)
                    times[name] = perf_counter() - began
                if index:  # the first one warms up
                    ratios.append(times["bare"] / times["own"])
                    seconds.append(times["own"])
    return ratios, seconds


if __name__ == "__main__":
    raise SystemExit(main())
