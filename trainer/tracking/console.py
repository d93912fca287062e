"""Prints training progress: a progress bar on a terminal, plain lines elsewhere, and a table of results at the end."""

import io
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table

from trainer.format import class_table, format_duration
from trainer.text.escape import escape

_REDRAW_SECONDS = 0.1
_LOG_WIDTH = 100
_MIN_BAR_WIDTH = 12
_MAX_BAR_WIDTH = 40
# A narrow terminal loses these fields first, in this order.
_DROP_ORDER = ("epoch", "images/s", "accuracy", "loss", "left")


class TrainingRow(NamedTuple):
    """One row of training metrics."""

    step: int
    scalars: dict[str, float]
    wall_time: float
    """time of the measurement, in seconds since 1970"""
    seconds_left: float
    """estimated training time until the last step"""


class NullConsole:
    """Prints nothing. Every rank except rank 0 has this console."""

    def start(self, step: int, total_steps: int) -> None: ...
    def update(self, step: int) -> None: ...
    def log(self, text: str) -> None: ...
    def log_training(self, rows: Sequence[TrainingRow]) -> None: ...
    def log_evaluation(self, split: str, step: int, scalars: dict[str, float], best: str = "") -> None: ...
    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None: ...
    def log_summary(self, summary: dict[str, Any], folder: Path) -> None: ...
    def close(self) -> None: ...


class Console(NullConsole):
    """Prints progress to stdout and copies every line to the rank's log file."""

    def __init__(self, write_to_log: Callable[[str], None]) -> None:
        """write_to_log: receives every text as plain lines, including the lines that a progress bar replaces."""
        self._terminal = Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._write_to_log = write_to_log
        self._progress: Progress | None = None
        self._last_redraw = 0.0
        self._total_steps = 0
        self._validation = ""

    def start(self, step: int, total_steps: int) -> None:
        """Draws the progress bar if stdout is a terminal."""
        self._total_steps = total_steps
        if self._terminal.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(max(_MIN_BAR_WIDTH, min(_MAX_BAR_WIDTH, self._terminal.width // 5))),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            )
            self._progress = Progress(*columns, console=self._terminal)
            self._progress.add_task("", total=total_steps, completed=step, text="")
            self._progress.start()

    def update(self, step: int) -> None:
        """Moves the progress bar, at most ten times a second. Call it after each step."""
        now = time.perf_counter()
        if self._progress is not None and now - self._last_redraw > _REDRAW_SECONDS:
            self._progress.update(self._progress.task_ids[0], completed=step)
            self._last_redraw = now

    def log(self, text: str) -> None:
        """Prints one or more lines, above the progress bar if there is a bar."""
        text = escape(text, keep="\n\t")
        if self._terminal.is_terminal:
            self._terminal.print(text)
        else:  # plain print: rich takes half a millisecond a line and adds nothing here
            # A single write: the thread that writes checkpoints prints too.
            print(text + "\n", end="", file=self._terminal.file, flush=True)
        self._write_to_log(text)

    def log_training(self, rows: Sequence[TrainingRow]) -> None:
        """Prints one line for each row in a single write. A progress bar shows the last row instead."""
        lines = "\n".join("  ".join([f"step {row.step:,}/{self._total_steps:,}", *_row_fields(row)]) for row in rows)
        if self._progress is None:
            self.log(lines)
            return
        fields = _row_fields(rows[-1])
        available_width = self._terminal.width - _MIN_BAR_WIDTH - 2 * len(f"{self._total_steps:,}") - len("step  /  ")
        for dropped in _DROP_ORDER:
            if len("  ".join(fields)) > available_width:
                fields = [field for field in fields if dropped not in field]
        task = self._progress.tasks[0]
        self._progress.update(task.id, completed=max(rows[-1].step, task.completed), text="  ".join(fields))
        self._write_to_log(lines)

    def log_evaluation(self, split: str, step: int, scalars: dict[str, float], best: str = "") -> None:
        """Prints loss and accuracy on the test set, on the validation part before it, and the best so far, in a line.

        best: the best evaluation so far, as text.
        """
        tta = f"  with test-time augmentation {scalars['tta_accuracy']:.2%}" if "tta_accuracy" in scalars else ""
        scores = f"loss {scalars['loss']:.4f}  accuracy {scalars['accuracy']:.2%}{tta}"
        if split == "validation":
            self._validation = f"  validation: {scores}"
            return
        best_text = f"  best so far: {best}" if best else ""
        self.log(f"{split} at step {step:,}: {scores}{self._validation}{best_text}")
        self._validation = ""

    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None:
        """Prints a table of the most expensive operations of a profile."""
        self._print_table(operation_table(operations, title))

    def log_summary(self, summary: dict[str, Any], folder: Path) -> None:
        """Prints the table of test classes, the result in one line and the paths of the files."""
        self.close()
        test = summary["test"]
        self._print_table(
            class_table(test["classes"], "test set, by class"), class_table(test["classes"], "test set", ["f1"])
        )
        train, processes = summary["train"], summary["world_size"]
        self.log(
            f"test accuracy {test['accuracy']:.2%} of {test['num_samples']:,} images after {summary['steps']:,} steps "
            f"({summary['epochs']:g} epochs) in {format_duration(summary['seconds'])} on {processes} "
            f"process{'es' if processes > 1 else ''}, {train['samples_per_second']:,.0f} images/s in training"
        )
        self.log(f"all files: {folder}  weights: {folder / 'model.safetensors'}")
        self.log(f"next: samecurve predict {shlex.quote(str(folder))} IMAGE...")

    def _print_table(self, table: Table, narrow_table: Table | None = None) -> None:
        """narrow_table: printed instead if the terminal is too narrow for `table`. The log file gets `table`."""
        options = self._terminal.options.update_width(_LOG_WIDTH)
        is_too_wide = self._terminal.measure(table, options=options).maximum > self._terminal.width
        self._terminal.print(narrow_table if narrow_table is not None and is_too_wide else table)
        plain = io.StringIO()
        # A notebook would show a table of two consoles twice.
        Terminal(file=plain, width=_LOG_WIDTH, markup=False, emoji=False, force_jupyter=False).print(table)
        self._write_to_log(plain.getvalue().rstrip())

    def close(self) -> None:
        """Removes the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _row_fields(row: TrainingRow) -> list[str]:
    scalars = row.scalars
    return [
        f"epoch {scalars['epoch']:.2f}", f"loss {scalars['loss']:.4f}", f"accuracy {scalars['accuracy']:.1%}",
        f"{scalars['samples_per_second']:,.0f} images/s", f"{format_duration(row.seconds_left)} left",
    ]  # fmt: skip


def operation_table(operations: list[dict[str, Any]], title: str) -> Table:
    """Returns a table of operations.

    operations: dicts with name, share (of the time of all operations), milliseconds_per_step and calls_per_step.
    """
    table = Table("operation", "share", "ms/step", "calls/step", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in operations:
        numbers = (f"{row['share']:.1%}", f"{row['milliseconds_per_step']:.3f}", f"{row['calls_per_step']:,.1f}")
        table.add_row(row["name"], *numbers)
    return table
