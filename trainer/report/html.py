"""Run folders in, report.html out: one file that needs no network and no script. `samecurve report RUN [RUN...]`.

One run: what it reached, its curves, classes, surest mistakes, settings and how to repeat it. Several: their curves
over each other, the settings in which they differ, mean and deviation over seeds. No torch.
"""

import base64
import heapq
import html
import json
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.config.changes import MAY_CHANGE
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.format import format_duration
from trainer.report import figures
from trainer.report.style import page, section, table
from trainer.report.svg import Series, line_chart
from trainer.run.files import replace_file
from trainer.run.record import Example, RunRecord, read_record

REPORT_FILE = "report.html"
# Of a line of metrics, and its title.
_CURVES = (("loss", "loss"), ("accuracy", "accuracy"), ("lr", "learning rate"), ("samples_per_second", "images/s"))
# Where a run lies, what it is seeded with and how it is watched does not make it another experiment.
_NO_EXPERIMENT = MAY_CHANGE - {"train.epochs", "train.max_steps"} | {"run.name", "run.seed"}
_SOME = "<p>at most 8 of each, of the first 20 classes</p>"
_MOST_CELLS = 30  # classes of a confusion matrix that is shown whole


def write_report(folders: Sequence[Path], out: Path) -> None:
    """One run's report, or that of several side by side. Raises FolderError for what is no run; OSError."""
    told = _apart([read_record(folder) for folder in folders])
    text = run_page(told[0]) if len(told) == 1 else comparison_page(told)
    content = text.encode(errors="xmlcharrefreplace")  # a command may have bytes that are no text
    replace_file(out, lambda path: path.write_bytes(content))


