"""What a step costs in messages as the number of ranks grows: counted on real ranks, modelled to 1,024 GPUs.

    python benchmarks/messages.py

Counted: all-reduces and messages between two ranks of a training on 2 and on 4 gloo ranks, 60 steps, from the 5th on,
DDP's own all-reduce of the gradients apart. Modelled: with N ranks a ring's all-reduce of S bytes sends 2 (N - 1) / N S
bytes from each, a tree's small one takes 2 log2 N messages one after the other, of --latency-microseconds each. Writes
messages.json and messages.md.
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

STEPS, FIRST = 60, 5
MODELLED = (2, 8, 64, 512, 1024)
BEAT_SECONDS = 5.0  # trainer/watch.py


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--latency-microseconds", type=float, default=20.0)
    parser.add_argument("--step-milliseconds", type=float, default=100.0, help="of the modelled training")
    arguments = parser.parse_args()
    counted, rows = [], []
    for model in ("lenet", "resnet18"):
        for ranks in arguments.ranks:
            for virtual in ("null", str(ranks)):
                found = _count(model, ranks, virtual)
                counted.append({"model": model, "ranks": ranks, "virtual_ranks": virtual} | found)
                rows.append(
                    f"{model}, {'plain' if virtual == 'null' else 'virtual ranks'} | {ranks} "
                    f"| {found['gradient_bytes']:,} | {found['each_step']} | {found['now_and_then']}"
                )
                print(rows[-1], flush=True)
    head = "training | ranks | gradient, bytes | besides it, every step | now and then"
    text = report.table(head, rows) + "\n" + _model(arguments, counted)
    print(text)
    report.write(arguments.output, "messages", __doc__, {"counted": counted}, text)
    return 0


def _count(model: str, ranks: int, virtual_ranks: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root:
        result = Path(root) / "calls.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
            str(Path(__file__).parent / "contestants" / "message_counts.py"), str(result), "--config", "digits",
            f"model.name={model}", f"train.max_steps={STEPS if model == 'lenet' else 12}", "log.wandb=off",
            "log.tensorboard=false", "log.every_steps=10", "eval.every_epochs=0", f"run.root={root}", "run.name=run",
            f"train.virtual_ranks={virtual_ranks}", "train.precision=fp32", "data.drop_last=true", "train.device=cpu",
        ]  # fmt: skip
        if model == "resnet18":
            command += ["data.global_batch_size=8"]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        found = json.loads(result.read_text())
    steps = sorted({step for step, _, _ in found["calls"] if step >= 0} | {0})
    kept = range(FIRST, (steps[-1] if steps[-1] > FIRST else 12) - 1)
    in_step = Counter((kind, size) for step, kind, size in found["calls"] if step in kept)
    every = {key: count for key, count in in_step.items() if count >= len(kept)}
    rare = {key: count for key, count in in_step.items() if count < len(kept)}
    return {
        "gradient_bytes": found["gradient_bytes"],
        "each_step": "; ".join(f"{n / len(kept):g} x {kind} {size:,} B" for (kind, size), n in every.items()) or "none",
        "now_and_then": "; ".join(f"{kind} {size:,} B, {n} in {len(kept)} steps" for (kind, size), n in rare.items())
        or "none",
    }


def _model(arguments: argparse.Namespace, counted: list[dict[str, Any]]) -> str:
    """ResNet-18, plain; the stop's agreement every half second at least, a line every 50 steps, a beat every 5 s."""
    gradient = next(case["gradient_bytes"] for case in counted if case["model"] == "resnet18")
    statistics = 2 * 4 * 4800  # BatchNorm's means and variances of ResNet-18, float32
    step = arguments.step_milliseconds / 1e3
    agreements = 1 / min(20, max(1, int(0.5 / step)))  # a step's share of them
    rows = []
    for ranks in MODELLED:
        ring = 2 * (ranks - 1) / ranks
        small = 2 * math.log2(ranks) * arguments.latency_microseconds * 1e-6
        seconds = small * (1 + agreements + 1 / 50)
        rows.append(
            f"{ranks:,} | {ring * gradient / 1e6:.1f} MB | {ring * statistics / 1e3:.0f} kB "
            f"| {ring * 16 * agreements:.1f} B | {ring * 16 / 50:.2f} B | {ranks / BEAT_SECONDS:,.0f} "
            f"| {1e6 * seconds:.0f} µs, {seconds / step:.2%}"
        )
    head = (
        "ranks | gradient (any DDP) | BatchNorm's moves | stop | a line's sums | beats at rank 0, a second | ours, time"
    )
    return (
        f"Modelled: ResNet-18, {arguments.step_milliseconds:g} ms a step, {arguments.latency_microseconds:g} µs a "
        f"message; bytes that each rank sends in a step.\n\n" + report.table(head, rows)
    )


if __name__ == "__main__":
    raise SystemExit(main())
