"""Measures the time that trackers, report, figures and the W&B artifact add to a whole training.

    python benchmarks/observability.py --images FOLDER

Trains with all of them and with none by turns, each in a new process, from its start to its end. The test set is
evaluated after each epoch and at the end. On a machine with other load, CPU seconds are more reliable than wall time.
Writes observability.json and observability.md.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

import report

_ALL = ["log.tensorboard=true", "log.wandb=offline", "log.report=true", "log.figures=true", "log.artifact=true"]
_NONE = ["log.tensorboard=false", "log.wandb=off", "log.report=false", "log.figures=false"]
_LENGTHS = {  # some minutes each
    "tudui": ["train.epochs=3"],
    "resnet18": ["data.global_batch_size=128", "train.max_steps=20"],
}
_CONFIGS = {"tudui": "tudui", "resnet18": "cifar10"}


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    parser.add_argument("--models", nargs="+", choices=list(_LENGTHS), default=list(_LENGTHS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps of each training instead of the default lengths")
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for model in arguments.models:
        length = _LENGTHS[model] + ([f"train.max_steps={arguments.steps}"] if arguments.steps else [])
        command = [
            sys.executable, report.MAIN, "--config", _CONFIGS[model], *report.data_overrides(arguments),
            f"train.threads_per_rank={arguments.threads}", *length,
        ]  # fmt: skip
        wall: dict[str, list[float]] = {"all": [], "none": []}
        cpu: dict[str, list[float]] = {"all": [], "none": []}
        for index in range(arguments.rounds):
            variants = [("all", _ALL), ("none", _NONE)]
            for name, overrides in variants[:: -1 if index % 2 else 1]:
                wall_seconds, cpu_seconds = _run([*command, *overrides])
                wall[name].append(round(wall_seconds, 1))
                cpu[name].append(round(cpu_seconds, 1))
        case = {"model": model, "length": " ".join(length), "seconds": wall, "more": _additional_share(wall)}
        cases.append(case | {"cpu_seconds": cpu, "more_cpu": _additional_share(cpu)})
        print(cases[-1], flush=True)
        report.write(arguments.output, "observability", __doc__, {"cases": cases}, _table(cases))
    return 0


def _additional_share(seconds: dict[str, list[float]]) -> float:
    ratios = [with_all / with_none for with_all, with_none in zip(seconds["all"], seconds["none"], strict=True)]
    return round(statistics.median(ratios) - 1, 4)


def _run(command: list[str]) -> tuple[float, float]:
    """Runs a training. Returns its wall time, and the CPU time of all its processes on all cores, in seconds."""
    with tempfile.TemporaryDirectory() as root:
        start, cpu_before = perf_counter(), _cpu_seconds_of_children()
        subprocess.run([*command, f"run.root={root}", "run.name=run"], check=True, stdout=subprocess.DEVNULL)
        return perf_counter() - start, _cpu_seconds_of_children() - cpu_before


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _table(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        cells = []
        for seconds, share in ((case["seconds"], case["more"]), (case["cpu_seconds"], case["more_cpu"])):
            medians = [statistics.median(seconds[variant]) for variant in ("none", "all")]
            cells.append(f"{medians[0]:.0f} | {medians[1]:.0f} | {share:+.1%}")
        rows.append(f"{case['model']}, {case['length']} | {' | '.join(cells)}")
    head = " | seconds with none | with all | more | CPU seconds with none | with all | more"
    return report.table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
