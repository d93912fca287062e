"""The order at scale: time and memory of a rank's part of a batch, and how well it shuffles.

    python benchmarks/order.py

The cost: 5e4, 1e6 and 1e9 samples, 1 to 4,096 ranks of 64 samples each, batches of random steps, medians; memory is the
growth of the resident set while all that was done. Nothing is stored, so nothing grows.

The shuffle: each of many keys gives an order of 100 positions, as does torch.randperm. Where each element lands, which
pairs are neighbours, and which of two comes first is counted and compared with evenness, by chi squared over its
degrees of freedom; how many of the lower half land in the first half, by the variance of a fair draw. All are 1 for
pure chance.
Writes order.json and order.md.
"""

import random
import resource
import statistics
from time import perf_counter

import report
import torch
from torch import Tensor

from trainer import rng
from trainer.data.sampler import BatchSampler, permute

SAMPLES = (50_000, 1_000_000, 1_000_000_000)
RANKS = (1, 8, 64, 512, 4096)
RANK_BATCH, BLOCK_STEPS = 64, 16


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--keys", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = {(samples, ranks): _microseconds(samples, ranks) for samples in SAMPLES for ranks in RANKS}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    own = torch.stack([permute(torch.arange(100), 100, rng.key(7, n)) for n in range(arguments.keys)])
    generator = torch.Generator().manual_seed(7)
    theirs = torch.stack([torch.randperm(100, generator=generator) for _ in range(arguments.keys)])
    shuffles = {"samecurve": _evenness(own), "torch.randperm": _evenness(theirs)}
    rows = [
        f"{samples:,} | " + " | ".join("-" if costs[samples, n] is None else f"{costs[samples, n]:.0f}" for n in RANKS)
        for samples in SAMPLES
    ]
    text = "Microseconds a step, for one rank's 64 samples:\n\n"
    text += report.table("samples | " + " | ".join(f"{ranks:,} ranks" for ranks in RANKS), rows)
    text += f"\nThe resident set grew by {grown:.0f} MB over all of it.\n\nChi squared over its degrees of "
    text += f"freedom (halves: variance over a fair draw's), {arguments.keys:,} orders of 100:\n\n"
    names = list(shuffles["samecurve"])
    rows = [f"{name} | " + " | ".join(f"{found[key]:.3f}" for key in names) for name, found in shuffles.items()]
    text += report.table(" | " + " | ".join(names), rows)
    print(text)
    microseconds = {f"{samples} samples, {ranks} ranks": cost for (samples, ranks), cost in costs.items()}
    result = {"microseconds_a_step": microseconds, "megabytes_grown": grown, "shuffle": shuffles}
    report.write(arguments.output, "order", __doc__, result, text)
    return 0


def _microseconds(samples: int, ranks: int) -> float | None:
    """Of one step, as the loader asks for it: some steps at once, its own rank's part of each."""
    global_batch_size = ranks * RANK_BATCH
    if global_batch_size > samples:
        return None
    draw, times = random.Random(0), []
    for _ in range(60):
        batches = BatchSampler(samples, global_batch_size, seed=1)
        epoch, rank = draw.randrange(1000), draw.randrange(ranks)
        full = samples // global_batch_size
        steps = [draw.randrange(full) for _ in range(BLOCK_STEPS)]
        began = perf_counter()
        first = rank * RANK_BATCH
        places = [batches.positions(step, first, first + RANK_BATCH) for step in steps]
        ids = batches.order(epoch, torch.cat(places))
        times.append((perf_counter() - began) / BLOCK_STEPS * 1e6)
        assert len(ids) == BLOCK_STEPS * RANK_BATCH
    return round(statistics.median(times), 1)


def _evenness(orders: Tensor) -> dict[str, float]:
    """orders int64 [K, n]."""
    keys, n = orders.shape
    places = torch.zeros(n, n).index_put_((orders.flatten(), torch.arange(n).repeat(keys)), torch.ones(()), True)
    pairs = torch.zeros(n, n).index_put_(
        (orders[:, :-1].flatten(), orders[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    apart = ~torch.eye(n, dtype=torch.bool)
    where = orders.argsort(1)
    earlier = torch.cat([(where[:, i : i + 1] < where[:, i + 1 :]).double().mean(0) for i in range(n - 1)])
    halves = (orders[:, : n // 2] < n // 2).sum(1).double()
    fair_variance = (n / 2) * 0.25 * (n / 2) / (n - 1)  # of a hypergeometric draw
    return {
        "positions": float(((places - keys / n) ** 2 / (keys / n)).sum() / (n - 1) ** 2),
        "neighbours": float((((pairs - keys / n) ** 2 / (keys / n))[apart]).sum() / (n * (n - 1) - 1)),
        "which of two comes first": float(((earlier - 0.5) ** 2 * 4 * keys).mean()),
        "halves": float(halves.var() / fair_variance),
    }


if __name__ == "__main__":
    raise SystemExit(main())
