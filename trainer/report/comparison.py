"""Builds the report page that compares several runs: results, curves, different settings, mean over seeds.

Runs that differ only in their seed are one line in the charts, with a band from the lowest to the highest of them. The
runs are ranked by validation accuracy if all have a validation part, because the test set selects nothing.
"""

import html
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from trainer.config.changes import MAY_CHANGE
from trainer.report.figures import CURVES
from trainer.report.results import CHART_KINDS, format_percent, last_row, read_results
from trainer.report.style import page, section, table
from trainer.report.svg import NUM_COLORS, Series, legend, line_chart
from trainer.run.record import RunRecord

# Settings in which two runs of the same experiment may differ: seed, folders, logging. The training length is not one.
_NOT_PART_OF_EXPERIMENT = MAY_CHANGE - {"train.epochs", "train.max_steps"} | {"run.name", "run.seed"}


_MAX_SETTING_COLUMNS = 6  # more runs do not fit side by side


class Experiment(NamedTuple):
    """Runs with the same settings, apart from the seed and those in _NOT_PART_OF_EXPERIMENT."""

    name: str
    records: list[RunRecord]
    num_seeds: int


def comparison_page(records: Sequence[RunRecord], problems: Sequence[str] = ()) -> str:
    """Returns the HTML page for several runs. problems: what could not be read, a line each."""
    title = f"{len(records)} run{'' if len(records) == 1 else 's'}"
    split = selection_split(records)
    records = _ranked(records, split)
    experiments = find_experiments(records)
    sections = [
        f"<header><h1>{title}</h1>{problem_list(problems)}</header>",
        section("Results", _results(records, experiments, split)),
        section("Curves", _curves(experiments)),
        section("Different settings", _different_settings(records)),
        section("Mean over seeds", _mean_over_seeds(experiments, split)),
    ]
    return page(title, sections)


def problem_list(problems: Sequence[str]) -> str:
    """Returns what could not be read as HTML paragraphs."""
    return "".join(f'<p class="problem">{html.escape(problem)}</p>' for problem in problems)


def format_setting(value: Any) -> str:
    """Returns a setting's value as text: a string as it is, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def selection_split(records: Sequence[RunRecord]) -> str:
    """Returns the split by whose accuracy runs are ranked: validation if all runs with evaluations have it."""
    splits = {record.selection_split for record in records if record.best is not None}
    return "validation" if splits == {"validation"} else "test"


def find_experiments(records: Sequence[RunRecord]) -> list[Experiment]:
    """Groups the runs by experiment, in the order of their first runs. An experiment has the name of its runs."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        settings = {name: value for name, value in record.settings.items() if name not in _NOT_PART_OF_EXPERIMENT}
        groups.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(record)
    return [
        # Two runs with the same seed are repetitions of one result, not two samples.
        Experiment(_common_name(members), members, len({record.settings.get("run.seed") for record in members}))
        for members in groups.values()
    ]


def _common_name(records: Sequence[RunRecord]) -> str:
    """Returns the run's name; for several runs of a sweep the name of their settings, else all names."""
    names = [record.name for record in records]
    if len(names) == 1:
        return names[0]
    stems = {name.rpartition("-seed-")[0] for name in names}
    stem = stems.pop() if len(stems) == 1 else ""
    return stem or ", ".join(sorted(names))


def _ranked(records: Sequence[RunRecord], split: str) -> list[RunRecord]:
    """Returns the runs, highest accuracy on the split first, those without it last."""

    def rank(record: RunRecord) -> float:
        accuracy = last_row(record, split).get("accuracy")
        return 1.0 if accuracy is None else -float(accuracy)

    return sorted(records, key=rank)


def _results(records: Sequence[RunRecord], experiments: Sequence[Experiment], split: str) -> str:
    colors = {id(record): index for index, experiment in enumerate(experiments) for record in experiment.records}
    has_validation = any(last_row(record, "validation") for record in records)
    headers = ["run", "state", *(["validation accuracy"] if has_validation else []), "test accuracy", "test loss"]
    headers += [f"best {split} accuracy", "at step", "steps", "time", "images/s", "ranks"]
    rows = []
    for record in records:
        results = read_results(record)
        name = f'<span class="key c{colors[id(record)] % NUM_COLORS}"></span>{html.escape(record.name)}'
        has_best = results.best_split == split
        cells = [results.state, *([results.validation_accuracy] if has_validation else []), results.test_accuracy]
        cells += [results.test_loss, *((results.best_accuracy, results.best_step) if has_best else ("-", "-"))]
        cells += [results.steps, results.time, results.images_per_second, results.world_size]
        rows.append([name, *map(html.escape, cells)])
    reason = "" if split == "validation" else "; the runs have no common validation part"
    return f"<p>ranked by {split} accuracy{reason}</p>" + table(headers, rows, cells_are_html=True, numeric=True)


