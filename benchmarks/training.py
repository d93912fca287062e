"""Training speed: samecurve, the bare loop, the tutorials' script, Accelerate's example and Lightning, by turns.

    python benchmarks/training.py --images FOLDER

Random crop by 4 and mirroring for all but the bare loop, which has no data work at all: its batches are ready, in
channels-last layout, and its optimizer is fused. The three that load by a DataLoader are run with 0, 1 and 2 workers;
their fastest counts. Medians of the rounds. Writes training.json and training.md.
"""

import argparse
import statistics
from typing import Any

import report
from turns import Contestant, race, script, speed_ratio

PEERS = {
    "script": "the tutorials' script",
    "accelerate_example": "Accelerate's example",
    "lightning_module": "Lightning",
}
WORKERS = (0, 1, 2)
HEAD = " | images/s | of the bare loop | of the best peer | the peers, of the bare loop"
GOALS = {"lenet": 1.15, "tudui": 1.4, "resnet18": 1.0}


def main() -> int:
    parser = report.parser(__doc__)
    report.add_workloads(parser)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    cases = []
    for workload in arguments.models:
        for precision in arguments.precisions:
            cases.append(_case(arguments, workload, precision))
            rows = [_row(case) for case in cases]
            print(rows[-1], flush=True)
            report.write(arguments.output, "training", __doc__, {"cases": cases}, report.table(HEAD, rows))
    return 0


def _case(arguments: argparse.Namespace, workload: report.Workload, precision: str) -> dict[str, Any]:
    settings = report.given(arguments, **workload.settings, precision=precision)
    bare, own = Contestant("bare", script("bare", settings)), Contestant("samecurve", script("samecurve", settings))
    peers = {
        (peer, workers): Contestant(f"{PEERS[peer]}, {workers} workers", script(peer, settings | {"workers": workers}))
        for peer in arguments.peers
        for workers in WORKERS
    }
    race([bare], 3, 3, 2)
    steps = max(8, round(arguments.turn_seconds / statistics.median(bare.seconds)))  # some blocks of images at least
    bare.seconds.clear()
    race(list(peers.values()), 3 if steps > 8 else 1, steps, 2)  # which number of workers is each one's best
    chosen = {
        peer: min((peers[peer, workers] for workers in WORKERS), key=lambda one: statistics.median(one.seconds))
        for peer in arguments.peers
    }
    for contestant in chosen.values():
        contestant.seconds.clear()
    rounds = arguments.rounds if steps > 8 else arguments.rounds // 3 or 1  # a turn of many seconds says more
    race([bare, own, *chosen.values()], rounds, steps, 2 + steps // 4)
    fastest = min(chosen.values(), key=lambda peer: statistics.median(peer.seconds), default=None)
    return {
        **workload.settings, "precision": precision, "steps_a_turn": steps,
        "images_per_second": {
            one.name: workload.images_per_second(one.seconds) for one in [own, bare, *chosen.values()]
        },
        "of_bare": round(speed_ratio(own, bare), 3), "of_bare_goal": 0.97,
        "of_best_peer": fastest and round(speed_ratio(own, fastest), 3), "best_peer": fastest and fastest.name,
        "of_best_peer_goal": GOALS.get(workload.model),
        "peers_of_bare": {one.name: round(speed_ratio(one, bare), 3) for one in chosen.values()},
        "seconds_a_step": {one.name: one.seconds for one in [own, bare, *chosen.values()]},
    }  # fmt: skip


def _row(case: dict[str, Any]) -> str:
    speeds, best = case["images_per_second"], case["best_peer"]
    of_best = f"{case['of_best_peer']:.2f} ({best})" if best else "-"
    peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["peers_of_bare"].items())
    return (
        f"{case['model']}, batch {case['batch_size']}, {case['precision']} | {speeds['samecurve']:,.0f} "
        f"| {case['of_bare']:.3f} | {of_best} | {peers}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
