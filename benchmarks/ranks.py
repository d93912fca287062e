"""Compares two ranks of one thread with one process of two threads at the same global batch size.

    python benchmarks/ranks.py --images FOLDER

The bare loop, which has no data work, is compared in the same way; its two ranks use DistributedDataParallel with gloo.
All take turns; reports medians over the rounds. Writes ranks.json and ranks.md.
"""

import argparse
import statistics
from typing import Any

import report
from turns import Contestant, contestant_command, free_port, race, speed_ratio

HEAD = (
    " | 1 process, images/s | 2 ranks, images/s | ratio | ratio of the bare loop | 2 ranks relative to the bare loop's"
)


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        cases.append(_measure(arguments, workload))
        rows.append(_row(workload, cases[-1]))
        print(rows[-1], flush=True)
        report.write(arguments.output, "ranks", __doc__, {"cases": cases, "goal": 0.95}, report.table(HEAD, rows))
    return 0


def _measure(arguments: argparse.Namespace, workload: report.Workload) -> dict[str, Any]:
    one_process = report.contestant_settings(arguments, **workload.settings, precision="fp32")
    two_ranks = one_process | {"ranks": 2, "threads": max(1, arguments.threads // 2)}
    names = {"samecurve": "samecurve", "bare": "the bare loop"}
    one = {
        program: Contestant(f"{name}, 1 process", contestant_command(program, one_process))
        for program, name in names.items()
    }
    two = {
        program: Contestant(f"{name}, 2 ranks", contestant_command(program, two_ranks | {"port": free_port()}))
        for program, name in names.items()
    }
    race([one["bare"]], 3, 5, 5)
    steps = max(8, round(arguments.turn_seconds / statistics.median(one["bare"].step_seconds)))
    one["bare"].step_seconds.clear()
    contestants = [*one.values(), *two.values()]
    race(contestants, arguments.rounds, steps, max(2, steps // 4))
    return workload.settings | {
        "images_per_second": {
            contestant.name: workload.images_per_second(contestant.step_seconds) for contestant in contestants
        },
        "ratio": round(speed_ratio(two["samecurve"], one["samecurve"]), 3),
        "ratio_of_bare": round(speed_ratio(two["bare"], one["bare"]), 3),
        "two_ranks_of_bare": round(speed_ratio(two["samecurve"], two["bare"]), 3),
    }


def _row(workload: report.Workload, case: dict[str, Any]) -> str:
    speeds = case["images_per_second"]
    return (
        f"{workload} | {speeds['samecurve, 1 process']:,.0f} | {speeds['samecurve, 2 ranks']:,.0f} "
        f"| {case['ratio']:.3f} | {case['ratio_of_bare']:.3f} | {case['two_ranks_of_bare']:.3f}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
