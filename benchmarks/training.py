"""Compares the training speed of samecurve, a bare loop, PyTorch's tutorial, Accelerate's example and Lightning.

    python benchmarks/training.py --images FOLDER

All but the bare loop crop with a padding of 4 and mirror at random. The bare loop has no data work: its batches are
ready, in channels-last layout, and its optimizer is fused. The three peers with a DataLoader run with 0, 1 and 2
workers, and their fastest variant counts. All take turns; reports medians over the rounds. Writes training.json and
training.md.
"""

import argparse
import statistics
from typing import Any

import report
from turns import Contestant, contestant_command, race, speed_ratio

PEERS = {
    "script": "PyTorch's tutorial",
    "accelerate_example": "Accelerate's example",
    "lightning_module": "Lightning",
}
NUM_WORKERS = (0, 1, 2)
HEAD = " | images/s | relative to the bare loop | relative to the best peer | peers relative to the bare loop"
OF_BARE_GOALS = {"lenet": 0.85, "tudui": 0.95, "resnet18": 0.95}
OF_BEST_PEER_GOAL = 1.0
_FEWEST_STEPS = 8  # in a turn; the loader fetches several batches at once, which a turn should not cut


def main() -> int:
    parser = report.make_parser(__doc__, images="required", threads=True)
    report.add_workloads(parser)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    cases = []
    for workload in arguments.models:
        for precision in arguments.precisions:
            cases.append(_measure(arguments, workload, precision))
            rows = [_row(case) for case in cases]
            print(rows[-1], flush=True)
            report.write(arguments.output, "training", __doc__, {"cases": cases}, report.table(HEAD, rows))
    return 0


def _measure(arguments: argparse.Namespace, workload: report.Workload, precision: str) -> dict[str, Any]:
    settings = report.contestant_settings(arguments, **workload.settings, precision=precision)
    bare = Contestant("bare", contestant_command("bare", settings))
    samecurve = Contestant("samecurve", contestant_command("samecurve", settings))
    race([bare], 3, 3, 2)
    steps = max(_FEWEST_STEPS, round(arguments.turn_seconds / statistics.median(bare.step_seconds)))
    bare.step_seconds.clear()
    is_slow = steps == _FEWEST_STEPS
    peers = _fastest_variants(arguments.peers, settings, steps, rounds=1 if is_slow else 3)
    rounds = arguments.rounds // 3 or 1 if is_slow else arguments.rounds  # turns of many seconds vary less
    contestants = [samecurve, bare, *peers]
    race([bare, samecurve, *peers], rounds, steps, 2 + steps // 4)
    fastest = min(peers, key=lambda peer: statistics.median(peer.step_seconds), default=None)
    return {
        **workload.settings, "precision": precision, "steps_a_turn": steps,
        "images_per_second": {
            contestant.name: workload.images_per_second(contestant.step_seconds) for contestant in contestants
        },
        "of_bare": round(speed_ratio(samecurve, bare), 3), "of_bare_goal": OF_BARE_GOALS.get(workload.model),
        "of_best_peer": fastest and round(speed_ratio(samecurve, fastest), 3), "best_peer": fastest and fastest.name,
        "of_best_peer_goal": OF_BEST_PEER_GOAL,
        "peers_of_bare": {peer.name: round(speed_ratio(peer, bare), 3) for peer in peers},
        "seconds_a_step": {contestant.name: contestant.step_seconds for contestant in contestants},
    }  # fmt: skip


def _fastest_variants(peers: list[str], settings: dict[str, Any], steps: int, rounds: int) -> list[Contestant]:
    """Returns each peer with the number of DataLoader workers with which it is fastest."""
    variants = {
        peer: [
            Contestant(f"{PEERS[peer]}, {workers} workers", contestant_command(peer, settings | {"workers": workers}))
            for workers in NUM_WORKERS
        ]
        for peer in peers
    }
    race([variant for contestants in variants.values() for variant in contestants], rounds, steps, 2)
    fastest = [
        min(contestants, key=lambda variant: statistics.median(variant.step_seconds))
        for contestants in variants.values()
    ]
    for contestant in fastest:
        contestant.step_seconds.clear()
    return fastest


def _row(case: dict[str, Any]) -> str:
    speeds, best_peer = case["images_per_second"], case["best_peer"]
    of_best_peer = f"{case['of_best_peer']:.2f} ({best_peer})" if best_peer else "-"
    peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["peers_of_bare"].items())
    return (
        f"{case['model']}, batch {case['batch_size']}, {case['precision']} | {speeds['samecurve']:,.0f} "
        f"| {case['of_bare']:.3f} | {of_best_peer} | {peers}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
