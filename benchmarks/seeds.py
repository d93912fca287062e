"""A configuration over several seeds: mean and standard deviation of its test accuracy and of its time.

    python benchmarks/seeds.py --config speedrun94 [--seeds 5] [section.key=value]...

One training after the other, each as `python trainer/main.py` runs it. Not repeated is what is finished in --root, or
what seeds-CONFIG.json in --output tells of the same settings: five seeds may take several evenings and machines.
Writes seeds-CONFIG.json and seeds-CONFIG.md.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import report

from trainer.config.load import find_config_file, flatten, load_config


def main() -> int:
    parser = report.parser(__doc__, needs_images=False)
    parser.add_argument("--config", default="speedrun94")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=Path("runs") / "seeds")
    arguments, overrides = parser.parse_known_args()
    settings = flatten(load_config([find_config_file(arguments.config)], overrides))
    told = _told(arguments.output / f"seeds-{arguments.config}.json", settings)
    if arguments.images:
        overrides = ["data.name=image_folder", f"data.root={arguments.images}", *overrides]
    if arguments.cache:
        overrides.append(f"data.cache_dir={arguments.cache}")
    for seed in range(arguments.seeds):
        if seed in told:
            continue
        folder = arguments.root / f"{arguments.config}-{seed}"
        command = [sys.executable, str(report.REPOSITORY / "trainer" / "main.py"), "--config", arguments.config]
        command += [f"run.root={arguments.root}", f"run.name={folder.name}", f"run.seed={seed}", "log.wandb=off"]
        command += overrides
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        told[seed] = _kept(seed, json.loads((folder / "summary.json").read_text()))
        runs = [told[seed] for seed in sorted(told)]
        text = _text(runs)
        print(text)
        result = {"settings": settings, "runs": runs}
        report.write(arguments.output, f"seeds-{arguments.config}", __doc__, result, text)
    return 0


def _told(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """By seed: the runs that an earlier call tells of, if it trained with the same settings."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if earlier["settings"] != json.loads(json.dumps(settings)):
        return {}
    return {run["seed"]: run for run in earlier["runs"]}


def _kept(seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    test = summary["test"]
    return {"seed": seed, "seconds": round(summary["seconds"], 1)} | {
        key: test[key] for key in ("accuracy", "tta_accuracy")
    }


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
