"""Writes report.html for one run or several: one file that needs no network and no scripts. Does not import torch."""

import base64
import html
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.errors import FolderError
from trainer.report import figures
from trainer.report.comparison import comparison_page, format_setting, problem_list
from trainer.report.confusion import MAX_TABLE_CLASSES, confusion_html
from trainer.report.examples import MAX_CLASSES, MAX_SAMPLES_PER_CLASS, read_examples
from trainer.report.results import curve_charts, format_count, read_results
from trainer.report.style import page, section, table
from trainer.run.files import replace_file
from trainer.run.record import RunRecord, unreadable_file
from trainer.text.escape import escape
from trainer.tracking.example import Example

REPORT_FILE = "report.html"
_MAX_OPEN_CLASSES = 10  # the images of more classes fill screens; a click shows them
_UNKNOWN_SETTING = "not a setting of this version"


def write_report(folders: Sequence[Path], out: Path) -> list[str]:
    """Writes the report of one run, or a comparison of several runs, to the file `out`, atomically.

    Returns what could not be read and is left out: lines of a file, or a run of several. The page names it too.
    Raises FolderError if a folder is not a run folder or one of its files cannot be read; for several runs, only if
    that is so for all of them. Raises OSError if `out` cannot be written.
    """
    if len(folders) == 1:
        record = RunRecord(folders[0])
        text, problems = run_page(record), record.problems
    else:
        records, problems = _readable(folders)
        text = comparison_page(_with_unique_names(records), problems)
    # html.escape left characters that hide, reverse text or cannot be encoded. Their escapes need no quoting in HTML.
    content = escape(text, keep="\n\t").encode()
    replace_file(out, lambda path: path.write_bytes(content))
    return problems


def _readable(folders: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """Returns the runs whose files can be read, and what cannot be read. Raises FolderError if no run can be read."""
    records, problems, first_error = [], [], None
    for folder in folders:
        record = RunRecord(folder)
        try:
            _ = record.settings, record.status, record.environment, record.summary, record.sessions, record.rows
            _ = record.last_train_row
        except FolderError as error:
            first_error = first_error or error
            problems.append(f"{folder} is left out: {error}")
        else:
            records.append(record)
            problems += record.problems
    if not records and first_error is not None:
        raise first_error
    return records, list(dict.fromkeys(problems))


def _with_unique_names(records: list[RunRecord]) -> list[RunRecord]:
    """Replaces names that occur more than once by the paths of the run folders.

    Names of runs that are all in one folder, such as a sweep, lose the folder.
    """
    names = [record.name for record in records]
    if len(set(names)) == len(names) > 1 and (folder := os.path.commonpath([f"/{name}" for name in names])) != "/":
        return [RunRecord(record.path, record.name[len(folder) :] or record.name) for record in records]
    return [
        RunRecord(record.path, os.path.normpath(record.path)) if names.count(record.name) > 1 else record
        for record in records
    ]


def run_page(record: RunRecord) -> str:
    """Returns the HTML page for one run."""
    examples = read_examples(record.path)
    record.rows  # noqa: B018  read first: the header names lines that are skipped
    sections = [
        _header(record),
        section("Curves", curve_charts(record)),
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
        ("validation accuracy", results.validation_accuracy, ""),
        ("test accuracy", results.test_accuracy, ""),
        ("with test-time augmentation", results.tta_accuracy, ""),
        (f"best {results.best_split} accuracy", results.best_accuracy, f"step {results.best_step}"),
        ("test loss", results.test_loss, ""),
        ("time", results.time, ""),
        ("training images/s", results.images_per_second, ""),
        ("epochs", results.epochs, ""),
        ("steps", results.steps, ""),
        ("parameters", results.parameters, _trained_parameters(record)),
        ("ranks", results.world_size, ""),
        ("restarts", results.restarts, ""),
    ]
    not_in_every_run = ("validation accuracy", "with test-time augmentation", "parameters")
    cards = [card for card in cards if card[0] not in not_in_every_run or card[1] != "-"]
    cards_html = "".join(
        f"<div><dt>{title}</dt><dd>{html.escape(value)}"
        f"{f' <small>{html.escape(note)}</small>' if note and value != '-' else ''}</dd></div>"
        for title, value, note in cards
    )
    state, reason = html.escape(results.state), html.escape(results.reason)
    description = html.escape(f"{record.settings.get('model.name', 'a network')} on {_describe_data(record)}")
    return (
        f'<header><h1>{html.escape(record.name)} <span class="state {state}">{state}</span></h1>'
        f"<p>{description}{f' - {reason}' if reason else ''}</p>{problem_list(record.problems)}"
        f'<dl class="cards">{cards_html}</dl></header>'
    )


def _describe_data(record: RunRecord) -> str:
    """Returns which images the run trains on: their name, their source and how many there are."""
    name, root = (record.settings.get(f"data.{key}") for key in ("name", "root"))
    source = {"digits": "of scikit-learn"}.get(str(name), f"in {_absolute(record, str(root))}" if root else "")
    counts = record.environment.get("num_images") or {}
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items() if count is not None)
    return f"{name or 'images'} {source}".strip() + (f" ({images} images)" if images else "")


def _absolute(record: RunRecord, path: str) -> str:
    """Returns a path of the settings as the run saw it: relative to the folder where it was started."""
    return os.path.normpath(Path(record.environment.get("directory") or "") / Path(path).expanduser())


