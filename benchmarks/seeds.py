"""Trains a configuration with several seeds; reports mean and standard deviation of test accuracy and time.

    python benchmarks/seeds.py --config speedrun94 [--seeds 5] [section.key=value]...

The trainings run in sequence, each as `python trainer/main.py` runs it. A seed is skipped if seeds-CONFIG.json in
--output has its result with the same settings, and a run that is finished in --root is not trained again: the seeds may
take several evenings or machines. Writes seeds-CONFIG.json and seeds-CONFIG.md.
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
    parser = report.make_parser(__doc__, images="optional")
    parser.add_argument("--config", default="speedrun94")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--root", type=Path, default=Path("runs") / "seeds", help="folder for the run folders")
    arguments, overrides = parser.parse_known_args()
    settings = flatten(load_config([find_config_file(arguments.config)], overrides))
    results = _read_results(arguments.output / f"seeds-{arguments.config}.json", settings)
    if arguments.images:
        overrides = [*report.data_overrides(arguments), *overrides]
    for seed in range(arguments.seeds):
        if seed in results:
            continue
        folder = arguments.root / f"{arguments.config}-{seed}"
        command = [sys.executable, report.MAIN, "--config", arguments.config, f"run.root={arguments.root}"]
        command += [f"run.name={folder.name}", f"run.seed={seed}", "log.wandb=off", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results[seed] = _result(seed, json.loads((folder / "summary.json").read_text()))
        runs = [results[seed] for seed in sorted(results)]
        text = _text(runs)
        print(text)
        content = {"settings": settings, "runs": runs}
        report.write(arguments.output, f"seeds-{arguments.config}", __doc__, content, text)
    return 0


def _read_results(path: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Returns the results by seed that an earlier call has written, if its settings were the same."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["settings"] != json.loads(json.dumps(settings)):
        return {}
    return {run["seed"]: run for run in content["runs"]}


def _result(seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    accuracies = {key: summary["test"][key] for key in ("accuracy", "tta_accuracy")}
    return {"seed": seed, "seconds": round(summary["seconds"], 1)} | accuracies


def _text(runs: list[dict[str, Any]]) -> str:
    rows = []
    for key, name, factor in (
        ("accuracy", "accuracy, %", 100),
        ("tta_accuracy", "accuracy with test-time augmentation, %", 100),
        ("seconds", "seconds with evaluation", 1),
    ):
        values = [factor * run[key] for run in runs if run[key] is not None]
        if values:
            deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "-"
            by_seed = ", ".join(f"{value:.2f}" for value in values)
            rows.append(f"{name} | {statistics.mean(values):.2f} | {deviation} | {by_seed}")
    return report.table(f"{len(runs)} seeds | mean | standard deviation | by seed", rows)


if __name__ == "__main__":
    raise SystemExit(main())
