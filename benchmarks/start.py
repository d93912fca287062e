"""From the command to the first finished step (LeNet, the digits) against importing torch and accelerate.

    python benchmarks/start.py

Each a process of its own, by turns; medians of the rounds. Writes start.json and start.md.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import report

IMPORTS, OWN, LIGHTNING = "import torch, accelerate", "samecurve", "Lightning"


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        own = [
            sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "--config", "digits", "log.every_steps=1",
            f"run.root={root}", "log.wandb=off",
        ]  # fmt: skip
        commands = {
            IMPORTS: [sys.executable, "-c", "import torch, accelerate; print('step 1/', flush=True)"],
            OWN: own,
            LIGHTNING: [sys.executable, str(Path(__file__).parent / "contestants" / "lightning_start.py")],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(arguments.rounds + 1):
            for name, command in list(commands.items())[:: -1 if index % 2 else 1]:
                took = _to_first_step([*command, f"run.name=run-{index}"] if name == OWN else command)
                if index:
                    seconds[name].append(took)
    more = statistics.median(own - imports for own, imports in zip(seconds[OWN], seconds[IMPORTS], strict=True))
    faster = statistics.median(theirs / own for theirs, own in zip(seconds[LIGHTNING], seconds[OWN], strict=True))
    result = {
        "seconds_more_than_imports": round(more, 2), "goal": 1.5, "lightning_over_samecurve": round(faster, 2),
        "seconds": seconds,
    }  # fmt: skip
    rows = [f"{name} | {statistics.median(found):.2f} | {min(found):.2f}" for name, found in seconds.items()]
    text = report.table("until its first step is done | median, s | fastest, s", rows)
    text += f"\nsamecurve takes {more:.2f} s more than the imports, Lightning {faster:.2f} times samecurve's.\n"
    print(text)
    report.write(arguments.output, "start", __doc__, result, text)
    return 0


def _to_first_step(command: list[str]) -> float:
    began = perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            seconds = perf_counter() - began
            process.kill()
            process.wait()
            return seconds
    raise RuntimeError(f"{command}: no first step, exit code {process.wait()}")


if __name__ == "__main__":
    raise SystemExit(main())
