"""SIGKILL at random moments, saves among them, over runs of one and of two ranks: does each go on bit for bit?

    python benchmarks/kills.py [--kills 100] [--kills-per-run 10] [--seed 0]

Writes kills.json and kills.md, and exits with 1 if any run differed or could not go on.
"""

import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report

from launch.verify.command import Recipe, survive
from trainer.errors import UserError

# One rank; two plain ones; one, two and three by turns, which the same bits on any number of them allow.
_RANKS = ([1], [2], [1, 2, 3])


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    began, runs = time.perf_counter(), []
    for number in range(-(-arguments.kills // arguments.kills_per_run)):
        kills = min(arguments.kills_per_run, arguments.kills - number * arguments.kills_per_run)
        runs.append(one_run(_RANKS[number % len(_RANKS)], kills, draw))
        print(f"run {number + 1}: {runs[-1]['ranks']} ranks, {kills} kills: {runs[-1]['verdict']}", flush=True)
    result = {
        "kills": sum(len(run["kills"]) for run in runs),
        "during_saves": sum(kill["during_save"] for run in runs for kill in run["kills"]),
        "runs": len(runs),
        "runs_with_the_same_bits": sum(run["verdict"] == "same bits" for run in runs),
        "seconds": round(time.perf_counter() - began),
        "each": runs,
    }
    report.write(arguments.output, "kills", __doc__, result, as_table(result))
    print(as_table(result))
    return int(result["runs_with_the_same_bits"] != result["runs"])


def one_run(ranks: list[int], kills: int, draw: random.Random) -> dict[str, Any]:
    """A run of LeNet on the digits, 300 steps, killed so often, against one that was left alone."""
    with tempfile.TemporaryDirectory(prefix="samecurve-kills-") as root:
        try:
            found = survive(Recipe(["digits"], [], Path(root), timeout_seconds=600), ranks, 300, kills, draw)
        except UserError as error:
            return {"ranks": ranks, "kills": [], "verdict": f"could not go on: {error}"}
    verdict = str(found.difference) if found.difference else "same bits"
    return {"ranks": ranks, "kills": [asdict(kill) for kill in found.kills], "verdict": verdict}


def as_table(result: dict[str, Any]) -> str:
    rows = []
    for run in result["each"]:
        ranks = " and ".join(map(str, run["ranks"])) + (" by turns" if len(run["ranks"]) > 1 else "")
        during = sum(kill["during_save"] for kill in run["kills"])
        rows.append(f"{ranks} | {len(run['kills'])} | {during} | {run['verdict']}")
    return (
        f"{result['kills']} SIGKILLs, {result['during_saves']} of them during a save, over {result['runs']} runs, in "
        f"{result['seconds']} s: {result['runs_with_the_same_bits']} ended with the same bits as a run that was left "
        "alone.\n\n" + report.table("ranks | kills | during saves | weights, optimizer, metrics, TensorBoard", rows)
    )


if __name__ == "__main__":
    sys.exit(main())
