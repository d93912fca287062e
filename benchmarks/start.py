"""Times the start of a training (LeNet, the digits) to its first finished step, against importing torch and accelerate.

    python benchmarks/start.py

The programs take turns, each in a new process; reports medians over the rounds. Writes start.json and start.md.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import report

IMPORTS, SAMECURVE, LIGHTNING = "import torch, accelerate", "samecurve", "Lightning"
FIRST_STEP = "step 1/"


def main() -> int:
    parser = report.make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--without-lightning", action="store_true", help="if the package is not installed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        commands = {
            IMPORTS: [sys.executable, "-c", f"import torch, accelerate; print('{FIRST_STEP}', flush=True)"],
            SAMECURVE: [
                sys.executable, report.MAIN, "--config", "digits", "log.every_steps=1", f"run.root={root}",
                "log.wandb=off",
            ],
            LIGHTNING: [sys.executable, str(Path(__file__).parent / "contestants" / "lightning_start.py")],
        }  # fmt: skip
        if arguments.without_lightning:
            del commands[LIGHTNING]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(arguments.rounds + 1):
            for name, command in list(commands.items())[:: -1 if index % 2 else 1]:
                run_name = [f"run.name=run-{index}"] if name == SAMECURVE else []
                round_seconds = _seconds_to_first_step([*command, *run_name])
                if index:  # the first round is a warm-up
                    seconds[name].append(round_seconds)
    result, text = _results(seconds)
    print(text)
    report.write(arguments.output, "start", __doc__, result, text)
    return 0


def _results(seconds: dict[str, list[float]]) -> tuple[dict[str, object], str]:
    """Returns the content of the JSON file and the text of the Markdown file."""
    more = statistics.median(
        samecurve - imports for samecurve, imports in zip(seconds[SAMECURVE], seconds[IMPORTS], strict=True)
    )
    result: dict[str, object] = {"seconds_more_than_imports": round(more, 2), "seconds_goal": 3.0, "seconds": seconds}
    rows = [f"{name} | {statistics.median(values):.2f} | {min(values):.2f}" for name, values in seconds.items()]
    text = report.table("until the first step is done | median, s | fastest, s", rows)
    text += f"\nsamecurve takes {more:.2f} s more than the imports."
    if LIGHTNING in seconds:
        ratio = statistics.median(
            lightning / samecurve for lightning, samecurve in zip(seconds[LIGHTNING], seconds[SAMECURVE], strict=True)
        )
        result["lightning_over_samecurve"] = round(ratio, 2)
        text += f" Lightning takes {ratio:.2f} times as long as samecurve."
    return result, text + "\n"


def _seconds_to_first_step(command: list[str]) -> float:
    """Starts a program and kills it after its first step. Raises RuntimeError if it ends before."""
    start = perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(FIRST_STEP):
            seconds = perf_counter() - start
            process.kill()
            process.wait()
            return seconds
    raise RuntimeError(f"{command} ended before its first step, with exit code {process.wait()}")


if __name__ == "__main__":
    raise SystemExit(main())
