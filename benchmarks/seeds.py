"""A configuration over several seeds: mean and standard deviation of its test accuracy and of its time.

    python benchmarks/seeds.py --config speedrun94 [--seeds 5] [section.key=value]...

One training after the other, each as `python trainer/main.py` runs it; one that is finished in --root is not repeated.
Writes seeds-CONFIG.json and seeds-CONFIG.md.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import report


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--config", default="speedrun94")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=Path("runs") / "seeds")
    arguments, overrides = parser.parse_known_args()
    if arguments.images:
        overrides = ["data.name=image_folder", f"data.root={arguments.images}", *overrides]
    if arguments.cache:
        overrides.append(f"data.cache_dir={arguments.cache}")
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        folder = arguments.root / f"{arguments.config}-{seed}"
        command = [sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "--config", arguments.config]
        command += [f"run.root={arguments.root}", f"run.name={folder.name}", f"run.seed={seed}", "log.wandb=off"]
        command += overrides
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((folder / "summary.json").read_text())
        test = summary["test"]
        kept = {key: test[key] for key in ("accuracy", "tta_accuracy")}
        runs.append({"seed": seed, "seconds": round(summary["seconds"], 1)} | kept)
        text = _text(runs)
        print(text)
        report.write(arguments.output, f"seeds-{arguments.config}", __doc__, {"runs": runs}, text)
    return 0


def _text(runs: list[dict[str, Any]]) -> str:
    rows = []
    for key, name, unit in (
        ("accuracy", "plain accuracy, %", 100),
        ("tta_accuracy", "with test-time augmentation, %", 100),
        ("seconds", "seconds, evaluation included", 1),
    ):
        found = [unit * run[key] for run in runs if run[key] is not None]
        if found:
            deviation = f"{statistics.stdev(found):.2f}" if len(found) > 1 else "-"
            each = ", ".join(f"{value:.2f}" for value in found)
            rows.append(f"{name} | {statistics.mean(found):.2f} | {deviation} | {each}")
    return report.table(f"{len(runs)} seeds | mean | standard deviation | each", rows)


if __name__ == "__main__":
    raise SystemExit(main())
