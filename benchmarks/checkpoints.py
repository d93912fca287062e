"""What saving costs: how long the loop is held, how long a save takes, and what it takes to read one.

    python benchmarks/checkpoints.py [--model resnet18] [--batch-size 64] [--saves 8]

In one process: the network and its optimizer as the trainer saves them, real steps between and during the saves.
Writes checkpoints.json and checkpoints.md.
"""

import statistics
import sys
import tempfile
import time

import report
import torch

from trainer.config.load import load_config
from trainer.models.lookup import build_model
from trainer.optim.optimizers import build_optimizer
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState
from trainer.run.checkpoint_writer import BackgroundCheckpointWriter
from trainer.run.folder import RunFolder


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--saves", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="samecurve-checkpoints-") as root:
        settings = load_config([], [f"model.name={arguments.model}", "run.name=run", f"run.root={root}"])
        folder = RunFolder(settings.folder)
        folder.check(settings)
        folder.begin(settings, {})
        net = build_model(settings.model, 10, 3, 32)
        net.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(net, settings.optim)
        images = torch.randn(arguments.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (arguments.batch_size,))

        def step() -> float:
            began = time.perf_counter()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began

        saver = BackgroundCheckpointWriter(folder, 2, Progress(), lambda: None, print)
        free: list[float] = []
        held: list[float] = []
        during: list[float] = []
        step()
        for number in range(1, arguments.saves + 2):
            free.append(step())
            began = time.perf_counter()
            saver.save(TrainingState(net.state_dict(), optimizer.state_dict(), {}, Progress(number)), None)
            held.append(time.perf_counter() - began)
            during.append(step())
            saver.finish()
        place = checkpoint.list_checkpoints(folder.checkpoints)[0]
        began = time.perf_counter()
        state = checkpoint.load(place)
        net.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
        loading = time.perf_counter() - began
        size = sum(path.stat().st_size for path in place.iterdir())
        folder.release()
    step_seconds = statistics.median(free)
    result = {
        "weights": sum(parameter.numel() for parameter in net.parameters()),
        "megabytes": round(size / 1e6, 1),
        "step_ms": round(1e3 * step_seconds, 1),
        "held_ms_first": round(1e3 * held[0], 1),
        "held_ms": round(1e3 * statistics.median(held[1:]), 1),
        "held_share_of_a_step": round(statistics.median(held[1:]) / step_seconds, 4),
        "step_ms_while_a_save_is_written": round(1e3 * statistics.median(during), 1),
        "slowest_save_ms": round(1e3 * saver.seconds, 1),
        "load_and_verify_ms": round(1e3 * loading, 1),
    }
    table = report.table("what | measured", [f"{name} | {value}" for name, value in result.items()])
    report.write(arguments.output, "checkpoints", __doc__, result, table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
