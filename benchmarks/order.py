"""Measures the sample order at scale: time and memory of a rank's part of a batch, and the quality of the shuffle.

    python benchmarks/order.py

Cost: 5e4, 1e6 and 1e9 samples, 1 to 4,096 ranks of 64 samples each, batches of random steps; medians. Memory is the
growth of the resident set over all of this; no order is stored, so it should not grow.

Shuffle: each of many keys gives an order of 100 positions, and so does torch.randperm. The benchmark counts where each
element lands, which pairs are adjacent, and which of two elements comes first, and compares the counts with uniform
ones by chi squared over its degrees of freedom. The number of elements of the lower half in the first half is compared
with a fair draw by its variance. All values are 1 for a perfect shuffle.
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

NUM_SAMPLES = (50_000, 1_000_000, 1_000_000_000)
WORLD_SIZES = (1, 8, 64, 512, 4096)
RANK_BATCH_SIZE = 64
STEPS_AT_ONCE = 16  # as the loader asks for them
_NUM_TIMED = 60


def main() -> int:
    parser = report.make_parser(__doc__, threads=True)
    parser.add_argument("--keys", type=int, default=20_000)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    costs = {(samples, ranks): _microseconds(samples, ranks) for samples in NUM_SAMPLES for ranks in WORLD_SIZES}
    megabytes_grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    samecurve = torch.stack([permute(torch.arange(100), 100, rng.key(7, n)) for n in range(arguments.keys)])
    generator = torch.Generator().manual_seed(7)
    randperm = torch.stack([torch.randperm(100, generator=generator) for _ in range(arguments.keys)])
    shuffles = {"samecurve": _uniformity(samecurve), "torch.randperm": _uniformity(randperm)}
    text = _text(costs, megabytes_grown, shuffles, arguments.keys)
    print(text)
    microseconds = {f"{samples} samples, {ranks} ranks": cost for (samples, ranks), cost in costs.items()}
    result = {"microseconds_a_step": microseconds, "megabytes_grown": megabytes_grown, "shuffle": shuffles}
    report.write(arguments.output, "order", __doc__, result, text)
    return 0


def _microseconds(samples: int, ranks: int) -> float | None:
    """Returns the time of one rank's sample ids for one step; None if a global batch exceeds the samples."""
    global_batch_size = ranks * RANK_BATCH_SIZE
    if global_batch_size > samples:
        return None
    generator, times = random.Random(0), []
    for _ in range(_NUM_TIMED):
        sampler = BatchSampler(samples, global_batch_size, seed=1)
        epoch, rank = generator.randrange(1000), generator.randrange(ranks)
        steps_per_epoch = samples // global_batch_size
        steps = [generator.randrange(steps_per_epoch) for _ in range(STEPS_AT_ONCE)]
        start = perf_counter()
        first = rank * RANK_BATCH_SIZE
        positions = [sampler.positions(step, first, first + RANK_BATCH_SIZE) for step in steps]
        ids = sampler.ids_at(epoch, torch.cat(positions))
        times.append((perf_counter() - start) / STEPS_AT_ONCE * 1e6)
        assert len(ids) == STEPS_AT_ONCE * RANK_BATCH_SIZE
    return round(statistics.median(times), 1)


def _uniformity(orders: Tensor) -> dict[str, float]:
    """Returns four statistics of orders, int64 [keys, n], that are 1 for a perfect shuffle."""
    keys, n = orders.shape
    positions = torch.zeros(n, n).index_put_((orders.flatten(), torch.arange(n).repeat(keys)), torch.ones(()), True)
    pairs = torch.zeros(n, n).index_put_(
        (orders[:, :-1].flatten(), orders[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    is_pair = ~torch.eye(n, dtype=torch.bool)
    position_of = orders.argsort(1)
    share_earlier = torch.cat(
        [(position_of[:, i : i + 1] < position_of[:, i + 1 :]).double().mean(0) for i in range(n - 1)]
    )
    lower_in_first_half = (orders[:, : n // 2] < n // 2).sum(1).double()
    fair_variance = (n / 2) * 0.25 * (n / 2) / (n - 1)  # of a hypergeometric draw
    return {
        "positions": float(((positions - keys / n) ** 2 / (keys / n)).sum() / (n - 1) ** 2),
        "adjacent pairs": float((((pairs - keys / n) ** 2 / (keys / n))[is_pair]).sum() / (n * (n - 1) - 1)),
        "first of two": float(((share_earlier - 0.5) ** 2 * 4 * keys).mean()),
        "halves": float(lower_in_first_half.var() / fair_variance),
    }


def _text(
    costs: dict[tuple[int, int], float | None],
    megabytes_grown: float,
    shuffles: dict[str, dict[str, float]],
    num_keys: int,
) -> str:
    rows = []
    for samples in NUM_SAMPLES:
        cells = [costs[samples, ranks] for ranks in WORLD_SIZES]
        rows.append(f"{samples:,} | " + " | ".join("-" if cost is None else f"{cost:.0f}" for cost in cells))
    text = f"Microseconds a step, for one rank's {RANK_BATCH_SIZE} samples:\n\n"
    text += report.table("samples | " + " | ".join(f"{ranks:,} ranks" for ranks in WORLD_SIZES), rows)
    text += f"\nThe resident set grew by {megabytes_grown:.0f} MB over all of it.\n\n"
    text += "Chi squared over its degrees of freedom (halves: variance relative to a fair draw), "
    text += f"{num_keys:,} orders of 100:\n\n"
    names = list(shuffles["samecurve"])
    rows = [
        f"{name} | " + " | ".join(f"{values[statistic]:.3f}" for statistic in names)
        for name, values in shuffles.items()
    ]
    return text + report.table(" | " + " | ".join(names), rows)


if __name__ == "__main__":
    raise SystemExit(main())
