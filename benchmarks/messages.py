"""Counts the messages of a training step on real ranks, and models their cost up to 1,024 GPUs.

    python benchmarks/messages.py

Counted: all-reduces and messages between two ranks on 2 and 4 gloo ranks, from step 5 on, without DDP's own all-reduce
of the gradients. Modelled: on N ranks a ring all-reduce of S bytes sends 2 (N - 1) / N S bytes from each rank, and a
small tree all-reduce takes 2 log2 N messages in sequence, each of --latency-microseconds. Writes messages.json and
messages.md.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import report

NUM_STEPS = {"lenet": 60, "resnet18": 12}
FIRST_COUNTED_STEP = 5
MODELLED_RANKS = (2, 8, 64, 512, 1024)
HEARTBEAT_SECONDS = 5.0  # as in trainer/run/watchdog.py
RESNET18_BATCHNORM_BYTES = 2 * 4 * 4800  # running means and variances, float32
STOP_CHECK_BYTES = LOG_BYTES = 16
LOG_EVERY_STEPS = 50


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--models", nargs="+", default=list(NUM_STEPS), choices=list(NUM_STEPS))
    parser.add_argument("--latency-microseconds", type=float, default=20.0)
    parser.add_argument("--step-milliseconds", type=float, default=100.0, help="step time of the modelled training")
    arguments = parser.parse_args()
    counted, rows = [], []
    for model in arguments.models:
        for ranks in arguments.ranks:
            for virtual_ranks in ("null", str(ranks)):
                counts = _count(model, ranks, virtual_ranks)
                counted.append({"model": model, "ranks": ranks, "virtual_ranks": virtual_ranks} | counts)
                rows.append(
                    f"{model}, {'plain' if virtual_ranks == 'null' else 'virtual ranks'} | {ranks} "
                    f"| {counts['gradient_bytes']:,} | {counts['each_step']} | {counts['some_steps']}"
                )
                print(rows[-1], flush=True)
    head = "training | ranks | gradient, bytes | other messages, every step | other messages, some steps"
    text = report.table(head, rows) + "\n" + _model(arguments, counted)
    print(text)
    report.write(arguments.output, "messages", __doc__, {"counted": counted}, text)
    return 0


def _count(model: str, ranks: int, virtual_ranks: str) -> dict[str, Any]:
    """Trains with contestants/message_counts.py. Returns the messages of rank 0 as text."""
    with tempfile.TemporaryDirectory() as root:
        result_path = Path(root) / "calls.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
            str(Path(__file__).parent / "contestants" / "message_counts.py"), str(result_path), "--config", "digits",
            f"model.name={model}", f"train.max_steps={NUM_STEPS[model]}", "log.wandb=off",
            "log.tensorboard=false", "log.every_steps=10", "eval.every_epochs=0", f"run.root={root}", "run.name=run",
            f"train.virtual_ranks={virtual_ranks}", "train.precision=fp32", "data.drop_last=true", "train.device=cpu",
        ]  # fmt: skip
        if model == "resnet18":
            command += ["data.global_batch_size=8"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        result = json.loads(result_path.read_text())
    steps = range(FIRST_COUNTED_STEP, NUM_STEPS[model] - 1)  # without the last, which also saves and evaluates
    counts = Counter((kind, size) for step, kind, size in result["calls"] if step in steps)
    each_step = [f"{n / len(steps):g} x {kind} {size:,} B" for (kind, size), n in counts.items() if n >= len(steps)]
    some_steps = [
        f"{kind} {size:,} B, {n} in {len(steps)} steps" for (kind, size), n in counts.items() if n < len(steps)
    ]
    return {
        "gradient_bytes": result["gradient_bytes"],
        "each_step": "; ".join(each_step) or "none",
        "some_steps": "; ".join(some_steps) or "none",
    }


def _model(arguments: argparse.Namespace, counted: list[dict[str, Any]]) -> str:
    """Models ResNet-18 without virtual ranks. Returns an empty text if it was not counted.

    The ranks agree on a stop every 20 steps, or every half second if that is more often; a row of metrics is due every
    50 steps, a heartbeat every 5 s.
    """
    gradient_bytes = next((case["gradient_bytes"] for case in counted if case["model"] == "resnet18"), None)
    if gradient_bytes is None:
        return ""
    step_seconds = arguments.step_milliseconds / 1e3
    stop_checks = 1 / min(20, max(1, int(0.5 / step_seconds)))  # in a step
    rows = []
    for ranks in MODELLED_RANKS:
        ring = 2 * (ranks - 1) / ranks
        tree_seconds = 2 * math.log2(ranks) * arguments.latency_microseconds * 1e-6
        seconds = tree_seconds * (1 + stop_checks + 1 / LOG_EVERY_STEPS)
        rows.append(
            f"{ranks:,} | {ring * gradient_bytes / 1e6:.1f} MB | {ring * RESNET18_BATCHNORM_BYTES / 1e3:.0f} kB "
            f"| {ring * STOP_CHECK_BYTES * stop_checks:.1f} B | {ring * LOG_BYTES / LOG_EVERY_STEPS:.2f} B "
            f"| {ranks / HEARTBEAT_SECONDS:,.0f} | {1e6 * seconds:.0f} µs, {seconds / step_seconds:.2%}"
        )
    head = "ranks | gradient (any DDP) | BatchNorm statistics | stop check | sums of a row "
    head += "| heartbeats at rank 0, per second | samecurve's messages, time"
    return (
        f"Modelled: ResNet-18, {arguments.step_milliseconds:g} ms a step, {arguments.latency_microseconds:g} µs a "
        f"message; bytes that each rank sends in a step.\n\n" + report.table(head, rows)
    )


if __name__ == "__main__":
    raise SystemExit(main())
