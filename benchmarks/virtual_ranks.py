"""Measures the cost of equal bits on any world size: virtual ranks against plain ranks and against one process.

    python benchmarks/virtual_ranks.py [--models lenet tudui resnet18] [--rounds 3]

Runs trainer/main.py in sequence and alternates the layouts; reports the medians of images/s over the rounds. Writes
virtual_ranks.json and virtual_ranks.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import report


class Layout(NamedTuple):
    """How the samples of a batch are shared."""

    ranks: int
    virtual_ranks: int
    """0: plain ranks"""
    threads: int
    """of each rank"""


class RunLength(NamedTuple):
    """The batch size of a network, and a number of steps that takes some seconds."""

    batch_size: int
    steps: int
    log_every_steps: int


# On two cores, which all ranks share.
LAYOUTS = [Layout(1, 0, 2), Layout(1, 4, 2), Layout(2, 0, 1), Layout(2, 2, 1), Layout(2, 4, 1)]
LAYOUTS += [Layout(4, 0, 1), Layout(4, 4, 1)]
# Images are scikit-learn's digits as 3 x 32 x 32.
LENGTHS = {"lenet": RunLength(64, 1500, 100), "tudui": RunLength(256, 24, 1), "resnet18": RunLength(64, 7, 1)}
_NUM_SKIPPED_ROWS = 3  # warm-up


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for model in arguments.models:
            for layout in LAYOUTS:
                key = _key(model, layout.ranks, layout.virtual_ranks)
                speeds.setdefault(key, []).append(_images_per_second(model, layout))
                print(f"{key}: {speeds[key][-1]:,.1f} images/s", flush=True)
    table = _table(arguments.models, {key: statistics.median(values) for key, values in speeds.items()})
    report.write(arguments.output, "virtual_ranks", __doc__, {"images_per_second": speeds}, table)
    print(table)
    return 0


def _key(model: str, ranks: int, virtual_ranks: int) -> str:
    return f"{model} {ranks} {virtual_ranks}"


def _images_per_second(model: str, layout: Layout) -> float:
    """Trains a run. Returns the median speed over its rows of metrics, without the first three."""
    length = LENGTHS[model]
    launcher: list[str] = []
    if layout.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={layout.ranks}"]
    with tempfile.TemporaryDirectory(prefix="samecurve-speed-") as root:
        settings: dict[str, Any] = {
            "model.name": model, "data.channels": 3, "optim.lr": 0.001, "data.global_batch_size": length.batch_size,
            "train.max_steps": length.steps, "train.threads_per_rank": layout.threads,
            "train.virtual_ranks": layout.virtual_ranks or "null", "log.every_steps": length.log_every_steps,
            "train.precision": "fp32", "train.epochs": 99999,
            "data.augment": "[crop]", "log.wandb": "off", "log.tensorboard": "false", "eval.every_epochs": 0,
            "checkpoint.every_epochs": 0, "run.root": root, "run.name": "run",
        }  # fmt: skip
        command = [sys.executable, *launcher, report.MAIN, "--config", "digits"]
        command += [f"{name}={value}" for name, value in settings.items()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            num_rows = length.steps // length.log_every_steps
            speeds = _wait_for_speeds(Path(root) / "run" / "metrics.jsonl", num_rows, process)
            return statistics.median(speeds[_NUM_SKIPPED_ROWS:])
        finally:  # does not wait for the evaluation at the end
            process.terminate()
            process.wait(60)


def _wait_for_speeds(metrics: Path, num_rows: int, process: "subprocess.Popen[bytes]") -> list[float]:
    """Returns samples_per_second of all training rows as soon as there are `num_rows`."""
    while True:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # the last line may be incomplete
        speeds = [row["samples_per_second"] for row in rows if row["split"] == "train"]
        if len(speeds) == num_rows:
            return speeds
        if process.poll() not in (None, 0):
            raise RuntimeError(f"a run ended with exit code {process.returncode}")
        time.sleep(0.05)


def _table(models: list[str], speeds: dict[str, float]) -> str:
    rows = []
    for model in models:
        for ranks, virtual_ranks, _ in LAYOUTS:
            speed = speeds[_key(model, ranks, virtual_ranks)]
            plain, one_process = speeds[_key(model, ranks, 0)], speeds[_key(model, 1, 0)]
            ratios = f"{speed / plain:.2f} | {speed / one_process:.2f}"
            rows.append(f"{model} | {ranks} | {virtual_ranks or 'plain'} | {speed:,.0f} | {ratios}")
    head = "network | ranks | virtual ranks | images/s | relative to as many plain ranks | relative to one process"
    return report.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
