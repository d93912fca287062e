"""What the same bits on any number of ranks cost: virtual ranks against plain ranks and against one process.

    python benchmarks/virtual_ranks.py [--models lenet tudui resnet18] [--rounds 3]

Runs of trainer/main.py, one after the other, the ways alternating; images/s are medians over the rounds. Writes
virtual_ranks.json and virtual_ranks.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import report

MAIN = str(report.REPOSITORY / "trainer" / "main.py")
# Ranks, virtual ranks (0: plain), threads of each rank: on two cores, all share the same two.
WAYS = [(1, 0, 2), (1, 4, 2), (2, 0, 1), (2, 2, 1), (2, 4, 1), (4, 0, 1), (4, 4, 1)]
# Batch, steps such that a run takes some seconds, steps a line; images are scikit-learn's digits as 3 x 32 x 32.
SIZES = {"lenet": (64, 1500, 100), "tudui": (256, 24, 1), "resnet18": (64, 7, 1)}


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--models", nargs="+", default=["lenet", "tudui", "resnet18"], choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for model in arguments.models:
            for way in WAYS:
                name = f"{model} {way[0]} {way[1]}"
                speeds.setdefault(name, []).append(images_per_second(model, *way))
                print(f"{name}: {speeds[name][-1]:,.1f} images/s", flush=True)
    table = as_table(arguments.models, {name: statistics.median(values) for name, values in speeds.items()})
    report.write(arguments.output, "virtual_ranks", __doc__, {"images_per_second": speeds}, table)
    print(table)
    return 0


def images_per_second(model: str, ranks: int, virtual_ranks: int, threads: int) -> float:
    """The median over a run's lines but the first three."""
    batch, steps, steps_a_line = SIZES[model]
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory(prefix="samecurve-speed-") as root:
        settings: dict[str, Any] = {
            "model.name": model, "data.channels": 3, "optim.lr": 0.001, "data.global_batch_size": batch,
            "train.max_steps": steps,
            "train.threads_per_rank": threads, "train.virtual_ranks": virtual_ranks or "null",
            "log.every_steps": steps_a_line, "train.precision": "fp32", "train.epochs": 99999,
            "data.augment": "[crop]", "log.wandb": "off", "log.tensorboard": "false", "eval.every_epochs": 0,
            "checkpoint.every_epochs": 0, "run.root": root, "run.name": "run",
        }  # fmt: skip
        command = [sys.executable, *launcher, MAIN, "--config", "digits"]
        command += [f"{name}={value}" for name, value in settings.items()]
        # The end, where it evaluates, is not waited for: its steps are all there is to see.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return statistics.median(
                wait_for_speeds(Path(root) / "run" / "metrics.jsonl", steps // steps_a_line, process)[3:]
            )
        finally:
            process.terminate()
            process.wait(60)


def wait_for_speeds(metrics: Path, num_lines: int, process: "subprocess.Popen[bytes]") -> list[float]:
    while True:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        found = [row["samples_per_second"] for row in rows if row["split"] == "train"]
        if len(found) == num_lines:
            return found
        if process.poll() not in (None, 0):
            raise RuntimeError(f"a run ended with exit code {process.returncode}")
        time.sleep(0.05)


def as_table(models: list[str], speeds: dict[str, float]) -> str:
    rows = []
    for model in models:
        for ranks, virtual_ranks, _ in WAYS:
            speed = speeds[f"{model} {ranks} {virtual_ranks}"]
            plain, alone = speeds[f"{model} {ranks} 0"], speeds[f"{model} 1 0"]
            ratios = f"{speed / plain:.2f} | {speed / alone:.2f}"
            rows.append(f"{model} | {ranks} | {virtual_ranks or 'plain'} | {speed:,.0f} | {ratios}")
    head = "network | ranks | virtual ranks | images/s | of plain on as many ranks | of one process"
    return report.table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
