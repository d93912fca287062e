"""Writes report.html for one run or several: one file that needs no network and no scripts. Does not import torch."""

import base64
import heapq
import html
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.report import figures
from trainer.report.comparison import comparison_page, format_setting
from trainer.report.examples import MAX_CLASSES, MAX_SAMPLES_PER_CLASS, read_examples
from trainer.report.results import curve_charts, format_count, read_results
from trainer.report.style import page, section, table
from trainer.run.files import replace_file
from trainer.run.record import RunRecord
from trainer.tracking.example import Example

REPORT_FILE = "report.html"
_MAX_CONFUSED_PAIRS = 30


def write_report(folders: Sequence[Path], out: Path) -> None:
    """Writes the report of one run, or a comparison of several runs, to the file `out`, atomically.

    Raises FolderError if a folder is not a run folder or one of its files cannot be read. Raises OSError if `out`
    cannot be written.
    """
    records = _with_unique_names([RunRecord(folder) for folder in folders])
    text = run_page(records[0]) if len(records) == 1 else comparison_page(records)
    content = text.encode(errors="xmlcharrefreplace")  # a recorded command line may contain undecodable bytes
    replace_file(out, lambda path: path.write_bytes(content))


def _with_unique_names(records: list[RunRecord]) -> list[RunRecord]:
    """Replaces names that occur more than once by the paths of the run folders."""
    names = [record.name for record in records]
    return [
        RunRecord(record.path, os.path.normpath(record.path)) if names.count(record.name) > 1 else record
        for record in records
    ]


def run_page(record: RunRecord) -> str:
    """Returns the HTML page for one run."""
    examples = read_examples(record.path)
    sections = [
        _header(record),
        section("Curves", curve_charts([record])),
        section("Classes", _evaluation(record)),
        section("Most confident mistakes", _gallery(examples.mistakes)),
        section("Samples of each class", _samples_by_class(examples.samples)),
        section("First training batch", _embed_figures(record, f"{figures.FIRST_BATCH_FIGURE}.png")),
        section("Feature maps", _embed_figures(record, "feature_maps/*.png")),
        section(
            "Settings that differ from the defaults",
            table(("setting", "value", "default"), _settings_changed_from_defaults(record)),
        ),
        section("Environment", table(("", ""), _environment(record))),
        section("How to repeat this run", _commands(record)),
    ]
    return page(record.name, sections)


def _header(record: RunRecord) -> str:
    results = read_results(record)
    cards = [
        ("test accuracy", results.test_accuracy),
        ("with test-time augmentation", results.tta_accuracy),
        ("time", results.time),
        ("training images/s", results.images_per_second),
        ("epochs", results.epochs),
        ("steps", results.steps),
        ("ranks", results.world_size),
        ("restarts", results.restarts),
    ]
    if results.tta_accuracy == "-":  # most runs do not use it
        del cards[1]
    cards_html = "".join(f"<div><dt>{title}</dt><dd>{html.escape(value)}</dd></div>" for title, value in cards)
    state, reason = html.escape(results.state), html.escape(results.reason)
    description = html.escape(f"{record.settings['model.name']} on {record.settings['data.name']}")
    return (
        f'<header><h1>{html.escape(record.name)} <span class="state {state}">{state}</span></h1>'
        f"<p>{description}{f' - {reason}' if reason else ''}</p>"
        f'<dl class="cards">{cards_html}</dl></header>'
    )


def _evaluation(record: RunRecord) -> str:
    """Returns scores by class and the confusion matrix of the last evaluation, or an empty string without one."""
    if not (classes := record.evaluation.get("classes", [])):
        return ""
    names, confusion = [row["name"] for row in classes], record.evaluation["confusion"]
    is_small = len(names) <= figures.MAX_CONFUSION_CLASSES
    return (
        f"<p>test set at step {format_count(record.evaluation.get('step'))}</p>"
        + _class_scores(classes)
        + (_confusion_matrix(names, confusion) if is_small else _most_confused_pairs(names, confusion))
    )


