"""On a GPU: ResNet-18's images/s against a bare loop, the speedrun against airbench94, idle share, checkpoint stall.

    python benchmarks/gpu.py --images FOLDER

Under eight minutes on a recent GPU. ResNet-18: batch 512, bf16, channels last, by turns with a bare loop over batches
that lie on the GPU. The speedrun is trained whole, tracked and evaluated, and so is airbench94, by its own package.
Idle: the share of 20 steps, by torch.profiler, in which no kernel ran. Writes gpu.json and gpu.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
from turns import Contestant, race, script, speed_ratio

from trainer.config.load import load_config
from trainer.data import image_folder

BATCH = 512
AIRBENCH = """
import json, sys, torch
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/benchmarks", sys.argv[2] + "/benchmarks/contestants"]
import numpy as np
from pathlib import Path
from trainer import config
from trainer.datasets import image_folder
given = json.loads(sys.argv[1])
cache = [f"data.cache_dir={given['cache']}"] if given["cache"] else []
data = config.load([], ["data.name=image_folder", f"data.root={given['images']}", *cache]).data
found = image_folder.load(data)
Path("cifar10").mkdir()
for split in ("train", "test"):
    part = getattr(found, split)
    order = np.random.default_rng(0).permutation(len(part.labels))
    torch.save({"images": torch.from_numpy(part.images[order]), "labels": torch.from_numpy(part.labels[order]),
                "classes": list(found.classes)}, f"cifar10/{split}.pt")
import airbench
airbench.warmup94()
for _ in range(3):
    airbench.train94()
"""


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    where = report.machine()
    if where["gpu"] is None:
        print("benchmarks/gpu.py: torch sees no GPU here; nothing was measured", file=sys.stderr)
        return 2
    cache = [f"data.cache_dir={arguments.cache}"] if arguments.cache else []
    # Decoded here, once: a contestant that did it would be run anew by each process that decodes.
    image_folder.load(load_config([], ["data.name=image_folder", f"data.root={arguments.images}", *cache]).data)
    settings = report.given(arguments, model="resnet18", batch_size=BATCH, precision="bf16", device="cuda")
    bare, own = (
        Contestant("bare loop", script("bare", settings)),
        Contestant("samecurve", script("samecurve", settings)),
    )
    race([bare, own], arguments.rounds, 30, 60)
    idle = _own(arguments, "cifar10", ["train.max_steps=120", "eval.every_epochs=0"], profile=True)
    speedrun = [
        _own(arguments, "speedrun94", [f"run.seed={seed}", "eval.every_epochs=1", "log.tensorboard=true"])
        for seed in range(3)
    ]
    result: dict[str, Any] = {
        "resnet18": {
            "images_per_second": {each.name: round(BATCH / statistics.median(each.seconds)) for each in (own, bare)},
            "of_bare": round(speed_ratio(own, bare), 3), "goal": 0.97,
        },
        "one_run": idle, "speedrun": speedrun, "airbench94": _airbench(arguments),
    }  # fmt: skip
    text = f"```json\n{json.dumps(result, indent=1)}\n```\n"
    print(text)
    report.write(arguments.output, "gpu", __doc__, result, text)
    return 0


def _own(arguments: argparse.Namespace, config: str, overrides: list[str], profile: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, str(Path(__file__).parent / "contestants" / "gpu_run.py"), str(int(profile)), root]
        command += ["--config", config, "data.name=image_folder", f"data.root={arguments.images}", "log.wandb=off"]
        command += [f"run.root={root}", "run.name=run", *overrides]
        command += [f"data.cache_dir={arguments.cache}"] if arguments.cache else []
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:  # what else was measured is kept
            return {"failed": done.stderr[-1500:]}
        found: dict[str, Any] = json.loads((Path(root) / "found.json").read_text())
        summary = json.loads((Path(root) / "run" / "summary.json").read_text())
        samples = json.loads((Path(root) / "run" / "metrics.jsonl").read_text().splitlines()[-1])["samples"]
    # airbench94's own clock leaves out evaluations between and what looks at them: both are told of ours.
    found["seconds_of_steps"] = round(samples / summary["train"]["samples_per_second"], 3)
    return found | {name: summary["test"][name] for name in ("accuracy", "tta_accuracy")}


def _airbench(arguments: argparse.Namespace) -> str:
    """What its own program says of three trainings."""
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", AIRBENCH, json.dumps(report.given(arguments)), str(report.REPOSITORY)]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=dict(os.environ))
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr[-1500:]}"


if __name__ == "__main__":
    raise SystemExit(main())