def _trained_parameters(record: RunRecord) -> str:
    trained = record.environment.get("trained_parameters")
    return f"{trained:,} trained" if trained not in (None, record.environment.get("parameters")) else ""


def _evaluation(record: RunRecord) -> str:
    """Returns scores by class and the confusion matrix of the last evaluation, or an empty string without one."""
    if not (classes := record.evaluation.get("classes")):
        return ""
    names, confusion = [row["name"] for row in classes], record.evaluation["confusion"]
    scores = _class_scores(classes)
    if len(names) > MAX_TABLE_CLASSES:
        scores = f"<details><summary>scores of {len(names):,} classes</summary>{scores}</details>"
    step = format_count(record.evaluation.get("step"))
    matrix = confusion_html(names, confusion)
    return f'<p>test set at step {step}</p><div class="side"><div>{scores}</div><div>{matrix}</div></div>'


def _class_scores(classes: Sequence[dict[str, Any]]) -> str:
    rows = [
        [row["name"], *(f"{row[key]:.1%}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
        for row in classes
    ]
    return table(("class", "precision", "recall", "f1", "images"), rows, numeric=True)


def _gallery(examples: Iterable[Example]) -> str:
    """Returns captioned images side by side, or an empty string without examples."""
    images = "".join(map(_captioned_image, examples))
    return images and f'<div class="gallery">{images}</div>'


def _captioned_image(example: Example, captions_correct: bool = True) -> str:
    is_correct = example.label == example.predicted
    prediction = html.escape(f"{example.predicted} {example.probability:.0%}")
    label = html.escape(example.label)
    caption = prediction if is_correct else f"<b>{prediction}</b><br>true: {label}"
    caption = caption if captions_correct or not is_correct else ""
    return (
        f'<figure class="{"right" if is_correct else "wrong"}">'
        f'<img src="data:image/png;base64,{example.png}" alt="{label}, predicted {prediction}" '
        f'title="predicted {prediction}; true: {label}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _samples_by_class(samples: Sequence[Example]) -> str:
    """Returns a row of images for each class, or an empty string without samples. Only mistakes have captions."""
    if not samples:
        return ""
    by_class: dict[str, list[Example]] = {}
    for sample in samples:
        by_class.setdefault(sample.label, []).append(sample)
    rows = "".join(
        f'<div><h3>{html.escape(name)}</h3><div class="gallery">'
        f"{''.join(_captioned_image(sample, captions_correct=False) for sample in members)}</div></div>"
        for name, members in by_class.items()
    )
    note = f"up to {MAX_SAMPLES_PER_CLASS} per class, of the first {MAX_CLASSES} classes; mistakes have a caption"
    is_open = " open" if len(by_class) <= _MAX_OPEN_CLASSES else ""
    return f'<details{is_open}><summary>{note}</summary><div class="classes">{rows}</div></details>'


def _embed_figures(record: RunRecord, pattern: str) -> str:
    """Returns the matching images of the run's figures folder as HTML that contains the image data."""
    images = ""
    for path in sorted((record.path / figures.FIGURES_FOLDER).glob(pattern)):
        try:
            content = base64.b64encode(path.read_bytes()).decode()
        except OSError as error:
            raise unreadable_file(path, error) from None
        images += f'<img class="figure" alt="{html.escape(path.stem)}" src="data:image/png;base64,{content}">'
    return images


def _settings_changed_from_defaults(record: RunRecord) -> list[list[str]]:
    defaults = flatten(RunConfig())
    return [
        [name, format_setting(value), format_setting(defaults[name]) if name in defaults else _UNKNOWN_SETTING]
        for name, value in record.settings.items()
        if name not in defaults or value != defaults[name]
    ]


def _environment(record: RunRecord) -> list[list[str]]:
    """Returns rows of name and value: the machine, then the versions of the packages. Drops empty values."""
    hidden = ("command", "packages", "parameters", "trained_parameters", "num_images")  # they are shown elsewhere
    rows = [[name, format_setting(value)] for name, value in record.environment.items() if name not in hidden and value]
    packages = record.environment.get("packages") or {}
    return [*rows, *([name, version] for name, version in packages.items() if version)]


def _commands(record: RunRecord) -> str:
    """Returns a command that repeats the run with the same settings and world size, and the original command."""
    environment = record.environment
    world_size, num_hosts = environment.get("world_size") or 1, len(set(environment.get("hosts") or ())) or 1
    if num_hosts > 1:
        per_node = "--gpus-per-node" if environment.get("backend") == "nccl" else "--ntasks-per-node"
        launch = ["submit", "--nodes", str(num_hosts), per_node, str(-(-world_size // num_hosts))]
    else:
        launch = ["train", "--ranks", str(world_size)]
    config_file = str(record.path.resolve() / "config.yaml")
    command = shlex.join(["samecurve", *launch, "--config", config_file, f"run.name={record.name}-again"])
    original, directory = environment.get("command") or "", environment.get("directory") or ""
    location = f", in {html.escape(directory)}" if directory else ""
    return (
        f"<pre>{html.escape(command)}</pre>"
        f"<p>Command of each rank in the last session{location}:</p><pre>{html.escape(original)}</pre>"
    )
