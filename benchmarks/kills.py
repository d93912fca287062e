"""Kills runs with SIGKILL at random moments, also during saves, and checks that each resumes to the same bits.

    python benchmarks/kills.py [--kills 100] [--kills-per-run 10] [--seed 0]

Writes kills.json and kills.md. Exits with 1 if a run differs from its uninterrupted twin or cannot resume.
"""

import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report

from launch.verify.runs import RunSpec, kill_and_compare
from trainer.errors import UserError

# A run uses the next world size after each kill: 1; 2 without virtual ranks; 1, 2 and 3, which needs virtual ranks.
_WORLD_SIZES = ([1], [2], [1, 2, 3])


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    start, runs = time.perf_counter(), []
    for number in range(-(-arguments.kills // arguments.kills_per_run)):
        num_kills = min(arguments.kills_per_run, arguments.kills - number * arguments.kills_per_run)
        runs.append(_kill_one_run(_WORLD_SIZES[number % len(_WORLD_SIZES)], num_kills, generator))
        print(f"run {number + 1}: {runs[-1]['ranks']} ranks, {num_kills} kills: {runs[-1]['verdict']}", flush=True)
    result = {
        "kills": sum(len(run["kills"]) for run in runs),
        "during_saves": sum(kill["during_save"] for run in runs for kill in run["kills"]),
        "runs": len(runs),
        "runs_with_the_same_bits": sum(run["verdict"] == "same bits" for run in runs),
        "seconds": round(time.perf_counter() - start),
        "each": runs,
    }
    text = _text(result)
    report.write(arguments.output, "kills", __doc__, result, text)
    print(text)
    return int(result["runs_with_the_same_bits"] != result["runs"])


def _kill_one_run(world_sizes: list[int], num_kills: int, generator: random.Random) -> dict[str, Any]:
    """Trains LeNet on the digits for 300 steps, with kills and without, and compares the two runs."""
    with tempfile.TemporaryDirectory(prefix="samecurve-kills-") as root:
        spec = RunSpec(["digits"], [], Path(root), timeout_seconds=600)
        try:
            result = kill_and_compare(spec, world_sizes, 300, num_kills, generator)
        except UserError as error:
            return {"ranks": world_sizes, "kills": [], "verdict": f"could not resume: {error}"}
    verdict = str(result.difference) if result.difference else "same bits"
    return {"ranks": world_sizes, "kills": [asdict(kill) for kill in result.kills], "verdict": verdict}


def _text(result: dict[str, Any]) -> str:
    rows = []
    for run in result["each"]:
        during_saves = sum(kill["during_save"] for kill in run["kills"])
        rows.append(f"{', '.join(map(str, run['ranks']))} | {len(run['kills'])} | {during_saves} | {run['verdict']}")
    return (
        f"{result['kills']} SIGKILLs, {result['during_saves']} of them during a save, over {result['runs']} runs, in "
        f"{result['seconds']} s: {result['runs_with_the_same_bits']} runs ended with the same bits as an uninterrupted "
        "run.\n\n" + report.table("world sizes | kills | during saves | weights, optimizer, metrics, TensorBoard", rows)
    )


if __name__ == "__main__":
    sys.exit(main())
