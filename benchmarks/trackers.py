"""Measures the time that TensorBoard, W&B offline and metrics.jsonl add to training with a row every ten steps.

    python benchmarks/trackers.py --images FOLDER

Runs with and without trackers take turns; reports medians over the rounds. Writes trackers.json and trackers.md.
"""

import argparse
import statistics
from typing import Any

import report
from turns import Contestant, contestant_command, race, speed_ratio

_WITH_TRACKERS = ["log.tensorboard=true", "log.wandb=offline", "log.every_steps=10"]
_WITHOUT_TRACKERS = ["log.every_steps=100000"]  # contestants/samecurve.py switches the trackers off


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        cases.append(_measure(arguments, workload))
        rows.append(f"{workload} | {cases[-1]['steps_a_turn']} | {cases[-1]['cost']:+.1%}")
        print(rows[-1], flush=True)
        head = " | steps a turn | additional time"
        report.write(arguments.output, "trackers", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


def _measure(arguments: argparse.Namespace, workload: report.Workload) -> dict[str, Any]:
    settings = report.contestant_settings(arguments, **workload.settings, precision="fp32")
    untracked = Contestant("none", contestant_command("samecurve", settings | {"overrides": _WITHOUT_TRACKERS}))
    tracked = Contestant("all three", contestant_command("samecurve", settings | {"overrides": _WITH_TRACKERS}))
    race([untracked], 3, 5, 5)
    # A multiple of ten: each turn then has the same number of rows.
    steps = max(10, round(arguments.turn_seconds / statistics.median(untracked.step_seconds) / 10) * 10)
    untracked.step_seconds.clear()
    race([untracked, tracked], arguments.rounds, steps, steps)
    return workload.settings | {
        "steps_a_turn": steps,
        "images_per_second": {
            contestant.name: workload.images_per_second(contestant.step_seconds) for contestant in (untracked, tracked)
        },
        "cost": round(1 / speed_ratio(tracked, untracked) - 1, 4),
        "goal": 0.01,
    }


if __name__ == "__main__":
    raise SystemExit(main())
