"""Measures the cost of checkpoints: how long the loop waits, how long a save takes, and how long loading takes.

    python benchmarks/checkpoints.py [--model resnet18] [--batch-size 64] [--saves 8]

Runs in one process: saves a network and its optimizer as the trainer does, with real steps between and during the
saves. Writes checkpoints.json and checkpoints.md.
"""

import statistics
import sys
import tempfile
from time import perf_counter
from typing import NamedTuple

import report
import torch
from torch import nn

from trainer.config.load import load_config
from trainer.models.lookup import build_model
from trainer.optim.optimizers import build_optimizer
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter
from trainer.run.folder import RunFolder


def main() -> int:
    parser = report.make_parser(__doc__, threads=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--saves", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="samecurve-checkpoints-") as root:
        result = _measure(arguments.model, arguments.batch_size, arguments.saves, root)
    table = report.table("quantity | measured", [f"{name} | {value}" for name, value in result.items()])
    report.write(arguments.output, "checkpoints", __doc__, result, table)
    print(table)
    return 0


def _measure(model: str, batch_size: int, num_saves: int, root: str) -> dict[str, float]:
    config = load_config([], [f"model.name={model}", "run.name=run", f"run.root={root}"])
    folder = RunFolder(config.folder)
    if holder := folder.try_acquire(config):
        raise folder.in_use_error(holder)
    folder.write_settings(config, {})
    network = build_model(config.model, 10, 3, 32)
    network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(network, config.optim)
    times = _time_saves(folder, network, optimizer, batch_size, num_saves)
    newest = checkpoint.list_checkpoints(folder.checkpoints)[0]
    start = perf_counter()
    state = checkpoint.load(newest)
    network.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    load_seconds = perf_counter() - start
    size_bytes = sum(path.stat().st_size for path in newest.iterdir())
    folder.release()
    median_step, median_stall = statistics.median(times.steps), statistics.median(times.stalls[1:])
    return {
        "weights": sum(parameter.numel() for parameter in network.parameters()),
        "megabytes": round(size_bytes / 1e6, 1),
        "step_ms": round(1e3 * median_step, 1),
        "first_stall_ms": round(1e3 * times.stalls[0], 1),
        "stall_ms": round(1e3 * median_stall, 1),
        "stall_share_of_a_step": round(median_stall / median_step, 4),
        "step_ms_during_a_save": round(1e3 * statistics.median(times.steps_during_saves), 1),
        "slowest_save_ms": round(1e3 * times.slowest_save, 1),
        "load_and_verify_ms": round(1e3 * load_seconds, 1),
    }


class Times(NamedTuple):
    """Seconds."""

    steps: list[float]
    stalls: list[float]
    """how long each save holds up the loop"""
    steps_during_saves: list[float]
    slowest_save: float


def _time_saves(
    folder: RunFolder, network: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, num_saves: int
) -> Times:
    images = torch.randn(batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,))

    def timed_step() -> float:
        start = perf_counter()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        return perf_counter() - start

    writer = BackgroundCheckpointWriter(folder, 2, Progress(), lambda: None, print)
    steps: list[float] = []
    stalls: list[float] = []
    steps_during_saves: list[float] = []
    timed_step()  # warm-up
    for step in range(1, num_saves + 2):
        steps.append(timed_step())
        start = perf_counter()
        writer.save(TrainingState(network.state_dict(), optimizer.state_dict(), {}, Progress(step)), None)
        stalls.append(perf_counter() - start)
        steps_during_saves.append(timed_step())
        writer.finish()
    return Times(steps, stalls, steps_during_saves, writer.slowest_save_seconds)


if __name__ == "__main__":
    sys.exit(main())
