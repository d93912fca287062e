"""Builds the report page that compares several runs: results, curves, different settings, mean over seeds."""

import html
import json
import statistics
from collections.abc import Sequence
from typing import Any

from trainer.config.changes import MAY_CHANGE
from trainer.report.results import curve_charts, last_test_row, read_results
from trainer.report.style import page, section, table
from trainer.report.svg import NUM_COLORS
from trainer.run.record import RunRecord

# Settings in which two runs of the same experiment may differ: seed, folders, logging. The training length is not one.
_NOT_PART_OF_EXPERIMENT = MAY_CHANGE - {"train.epochs", "train.max_steps"} | {"run.name", "run.seed"}


def comparison_page(records: Sequence[RunRecord]) -> str:
    """Returns the HTML page for several runs."""
    title = f"{len(records)} runs"
    sections = [
        f"<header><h1>{title}</h1></header>",
        section("Results", _results(records)),
        section("Curves", curve_charts(records)),
        section("Different settings", _different_settings(records)),
        section("Mean over seeds", _mean_over_seeds(records)),
    ]
    return page(title, sections)


def format_setting(value: Any) -> str:
    """Returns a setting's value as text: a string as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _results(records: Sequence[RunRecord]) -> str:
    headers = ("run", "state", "test accuracy", "test loss", "steps", "time", "images/s", "ranks")
    rows = []
    for index, record in enumerate(records):
        results = read_results(record)
        name = f'<span class="key c{index % NUM_COLORS}"></span>{html.escape(record.name)}'
        cells = (
            results.state,
            results.test_accuracy,
            results.test_loss,
            results.steps,
            results.time,
            results.images_per_second,
            results.world_size,
        )
        rows.append([name, *map(html.escape, cells)])
    return table(headers, rows, cells_are_html=True, numeric=True)


def _different_settings(records: Sequence[RunRecord]) -> str:
    names = dict.fromkeys(
        name for record in records for name in record.settings if name not in ("run.name", "run.root")
    )
    rows = []
    for name in names:
        values = [format_setting(record.settings.get(name)) for record in records]
        if len(set(values)) > 1:
            rows.append([name, *values])
    if not rows:
        return "<p>The runs differ only in their names.</p>"
    return table(("setting", *(record.name for record in records)), rows)


def _mean_over_seeds(records: Sequence[RunRecord]) -> str:
    """Groups the runs by experiment: all settings are equal except the seed and those in _NOT_PART_OF_EXPERIMENT."""
    experiments: dict[str, list[RunRecord]] = {}
    for record in records:
        settings = {name: value for name, value in record.settings.items() if name not in _NOT_PART_OF_EXPERIMENT}
        experiments.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(record)
    rows = []
    for members in experiments.values():
        # Two runs with the same seed are repetitions of one result, not two samples.
        by_seed = {record.settings.get("run.seed"): last_test_row(record).get("accuracy") for record in members}
        accuracies = [float(accuracy) for accuracy in by_seed.values() if accuracy is not None]
        deviation = f"{100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-"
        mean = f"{statistics.mean(accuracies):.2%}" if accuracies else "-"
        rows.append([", ".join(record.name for record in members), str(len(accuracies)), mean, deviation])
    return table(("runs", "seeds", "mean test accuracy", "standard deviation, percentage points"), rows)
