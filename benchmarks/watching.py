"""What all that can be looked at costs a run: trackers, report, figures, weights as an artifact, against none of it.

    python benchmarks/watching.py --images FOLDER

Whole trainings, each a process of its own as a user starts it, from its start to its end, by turns. The test set is
evaluated at each epoch and at the end. Where other work is beside, the CPU's time says more than the clock's. Writes
watching.json and watching.md.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

import report

_ON = ["log.tensorboard=true", "log.wandb=offline", "log.report=true", "log.figures=true", "log.artifact=true"]
_OFF = ["log.tensorboard=false", "log.wandb=off", "log.report=false", "log.figures=false"]
# How long each is trained: some minutes.
_RUNS = {"tudui": ["train.epochs=3"], "resnet18": ["data.global_batch_size=128", "train.max_steps=20"]}
_CONFIGS = {"tudui": "tudui", "resnet18": "cifar10"}


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(_RUNS), default=list(_RUNS))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cases: list[dict[str, Any]] = []
    for model in arguments.models:
        command = [
            sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "--config", _CONFIGS[model],
            "data.name=image_folder", f"data.root={arguments.images}", f"train.threads_per_rank={arguments.threads}",
            *_RUNS[model], *([f"data.cache_dir={arguments.cache}"] if arguments.cache else []),
        ]  # fmt: skip
        clock: dict[str, list[float]] = {"all": [], "none": []}
        cpu: dict[str, list[float]] = {"all": [], "none": []}
        for index in range(arguments.rounds):
            ways = [("all", _ON), ("none", _OFF)]
            for name, overrides in ways[:: -1 if index % 2 else 1]:
                for kept, seconds in zip((clock, cpu), _seconds([*command, *overrides]), strict=True):
                    kept[name].append(round(seconds, 1))
        length = " ".join(_RUNS[model])
        case = {"model": model, "length": length, "seconds": clock, "more": _more(clock)}
        cases.append(case | {"cpu_seconds": cpu, "more_cpu": _more(cpu)})
        print(cases[-1], flush=True)
        report.write(arguments.output, "watching", __doc__, {"cases": cases}, _text(cases))
    return 0


def _more(seconds: dict[str, list[float]]) -> float:
    ratios = [watched / bare for watched, bare in zip(seconds["all"], seconds["none"], strict=True)]
    return round(statistics.median(ratios) - 1, 4)


def _seconds(command: list[str]) -> tuple[float, float]:
    """From its start to its end: by the clock, and of all its processes on all cores."""
    with tempfile.TemporaryDirectory() as root:
        began, used_before = perf_counter(), _cpu_seconds()
        subprocess.run([*command, f"run.root={root}", "run.name=run"], check=True, stdout=subprocess.DEVNULL)
        return perf_counter() - began, _cpu_seconds() - used_before


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _text(cases: list[dict[str, Any]]) -> str:
    rows = []
    for case in cases:
        middle = [statistics.median(case[key][way]) for key in ("seconds", "cpu_seconds") for way in ("none", "all")]
        clock, cpu = (f"{middle[at]:.0f} | {middle[at + 1]:.0f}" for at in (0, 2))
        rows.append(
            f"{case['model']}, {case['length']} | {clock} | {case['more']:+.1%} | {cpu} | {case['more_cpu']:+.1%}"
        )
    head = " | seconds with none | with all | more | CPU seconds with none | with all | more"
    return report.table(head, rows)


if __name__ == "__main__":
    raise SystemExit(main())
