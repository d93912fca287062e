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
    parser.add_argument("--models", nargs="+", default=["lenet:64", "tudui:64", "resnet18:128"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--turn-seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    cases = []
    for named in arguments.models:
        model, _, batch_size = named.partition(":")
        for precision in arguments.precisions:
            cases.append(_case(arguments, model, int(batch_size), precision))
            rows = [_row(case) for case in cases]
            print(rows[-1], flush=True)
            report.write(arguments.output, "training", __doc__, {"cases": cases}, report.table(HEAD, rows))
    return 0


def _case(arguments: argparse.Namespace, model: str, batch_size: int, precision: str) -> dict[str, Any]:
    settings = report.given(arguments, model=model, batch_size=batch_size, precision=precision)
    bare, own = Contestant("bare", script("bare", settings)), Contestant("samecurve", script("samecurve", settings))
    peers = {
        (peer, workers): Contestant(f"{PEERS[peer]}, {workers} workers", script(peer, settings | {"workers": workers}))
        for peer in PEERS
        for workers in WORKERS
    }
    race([bare], 3, 3, 2)
    steps = max(8, round(arguments.turn_seconds / statistics.median(bare.seconds)))  # some blocks of images at least
    bare.seconds.clear()
    race(list(peers.values()), 3 if steps > 8 else 1, steps, 2)  # which number of workers is each one's best
    best = {peer: min(WORKERS, key=lambda n, p=peer: statistics.median(peers[p, n].seconds)) for peer in PEERS}  # type: ignore[misc]
    chosen = {peer: peers[peer, best[peer]] for peer in PEERS}
    for contestant in chosen.values():
        contestant.seconds.clear()
    rounds = arguments.rounds if steps > 8 else arguments.rounds // 3 or 1  # a turn of many seconds says more
    race([bare, own, *chosen.values()], rounds, steps, 2 + steps // 4)
    fastest = min(chosen.values(), key=lambda peer: statistics.median(peer.seconds))
    return {
        "model": model, "batch_size": batch_size, "precision": precision, "steps_a_turn": steps,
        "images_per_second": {
            one.name: round(batch_size / statistics.median(one.seconds), 1) for one in [own, bare, *chosen.values()]
        },
        "of_bare": round(speed_ratio(own, bare), 3), "of_bare_goal": 0.97,
        "of_best_peer": round(speed_ratio(own, fastest), 3), "best_peer": fastest.name,
        "of_best_peer_goal": GOALS.get(model),
        "peers_of_bare": {one.name: round(speed_ratio(one, bare), 3) for one in chosen.values()},
        "seconds_a_step": {one.name: one.seconds for one in [own, bare, *chosen.values()]},
    }  # fmt: skip


def _row(case: dict[str, Any]) -> str:
    speeds = case["images_per_second"]
    peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["peers_of_bare"].items())
    return (
        f"{case['model']}, batch {case['batch_size']}, {case['precision']} | {speeds['samecurve']:,.0f} "
        f"| {case['of_bare']:.3f} | {case['of_best_peer']:.2f} ({case['best_peer']}) | {peers}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