def _class_scores(classes: Sequence[dict[str, Any]]) -> str:
    rows = [
        [row["name"], *(f"{row[key]:.1%}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for row in classes
    ]
    return table(("class", "precision", "recall", "f1", "images"), rows, numeric=True)


def _confusion_matrix(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """confusion[true class][predicted class]: counts. The style sheet colors a cell by its share of its row."""
    header = "".join(f'<th scope="col"><span>{html.escape(name)}</span></th>' for name in names)
    body = ""
    for name, row in zip(names, confusion, strict=True):
        total = max(1, sum(row))
        cells = "".join(f'<td style="--share:{100 * count / total:.0f}%">{count:,}</td>' for count in row)
        body += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    return (
        "<h3>Confusion matrix</h3><p>rows: true class; columns: predicted class</p>"
        f'<div class="wide"><table class="confusion"><tr><td></td>{header}</tr>{body}</table></div>'
    )


def _most_confused_pairs(names: Sequence[str], confusion: Sequence[Sequence[int]]) -> str:
    """Stands in for a confusion matrix that is too large to read."""
    mistakes = (
        (count, names[true], names[predicted])
        for true, row in enumerate(confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    )
    most_frequent = heapq.nlargest(_MAX_CONFUSED_PAIRS, mistakes)
    rows = [[true, predicted, f"{count:,}"] for count, true, predicted in most_frequent]
    content = table(("true class", "predicted class", "images"), rows) if rows else "<p>no mistakes</p>"
    return f"<h3>Most frequent mistakes</h3>{content}"


def _gallery(examples: Iterable[Example]) -> str:
    """Returns captioned images side by side, or an empty string without examples."""
    images = "".join(map(_captioned_image, examples))
    return images and f'<div class="gallery">{images}</div>'


def _captioned_image(example: Example) -> str:
    is_correct = example.label == example.predicted
    prediction = html.escape(f"{example.predicted} {example.probability:.0%}")
    label = html.escape(example.label)
    caption = prediction if is_correct else f"<b>{prediction}</b><br>true: {label}"
    return (
        f'<figure class="{"right" if is_correct else "wrong"}">'
        f'<img src="data:image/png;base64,{example.png}" alt="{label}, predicted {prediction}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _samples_by_class(samples: Sequence[Example]) -> str:
    """Returns one gallery per class, or an empty string without samples."""
    if not samples:
        return ""
    by_class: dict[str, list[Example]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    return f"<p>up to {MAX_SAMPLES_PER_CLASS} per class, of the first {MAX_CLASSES} classes</p>" + "".join(
        f"<h3>{html.escape(name)}</h3>{_gallery(members)}" for name, members in by_class.items()
    )


def _embed_figures(record: RunRecord, pattern: str) -> str:
    """Returns the matching images of the run's figures folder as HTML that contains the image data."""
    paths = sorted((record.path / figures.FIGURES_FOLDER).glob(pattern))
    return "".join(
        f'<img class="figure" alt="{html.escape(path.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for path in paths
    )


def _settings_changed_from_defaults(record: RunRecord) -> list[list[str]]:
    defaults = flatten(RunConfig())
    return [
        [name, format_setting(value), format_setting(defaults[name])]
        for name, value in record.settings.items()
        if name in defaults and value != defaults[name]
    ]


def _environment(record: RunRecord) -> list[list[str]]:
    """Returns rows of name and value: the machine, then the versions of the packages. Drops empty values."""
    hidden = ("command", "packages")  # the command has its own section
    rows = [[name, format_setting(value)] for name, value in record.environment.items() if name not in hidden and value]
    packages = record.environment.get("packages", {})
    return [*rows, *([name, version] for name, version in packages.items() if version)]


def _commands(record: RunRecord) -> str:
    """Returns a command that repeats the run with the same settings and world size, and the original command."""
    environment = record.environment
    world_size, num_hosts = environment.get("world_size", 1), len(set(environment.get("hosts", []))) or 1
    if num_hosts > 1:
        per_node = "--gpus-per-node" if environment.get("backend") == "nccl" else "--ntasks-per-node"
        launch = ["submit", "--nodes", str(num_hosts), per_node, str(-(-world_size // num_hosts))]
    else:
        launch = ["train", "--ranks", str(world_size)]
    config_file = str(record.path.resolve() / "config.yaml")
    command = shlex.join(["samecurve", *launch, "--config", config_file, f"run.name={record.name}-again"])
    original, directory = str(environment.get("command", "")), str(environment.get("directory", ""))
    location = f", in {html.escape(directory)}" if directory else ""
    return (
        f"<pre>{html.escape(command)}</pre>"
        f"<p>Command of each rank in the last session{location}:</p><pre>{html.escape(original)}</pre>"
    )
