"""SIGKILL at random moments, saves among them, over runs of one and of two ranks: does each go on bit for bit?

    python benchmarks/kills.py [--kills 100] [--kills-per-run 10] [--seed 0] [--output benchmarks/results]

Writes kills.json and kills.md, and exits with 1 if any run differed or could not go on.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.errors import UserError
from trainer.verify import Recipe, survive

# One rank; two plain ones; one, two and three by turns, which the same bits on any number of them allow.
_RANKS = ([1], [2], [1, 2, 3])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
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
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "command": f"python benchmarks/kills.py --kills {arguments.kills} --seed {arguments.seed}",
        "each": runs,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.output / "kills.md").write_text(as_table(result))
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
    lines = [
        f"{result['kills']} SIGKILLs, {result['during_saves']} of them during a save, over {result['runs']} runs: "
        f"{result['runs_with_the_same_bits']} ended with the same bits as a run that was left alone.",
        "",
        "| ranks | kills | during saves | weights, optimizer, metrics, TensorBoard |",
        "|---|---|---|---|",
    ]
    for run in result["each"]:
        ranks = " and ".join(map(str, run["ranks"])) + (" by turns" if len(run["ranks"]) > 1 else "")
        during = sum(kill["during_save"] for kill in run["kills"])
        lines.append(f"| {ranks} | {len(run['kills'])} | {during} | {run['verdict']} |")
    return "\n".join([*lines, "", f"`{result['command']}`, {result['seconds']} s.", ""])


if __name__ == "__main__":
    sys.exit(main())
