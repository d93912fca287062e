"""Two ranks with one thread each against one process with two, at the same global batch.

    python benchmarks/ranks.py --images FOLDER

By turns, medians of the rounds. Writes ranks.json and ranks.md.
"""

import statistics

import report
from turns import Contestant, free_port, race, script, speed_ratio


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["lenet:64", "tudui:64", "resnet18:128"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    cases, rows = [], []
    for named in arguments.models:
        model, _, batch_size = named.partition(":")
        settings = report.given(arguments, model=model, batch_size=int(batch_size), precision="fp32")
        threads = max(1, arguments.threads // 2)
        split = settings | {"ranks": 2, "threads": threads, "port": free_port()}
        one = Contestant(f"1 process, {arguments.threads} threads", script("samecurve", settings))
        two = Contestant(f"2 ranks, {threads} threads each", script("samecurve", split))
        race([one], 3, 5, 5)
        steps = max(1, round(arguments.turn_seconds / statistics.median(one.seconds)))
        one.seconds.clear()
        race([one, two], arguments.rounds, steps, max(2, steps))
        speeds = {each.name: round(int(batch_size) / statistics.median(each.seconds), 1) for each in (one, two)}
        ratio = round(speed_ratio(two, one), 3)
        cases.append({"model": model, "batch_size": int(batch_size), "images_per_second": speeds, "ratio": ratio})
        rows.append(f"{model}, batch {batch_size} | {' | '.join(f'{n:,.0f}' for n in speeds.values())} | {ratio:.3f}")
        print(rows[-1], flush=True)
        head = " | " + " | ".join(f"{name}, images/s" for name in speeds) + " | ratio"
        report.write(arguments.output, "ranks", __doc__, {"cases": cases, "goal": 0.95}, report.table(head, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
