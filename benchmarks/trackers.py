"""What tracking costs: TensorBoard, W&B offline and JSON lines every ten steps, against none.

    python benchmarks/trackers.py --images FOLDER

By turns, medians of the rounds. Writes trackers.json and trackers.md.
"""

import statistics

import report
from turns import Contestant, race, script, speed_ratio


def main() -> int:
    parser = report.parser(__doc__)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        settings = report.given(arguments, **workload.settings, precision="fp32")
        on = ["log.tensorboard=true", "log.wandb=offline", "log.every_steps=10"]
        without = Contestant("none", script("samecurve", settings | {"overrides": ["log.every_steps=100000"]}))
        tracked = Contestant("all three", script("samecurve", settings | {"overrides": on}))
        race([without], 3, 5, 5)
        steps = max(10, round(arguments.turn_seconds / statistics.median(without.seconds) / 10) * 10)
        without.seconds.clear()
        race([without, tracked], arguments.rounds, steps, steps)
        cost = round(1 / speed_ratio(tracked, without) - 1, 4)
        speeds = {each.name: workload.images_per_second(each.seconds) for each in (without, tracked)}
        found = {"steps_a_turn": steps, "images_per_second": speeds, "cost": cost, "goal": 0.01}
        cases.append(workload.settings | found)
        rows.append(f"{workload} | {steps} | {cost:+.1%}")
        print(rows[-1], flush=True)
        head = " | steps a turn | time more than without"
        report.write(arguments.output, "trackers", __doc__, {"cases": cases}, report.table(head, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
