"""Measures training on a GPU: speed against a bare loop and airbench94, idle share, and the stall of a checkpoint.

    python benchmarks/gpu.py --images FOLDER

Takes under eight minutes on a recent GPU. ResNet-18 (batch 512, bf16, channels last) takes turns with a bare loop over
batches that are already on the GPU. The speedrun is trained to the end with tracking and evaluation, and so is
airbench94, by its own package. The idle share is the share of 20 steps in which no kernel ran, by torch.profiler.
Writes gpu.json and gpu.md.
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
from turns import Contestant, contestant_command, race, speed_ratio

from trainer.config.load import load_config
from trainer.data import image_folder

BATCH_SIZE = 512
NUM_SPEEDRUNS = 3
_LONGEST_ERROR = 1500  # characters of a failed program's output that are kept
AIRBENCH_PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np, torch
sys.path.insert(0, sys.argv[2])
from trainer.config.load import load_config
from trainer.data import image_folder
if __name__ == "__main__":
    dataset = image_folder.load(load_config([], json.loads(sys.argv[1])).data)
    Path("cifar10").mkdir()
    for name in ("train", "test"):
        split = getattr(dataset, name)
        order = np.random.default_rng(0).permutation(len(split.labels))
        torch.save({"images": torch.from_numpy(split.images[order]), "labels": torch.from_numpy(split.labels[order]),
                    "classes": list(dataset.classes)}, f"cifar10/{name}.pt")
    import airbench
    airbench.warmup94()
    for _ in range(3):
        airbench.train94()
"""


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if report.describe_machine()["gpu"] is None:
        print("benchmarks/gpu.py: torch finds no GPU here, so nothing was measured; run it on a GPU", file=sys.stderr)
        return 2
    # Fills the cache here: processes that decode images start anew as copies of a contestant, and would not take turns.
    image_folder.load(load_config([], report.data_overrides(arguments)).data)
    settings = report.contestant_settings(
        arguments, model="resnet18", batch_size=BATCH_SIZE, precision="bf16", device="cuda"
    )
    bare = Contestant("bare loop", contestant_command("bare", settings))
    samecurve = Contestant("samecurve", contestant_command("samecurve", settings))
    race([bare, samecurve], arguments.rounds, 30, 60)
    profiled_run = _train(arguments, "cifar10", ["train.max_steps=120", "eval.every_epochs=0"], profile=True)
    speedruns = [
        _train(arguments, "speedrun94", [f"run.seed={seed}", "eval.every_epochs=1", "log.tensorboard=true"])
        for seed in range(NUM_SPEEDRUNS)
    ]
    result: dict[str, Any] = {
        "resnet18": {
            "images_per_second": {
                contestant.name: round(BATCH_SIZE / statistics.median(contestant.step_seconds))
                for contestant in (samecurve, bare)
            },
            "of_bare": round(speed_ratio(samecurve, bare), 3), "goal": 0.97,
        },
        "profiled_run": profiled_run, "speedrun": speedruns, "airbench94": _train_airbench(arguments),
    }  # fmt: skip
    text = f"```json\n{json.dumps(result, indent=1)}\n```\n"
    print(text)
    report.write(arguments.output, "gpu", __doc__, result, text)
    return 0


def _train(arguments: argparse.Namespace, config: str, overrides: list[str], profile: bool = False) -> dict[str, Any]:
    """Trains with contestants/gpu_run.py. Returns its measurements and the run's accuracy, or the error output."""
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, str(Path(__file__).parent / "contestants" / "gpu_run.py"), str(int(profile)), root]
        command += ["--config", config, *report.data_overrides(arguments), "log.wandb=off"]
        command += [f"run.root={root}", "run.name=run", *overrides]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:  # the other measurements are still written
            return {"failed": done.stderr[-_LONGEST_ERROR:]}
        measurements: dict[str, Any] = json.loads((Path(root) / "measurements.json").read_text())
        summary = json.loads((Path(root) / "run" / "summary.json").read_text())
        samples = json.loads((Path(root) / "run" / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    # airbench94's clock leaves out evaluations between epochs, so the time of the steps alone is reported too.
    measurements["seconds_of_steps"] = round(samples / summary["train"]["samples_per_second"], 3)
    return measurements | {name: summary["test"][name] for name in ("accuracy", "tta_accuracy")}


def _train_airbench(arguments: argparse.Namespace) -> str:
    """Returns the output of airbench94's own program for three trainings, or its error output."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = json.dumps(report.data_overrides(arguments))
        command = [sys.executable, "-c", AIRBENCH_PROGRAM, overrides, str(report.REPOSITORY)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-_LONGEST_ERROR:]}"


if __name__ == "__main__":
    raise SystemExit(main())
