"""Measures the peak memory of CIFAR-10 training against a bare loop over uint8 images in memory.

    python benchmarks/memory.py --images FOLDER

Each measurement is the largest resident set of a process; reports medians over the rounds. samecurve trains as
`python trainer/main.py` does, with evaluation, checkpoint and metrics.jsonl. Writes memory.json and memory.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import report
from turns import contestant_command


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        settings = report.contestant_settings(arguments, **workload.settings, steps=arguments.steps)
        peaks: dict[str, list[int]] = {"bare": [], "samecurve": []}
        for _ in range(arguments.rounds):
            peaks["bare"].append(_peak_kilobytes(contestant_command("memory_bare", settings)))
            with tempfile.TemporaryDirectory() as root:
                peaks["samecurve"].append(_peak_kilobytes(_training_command(arguments, workload, root)))
        megabytes = {name: round(statistics.median(kilobytes) / 1e3) for name, kilobytes in peaks.items()}
        ratio = round(megabytes["samecurve"] / megabytes["bare"], 3)
        cases.append(workload.settings | {"megabytes": megabytes, "ratio": ratio, "goal": 1.15})
        rows.append(f"{workload} | {megabytes['bare']:,} | {megabytes['samecurve']:,} | {ratio:.3f}")
        print(rows[-1], flush=True)
        head = " | bare loop, MB | samecurve, MB | ratio"
        report.write(arguments.output, "memory", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


def _training_command(arguments: argparse.Namespace, workload: report.Workload, root: str) -> list[str]:
    return [
        sys.executable, report.MAIN, *report.data_overrides(arguments), f"model.name={workload.model}",
        f"data.global_batch_size={workload.batch_size}", "data.augment=[flip,crop]",
        f"train.max_steps={arguments.steps}", "log.tensorboard=false", "log.wandb=off",
        f"train.threads_per_rank={arguments.threads}", f"run.root={root}", "run.name=run", "train.precision=fp32",
    ]  # fmt: skip


def _peak_kilobytes(command: list[str]) -> int:
    """Runs a command. Returns the largest resident set of its process. Raises RuntimeError if it fails."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    output = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)  # instead of process.wait(), which returns no usage
    if status:
        raise RuntimeError(f"{command} failed: {output[-2000:]}")
    return usage.ru_maxrss


if __name__ == "__main__":
    raise SystemExit(main())
