"""Peak memory of CIFAR-10 training against the bare loop that holds the uint8 images.

    python benchmarks/memory.py --images FOLDER

Each a process of its own, its largest resident set as the kernel counts it; medians of the rounds. samecurve trains as
`python trainer/main.py` does, evaluation, checkpoint and JSON lines included. Writes memory.json and memory.md.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import report
from turns import script


def main() -> int:
    parser = report.parser(__doc__)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        settings = report.given(arguments, **workload.settings, steps=arguments.steps)
        peaks: dict[str, list[int]] = {"bare": [], "samecurve": []}
        for _ in range(arguments.rounds):
            peaks["bare"].append(_peak(script("memory_bare", settings)))
            with tempfile.TemporaryDirectory() as root:
                peaks["samecurve"].append(_peak(_command(arguments, workload, root)))
        megabytes = {name: round(statistics.median(found) / 1e3) for name, found in peaks.items()}
        ratio = round(megabytes["samecurve"] / megabytes["bare"], 3)
        cases.append(workload.settings | {"megabytes": megabytes, "ratio": ratio, "goal": 1.15})
        rows.append(f"{workload} | {megabytes['bare']:,} | {megabytes['samecurve']:,} | {ratio:.3f}")
        print(rows[-1], flush=True)
        head = " | bare loop, MB | samecurve, MB | ratio"
        report.write(arguments.output, "memory", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


def _command(arguments: argparse.Namespace, workload: report.Workload, root: str) -> list[str]:
    command = [
        sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "data.name=image_folder",
        f"data.root={arguments.images}", f"model.name={workload.model}",
        f"data.global_batch_size={workload.batch_size}",
        "data.augment=[flip,crop]", f"train.max_steps={arguments.steps}", "log.tensorboard=false", "log.wandb=off",
        f"train.threads_per_rank={arguments.threads}", f"run.root={root}", "run.name=run", "train.precision=fp32",
    ]  # fmt: skip
    return command + ([f"data.cache_dir={arguments.cache}"] if arguments.cache else [])


def _peak(command: list[str]) -> int:
    """Kilobytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command}: {said[-2000:]}")
    return usage.ru_maxrss


if __name__ == "__main__":
    raise SystemExit(main())