def _curves(experiments: Sequence[Experiment]) -> str:
    """Returns one legend and the charts. A color stands for an experiment, a dashed line for training."""
    names = [
        Series(f"{experiment.name}{_mean_of(experiment)}", (), color) for color, experiment in enumerate(experiments)
    ]
    note = "dashed: training; solid: test, or validation where there is such a part"
    note += "; bands: lowest to highest seed" if any(experiment.num_seeds > 1 for experiment in experiments) else ""
    charts = []
    for metric, title in CURVES:
        series = [
            line
            for color, experiment in enumerate(experiments)
            for line in _experiment_series(experiment, metric, color)
        ]
        has_evaluations = any(not line.dashed for line in series)
        if not has_evaluations:  # only train rows have a learning rate
            series = [line._replace(dashed=False) for line in series]
        chart = line_chart(series, "epoch", title, CHART_KINDS.get(metric, "plain"), has_legend=False)
        charts.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    return f'{legend(names)}<p>{note}</p><div class="charts">{"".join(charts)}</div>'


def _mean_of(experiment: Experiment) -> str:
    return f", mean over {experiment.num_seeds} seeds" if experiment.num_seeds > 1 else ""


def _experiment_series(experiment: Experiment, metric: str, color: int) -> list[Series]:
    """Returns the lines of the training and of the split that ranks, for one experiment."""
    has_validation = all(record.selection_split == "validation" for record in experiment.records)
    lines = []
    for split in ("train", "validation" if has_validation else "test"):
        curves = [curve for record in experiment.records if (curve := record.points(split, metric))]
        if not curves:
            continue
        name = f"{experiment.name}: {split}"
        if len(curves) == 1 or experiment.num_seeds == 1:
            lines += [Series(name, curve, color, dashed=split == "train") for curve in curves]
        else:
            lines.append(_mean_line(name, curves, color, is_dashed=split == "train"))
    return lines


def _mean_line(name: str, curves: Sequence[Sequence[tuple[float, float]]], color: int, is_dashed: bool) -> Series:
    """Returns the mean of curves and the band from the lowest to the highest, where at least two have a value."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for x, y in curve:
            values.setdefault(round(x, 9), []).append(y)
    shared = {x: ys for x, ys in sorted(values.items()) if len(ys) > 1} or values
    band = [] if is_dashed else [(x, min(ys), max(ys)) for x, ys in shared.items()]
    return Series(name, [(x, statistics.fmean(ys)) for x, ys in shared.items()], color, is_dashed, band)


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
    columns = [["setting", *(record.name for record in records)], *rows]
    if len(records) > _MAX_SETTING_COLUMNS:  # a row for each run instead
        columns = [list(column) for column in zip(*columns, strict=True)]
        columns[0][0] = "run"
    return table(columns[0], columns[1:])


def _mean_over_seeds(experiments: Sequence[Experiment], split: str) -> str:
    """Returns the mean and deviation of each experiment with several seeds; empty if there is none."""
    splits = ("validation", "test") if split == "validation" else ("test",)
    rows: list[tuple[float, list[str]]] = []
    for experiment in experiments:
        if experiment.num_seeds < 2:
            continue
        cells, means = [], []
        for name in splits:
            by_seed = {
                record.settings.get("run.seed"): last_row(record, name).get("accuracy") for record in experiment.records
            }
            accuracies = [float(accuracy) for accuracy in by_seed.values() if accuracy is not None]
            means.append(statistics.mean(accuracies) if accuracies else None)
            cells.append(format_percent(means[-1]))
            cells.append(f"{100 * statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-")
        rows.append((means[0] or 0.0, [experiment.name, str(experiment.num_seeds), *cells]))
    headers = [title for name in splits for title in (f"mean {name} accuracy", "standard deviation, percentage points")]
    ranked = [row for _, row in sorted(rows, key=lambda row: row[0], reverse=True)]
    return table(("runs", "seeds", *headers), ranked) if ranked else ""
