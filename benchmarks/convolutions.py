"""The weight gradient of a convolution over small pictures: PyTorch's own, and with pictures laid side by side.

    python benchmarks/convolutions.py [--precisions bf16 fp32] [--sides 2 3 4 ...]

Batches of 512 pictures of 256 channels, 3 x 3 pixels a filter; by turns, medians of the rounds. Writes
convolutions.json and convolutions.md.
"""

import copy
import statistics
from time import perf_counter

import report
import torch
from torch import Tensor, nn

from trainer import convolutions

PICTURES, CHANNELS = 512, 256
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--sides", nargs="+", type=int, default=list(range(2, 13)))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    widest, convolutions._WIDEST = convolutions._WIDEST, max(arguments.sides)
    cases, rows = [], []
    for precision in arguments.precisions:
        for side in arguments.sides:
            own, theirs = _race(side, DTYPES[precision], arguments.rounds)
            ratio = round(statistics.median(other / one for one, other in zip(own, theirs, strict=True)), 2)
            milliseconds = [round(1e3 * statistics.median(each), 2) for each in (theirs, own)]
            cases.append({"precision": precision, "side": side, "milliseconds": milliseconds, "times_as_fast": ratio})
            rows.append(f"{precision} | {side} | {milliseconds[0]} | {milliseconds[1]} | {ratio}")
            print(rows[-1], flush=True)
    head = "precision | pixels a side | PyTorch's own, ms | side by side, ms | times as fast"
    result = {"cases": cases, "done_in_bf16_up_to_pixels": widest}
    report.write(arguments.output, "convolutions", __doc__, result, report.table(head, rows))
    return 0


def _race(side: int, dtype: torch.dtype, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round: side by side, PyTorch's own."""
    plain = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, dtype=dtype).to(memory_format=torch.channels_last)
    laid = copy.deepcopy(plain)
    convolutions.lay_side_by_side(laid)
    images = torch.randn(PICTURES, CHANNELS, side, side, dtype=dtype).to(memory_format=torch.channels_last)
    times: dict[nn.Module, list[float]] = {laid: [], plain: []}
    for index in range(rounds + 1):
        for network in list(times)[:: -1 if index % 2 else 1]:
            seconds = _weight_gradient(network, images)
            if index:
                times[network].append(seconds)
    return times[laid], times[plain]


def _weight_gradient(network: nn.Module, images: Tensor) -> float:
    (weight,) = network.parameters()
    out = network(images)
    began = perf_counter()
    torch.autograd.grad(out, weight, torch.ones_like(out, memory_format=torch.channels_last))
    return perf_counter() - began


if __name__ == "__main__":
    raise SystemExit(main())
