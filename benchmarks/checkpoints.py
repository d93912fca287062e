"""What saving costs: how long the loop is held, how long a save takes, and what it takes to read one.

    python benchmarks/checkpoints.py [--model resnet18] [--batch 64] [--saves 8] [--output benchmarks/results]

In one process: the network and its optimizer as the trainer saves them, real steps between and during the saves.
Writes checkpoints.json and checkpoints.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from trainer import checkpoint, config, models, optim
from trainer.checkpoint import Progress, State
from trainer.folder import RunFolder
from trainer.saver import BackgroundSaver


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="samecurve-checkpoints-") as root:
        settings = config.load([], [f"model.name={arguments.model}", "run.name=run", f"run.root={root}"])
        folder = RunFolder(settings.folder)
        folder.check(settings)
        folder.begin(settings, {})
        net = models.build(settings.model, 10, 3, 32)
        optimizer = optim.OPTIMIZERS["sgd"](net.parameters(), settings.optim)
        images, labels = torch.randn(arguments.batch, 3, 32, 32), torch.randint(0, 10, (arguments.batch,))

        def step() -> float:
            began = time.perf_counter()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began

        saver = BackgroundSaver(folder, 2, Progress(), lambda: None, print)
        free: list[float] = []
        held: list[float] = []
        during: list[float] = []
        step()
        for number in range(1, arguments.saves + 2):
            free.append(step())
            began = time.perf_counter()
            saver.save(State(net.state_dict(), optimizer.state_dict(), {}, Progress(number)), None)
            held.append(time.perf_counter() - began)
            during.append(step())
            saver.finish()
        place = checkpoint.found(folder.checkpoints)[0]
        began = time.perf_counter()
        state = checkpoint.load(place)
        net.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
        loading = time.perf_counter() - began
        size = sum(path.stat().st_size for path in place.iterdir())
        folder.release()
    step_seconds = statistics.median(free)
    result = {
        "command": f"python benchmarks/checkpoints.py --model {arguments.model} --batch {arguments.batch}",
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
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "checkpoints.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in result.items())]
    (arguments.output / "checkpoints.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
