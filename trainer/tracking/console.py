"""What happens, for a person: a progress bar on a terminal, plain lines otherwise, a table at the end."""

import io
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from trainer.format import class_table, format_duration

_REDRAW_SECONDS = 0.1
_LOG_WIDTH = 100
_BAR_WIDTH = 12  # at least
_FIRST_DROPPED = ("epoch", "images/s", "accuracy", "loss", "left")  # where a terminal is too narrow for all


class TrainingRow(NamedTuple):
    """What is told of training, a line each."""

    step: int
    scalars: dict[str, float]
    at: float
    """seconds since 1970"""
    seconds_left: float


class NullConsole:
    """What every rank but the first is given."""

    def start(self, step: int, total_steps: int) -> None: ...
    def update(self, step: int) -> None: ...
    def log(self, text: str) -> None: ...
    def log_training(self, rows: Sequence[TrainingRow]) -> None: ...
    def log_evaluation(self, split: str, step: int, scalars: dict[str, float]) -> None: ...
    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None: ...
    def log_summary(self, summary: dict[str, Any], folder: Path) -> None: ...
    def close(self) -> None: ...


class Console(NullConsole):
    def __init__(self, keep: Callable[[str], None]) -> None:
        """keep: takes what is said here as text too, line by line, those that a bar hides among them."""
        self._terminal = Terminal(highlight=False, soft_wrap=True)
        self._keep = keep
        self._progress: Progress | None = None
        self._drawn = 0.0
        self._total_steps = 0

    def start(self, step: int, total_steps: int) -> None:
        """Draws the bar, where there is a terminal to draw it on."""
        self._total_steps = total_steps
        if self._terminal.is_terminal:
            columns = (
                TextColumn("step"),
                BarColumn(max(_BAR_WIDTH, min(40, self._terminal.width // 5))),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True)),
            )
            self._progress = Progress(*columns, console=self._terminal)
            self._progress.add_task("", total=total_steps, completed=step, text="")
            self._progress.start()

    def update(self, step: int) -> None:
        """Called after each step; moves the bar ten times a second at most."""
        now = time.perf_counter()
        if self._progress is not None and now - self._drawn > _REDRAW_SECONDS:
            self._progress.update(self._progress.task_ids[0], completed=step)
            self._drawn = now

    def log(self, text: str) -> None:
        """A line or more, above the bar if there is one."""
        if self._terminal.is_terminal:
            self._terminal.print(text, markup=False)
        else:  # which needs none of rich's care, and none of the half millisecond that it takes
            try:  # in one piece: the thread that saves speaks too
                print(text + "\n", end="", file=self._terminal.file, flush=True)
            except BrokenPipeError:
                self._terminal.on_broken_pipe()
        self._keep(text)

    def log_training(self, rows: Sequence[TrainingRow]) -> None:
        """A line of each, in one piece; the last one is the bar's text where there is a bar."""
        lines = "\n".join("  ".join([f"step {row.step:,}/{self._total_steps:,}", *_parts(row)]) for row in rows)
        if self._progress is None:
            self.log(lines)
            return
        parts = _parts(rows[-1])
        room = self._terminal.width - _BAR_WIDTH - 2 * len(str(self._total_steps)) - len("step  /  ")
        for dropped in _FIRST_DROPPED:
            if len("  ".join(parts)) > room:
                parts = [part for part in parts if dropped not in part]
        task = self._progress.tasks[0]
        self._progress.update(task.id, completed=max(rows[-1].step, task.completed), text="  ".join(parts))
        self._keep(lines)

    def log_evaluation(self, split: str, step: int, scalars: dict[str, float]) -> None:
        several = f"  with several views {scalars['tta_accuracy']:.2%}" if "tta_accuracy" in scalars else ""
        self.log(f"{split} at step {step:,}: loss {scalars['loss']:.4f}  accuracy {scalars['accuracy']:.2%}{several}")

    def log_profile(self, operations: list[dict[str, Any]], title: str) -> None:
        """A table of a profile's most expensive operations."""
        self._show(operation_table(operations, title))

    def log_summary(self, summary: dict[str, Any], folder: Path) -> None:
        """The per-class table of the test set, the result in one line, and where the files are."""
        self.close()
        test = summary["test"]
        self._show(class_table(test["classes"], "test set, by class"), class_table(test["classes"], "test set", ["f1"]))
        train, processes = summary["train"], summary["world_size"]
        self.log(
            f"test accuracy {test['accuracy']:.2%} of {test['num_samples']:,} images after {summary['steps']:,} steps "
            f"({summary['epochs']:g} epochs) in {format_duration(summary['seconds'])} on {processes} "
            f"process{'es' if processes > 1 else ''}, {train['samples_per_second']:,.0f} images/s in training"
        )
        self.log(f"all files: {folder}  weights: {folder / 'model.safetensors'}")
        self.log(f"next: samecurve predict {shlex.quote(str(folder))} IMAGE...")

    def _show(self, table: Table, narrow: Table | None = None) -> None:
        """narrow: what a terminal shows that is too narrow for the table."""
        wanted = self._terminal.measure(table, options=self._terminal.options.update_width(_LOG_WIDTH)).maximum
        self._terminal.print(narrow if narrow is not None and wanted > self._terminal.width else table)
        plain = io.StringIO()
        Terminal(file=plain, width=_LOG_WIDTH).print(table)
        self._keep(plain.getvalue().rstrip())

    def close(self) -> None:
        """Takes the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _parts(row: TrainingRow) -> list[str]:
    scalars = row.scalars
    return [
        f"epoch {scalars['epoch']:.2f}", f"loss {scalars['loss']:.4f}", f"accuracy {scalars['accuracy']:.1%}",
        f"{scalars['samples_per_second']:,.0f} images/s", f"{format_duration(row.seconds_left)} left",
    ]  # fmt: skip


def operation_table(operations: list[dict[str, Any]], title: str) -> Table:
    """operations: with name, share of all operations' time, milliseconds_per_step, calls_per_step."""
    table = Table("operation", *(["share", "ms/step", "calls/step"]), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in operations:
        numbers = (f"{row['share']:.1%}", f"{row['milliseconds_per_step']:.3f}", f"{row['calls_per_step']:,.1f}")
        table.add_row(row["name"], *numbers)
    return table