def _apart(runs: list[RunRecord]) -> list[RunRecord]:
    """Those whose names are the same are told apart by their folders."""
    names = [run.name for run in runs]
    return [replace(run, name=os.path.normpath(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def run_page(run: RunRecord) -> str:
    """The page of one run."""
    classes = run.evaluation.get("classes", [])
    parts = [
        _headline(run),
        section("Curves", _curves([run])),
        section("Classes", _at(run) + _classes(classes) + _confusion(run.evaluation) if classes else ""),
        section("The surest mistakes", _gallery(run.mistakes) if run.mistakes else ""),
        section("Some of each class", _SOME + _by_class(run.samples) if run.samples else ""),
        section("What it is trained on", _figures(run, "samples.png")),
        section("What its layers make of an image", _figures(run, "feature_maps/*.png")),
        section("Settings that differ from the defaults", table(("setting", "here", "default"), _changed(run))),
        section("Environment", table(("", ""), _environment(run))),
        section("To repeat it", _commands(run)),
    ]
    return page(run.name, parts)


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """The page of several runs."""
    title = f"{len(runs)} runs"
    rows = [[_name(run, index), *_numbers(run)] for index, run in enumerate(runs)]
    heads = ("run", "state", "test accuracy", "test loss", "steps", "time", "images/s", "ranks")
    parts = [
        f"<header><h1>{title}</h1></header>",
        section("Results", table(heads, rows, raw=True, numbers=True)),
        section("Curves", _curves(runs)),
        section("Settings in which they differ", _differing(runs)),
        section("Mean over seeds", _over_seeds(runs)),
    ]
    return page(title, parts)


def _headline(run: RunRecord) -> str:
    test, train = run.last("test"), run.last("train")
    model, data = run.settings["model.name"], run.settings["data.name"]
    several_views = test.get("tta_accuracy")
    cards = [
        ("test accuracy", _percent(test.get("accuracy"))),
        *([("with several views", _percent(several_views))] if several_views is not None else []),
        ("time", _time(run)),
        ("images/s in training", _count(run.summary.get("train", train).get("samples_per_second"))),
        ("epochs", f"{run.last('train').get('epoch', 0):.4g}"),
        ("steps", _count(run.status.get("step"))),
        ("ranks", _count(run.environment.get("world_size"))),
        ("restarts", str(run.restarts)),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{html.escape(value)}</dd></div>" for name, value in cards)
    state = html.escape(str(run.status.get("state", "unknown")))
    reason = html.escape(str(run.status.get("reason") or ""))
    return (
        f'<header><h1>{html.escape(run.name)} <span class="state {state}">{state}</span></h1>'
        f"<p>{html.escape(f'{model} on {data}')}{f' - {reason}' if reason else ''}</p>"
        f'<dl class="cards">{shown}</dl></header>'
    )


def _curves(runs: Sequence[RunRecord]) -> str:
    """A chart of each measure: training and evaluations of one run; of several, each run in its colour."""
    charts = []
    for key, title in _CURVES:
        series = []
        evaluated = any(run.points("test", key) for run in runs)
        for index, run in enumerate(runs):
            for place, split in enumerate(("train", "test", "validation")):
                points = run.points(split, key)
                if points and len(runs) == 1:
                    series.append(Series(split, points, place))
                elif points:
                    dashed = split == "train" and evaluated
                    series.append(Series(f"{run.name}: {split}", points, index, dashed))
        drawn = line_chart(series, "epoch", title, percent=key == "accuracy", from_zero=key == "samples_per_second")
        charts.append(f"<figure><figcaption>{title}</figcaption>{drawn}</figure>")
    return f'<div class="charts">{"".join(charts)}</div>'


def _at(run: RunRecord) -> str:
    return f"<p>of the test set, at step {_count(run.evaluation.get('step'))}</p>"


def _commands(run: RunRecord) -> str:
    """Another run with the same settings, on as many processes; and how this one was started."""
    size, hosts = run.environment.get("world_size", 1), len(set(run.environment.get("hosts", []))) or 1
    per_node = "--gpus-per-node" if run.environment.get("backend") == "nccl" else "--ntasks-per-node"
    several = ["submit", "--nodes", str(hosts), per_node, str(-(-size // hosts))]
    words = ["samecurve", *(several if hosts > 1 else ["train", "--ranks", str(size)])]
    words += ["--config", str(run.folder.resolve() / "config.yaml"), f"run.name={run.name}-again"]
    started, directory = str(run.environment.get("command", "")), str(run.environment.get("directory", ""))
    where = f" in {html.escape(directory)}" if directory else ""
    return (
        f"<pre>{html.escape(shlex.join(words))}</pre>"
        f"<p>Each rank was last started{where} by:</p><pre>{html.escape(started)}</pre>"
    )


def _classes(classes: Sequence[dict[str, Any]]) -> str:
    rows = [
        [row["name"], *(f"{row[key]:.1%}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for row in classes
    ]
    return table(("class", "precision", "recall", "f1", "images"), rows, numbers=True)


def _confusion(test: dict[str, Any]) -> str:
    """Rows are what an image is, columns what it was taken for; the darker, the larger its share of the row."""
    matrix, names = test["confusion"], [row["name"] for row in test["classes"]]
    if len(names) > _MOST_CELLS:
        wrong = (
            (count, names[i], names[j])
            for i, row in enumerate(matrix)
            for j, count in enumerate(row)
            if count and i != j
        )
        pairs = heapq.nlargest(_MOST_CELLS, wrong)
        rows = [[is_, was, f"{count:,}"] for count, is_, was in pairs]
        found = table(("is", "was taken for", "images"), rows) if rows else "<p>no mistakes</p>"
        return f"<h3>What is taken for what most often</h3>{found}"
    head = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    body = ""
    for name, row in zip(names, matrix, strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="--share:{100 * count / total:.0f}%">{count:,}</td>' for count in row)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    return (
        "<h3>Confusion matrix</h3><p>rows: what an image is; columns: what it was taken for</p>"
        f'<div class="wide"><table class="confusion"><tr><td></td>{head}</tr>{body}</table></div>'
    )


def _gallery(shown: Iterable[Example]) -> str:
    return f'<div class="gallery">{"".join(map(_picture, shown))}</div>'


def _by_class(samples: Sequence[Example]) -> str:
    """A row for each class."""
    rows: dict[str, list[Example]] = {}
    for each in samples:
        rows.setdefault(each.label, []).append(each)
    return "".join(f"<h3>{html.escape(label)}</h3>{_gallery(members)}" for label, members in rows.items())


def _picture(shown: Example) -> str:
    right = shown.label == shown.predicted
    said = f"{shown.predicted} {shown.probability:.0%}"
    text = html.escape(said) if right else f"<b>{html.escape(said)}</b><br>is {html.escape(shown.label)}"
    alt = html.escape(f"{shown.label}, predicted {said}")
    kind = "right" if right else "wrong"
    return (
        f'<figure class="{kind}"><img src="data:image/png;base64,{shown.png}" alt="{alt}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _figures(run: RunRecord, pattern: str) -> str:
    """Those in the run's folder, inside the page."""
    found = sorted((run.folder / figures.FIGURES_FOLDER).glob(pattern))
    return "".join(
        f'<img class="figure" alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in found
    )


def _changed(run: RunRecord) -> list[list[str]]:
    defaults = flatten(RunConfig())
    return [
        [name, _value(value), _value(defaults[name])]
        for name, value in run.settings.items()
        if name in defaults and value != defaults[name]
    ]


def _environment(run: RunRecord) -> list[list[str]]:
    about = {key: value for key, value in run.environment.items() if key not in ("command", "packages") and value}
    packages = run.environment.get("packages", {})
    rows = [[key, value if isinstance(value, str) else _value(value)] for key, value in about.items()]
    return [*rows, *([name, version] for name, version in packages.items() if version)]


def _numbers(run: RunRecord) -> list[str]:
    test, train = run.last("test"), run.last("train")
    loss = test.get("loss")
    rate = run.summary.get("train", train).get("samples_per_second")
    numbers = [
        str(run.status.get("state", "unknown")), _percent(test.get("accuracy")), "-" if loss is None else f"{loss:.4f}",
        _count(run.status.get("step")), _time(run), _count(rate), _count(run.environment.get("world_size")),
    ]  # fmt: skip
    return [html.escape(number) for number in numbers]


def _name(run: RunRecord, index: int) -> str:
    return f'<span class="key c{index % 8}"></span>{html.escape(run.name)}'


def _differing(runs: Sequence[RunRecord]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ("run.name", "run.root"))
    rows = []
    for name in names:
        values = [_value(run.settings.get(name)) for run in runs]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return table(("setting", *(run.name for run in runs)), rows) if rows else "<p>None but their names.</p>"


def _over_seeds(runs: Sequence[RunRecord]) -> str:
    """Runs whose settings are the same but for the seed are one experiment."""
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        kept = {name: value for name, value in run.settings.items() if name not in _NO_EXPERIMENT}
        groups.setdefault(json.dumps(kept, sort_keys=True, default=str), []).append(run)
    rows = []
    for members in groups.values():
        by_seed = {run.settings.get("run.seed"): run.last("test").get("accuracy") for run in members}
        found = [float(accuracy) for accuracy in by_seed.values() if accuracy is not None]
        deviation = f"{100 * statistics.stdev(found):.2f}" if len(found) > 1 else "-"
        mean = f"{statistics.mean(found):.2%}" if found else "-"
        rows.append([", ".join(run.name for run in members), str(len(found)), mean, deviation])
    return table(("runs", "seeds", "mean test accuracy", "standard deviation, points"), rows)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _count(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _time(run: RunRecord) -> str:
    seconds = run.summary.get("seconds") or run.last("train").get("seconds")
    return "-" if seconds is None else format_duration(seconds)
