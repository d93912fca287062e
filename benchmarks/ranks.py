"""Two ranks with one thread each against one process with two, at the same global batch; the bare loop, too.

    python benchmarks/ranks.py --images FOLDER

The bare loop has no data work; on two ranks it is DistributedDataParallel, through gloo. By turns, medians of the
rounds. Writes ranks.json and ranks.md.
"""

import statistics

import report
from turns import Contestant, free_port, race, script, speed_ratio


def main() -> int:
    parser = report.parser(__doc__)
    report.add_workloads(parser)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    cases, rows = [], []
    for workload in arguments.models:
        settings = report.given(arguments, **workload.settings, precision="fp32")
        threads = max(1, arguments.threads // 2)
        split = settings | {"ranks": 2, "threads": threads}
        names = {"samecurve": "samecurve", "bare": "the bare loop"}
        one = {each: Contestant(f"{name}, 1 process", script(each, settings)) for each, name in names.items()}
        two = {
            each: Contestant(f"{name}, 2 ranks", script(each, split | {"port": free_port()}))
            for each, name in names.items()
        }
        race([one["bare"]], 3, 5, 5)
        steps = max(8, round(arguments.turn_seconds / statistics.median(one["bare"].seconds)))
        one["bare"].seconds.clear()
        race([*one.values(), *two.values()], arguments.rounds, steps, max(2, steps // 4))
        each = [*one.values(), *two.values()]
        speeds = {it.name: workload.images_per_second(it.seconds) for it in each}
        ratios = {name: round(speed_ratio(two[name], one[name]), 3) for name in names}
        of_bare = round(speed_ratio(two["samecurve"], two["bare"]), 3)
        cases.append(
            workload.settings | {"images_per_second": speeds, "ratio": ratios["samecurve"],
             "ratio_of_bare": ratios["bare"], "two_ranks_of_bare": of_bare}
        )  # fmt: skip
        rows.append(
            f"{workload} | {speeds['samecurve, 1 process']:,.0f} "
            f"| {speeds['samecurve, 2 ranks']:,.0f} | {ratios['samecurve']:.3f} | {ratios['bare']:.3f} | {of_bare:.3f}"
        )
        print(rows[-1], flush=True)
        head = (
            " | 1 process, images/s | 2 ranks, images/s | ratio | that of the bare loop | 2 ranks, of the bare loop's"
        )
        report.write(arguments.output, "ranks", __doc__, {"cases": cases, "goal": 0.95}, report.table(head, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
