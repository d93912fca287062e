"""What happens, for a person: a progress bar on a terminal, plain lines otherwise, a table at the end."""

import io
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from trainer.spoken import duration

_REDRAW_SECONDS = 0.1
_LOG_WIDTH = 100


class Quiet:
    """What every rank but the first is given."""

    def start(self, step: int, total_steps: int) -> None: ...
    def tick(self, step: int) -> None: ...
    def say(self, text: str) -> None: ...
    def training(self, step: int, scalars: dict[str, float], seconds_left: float) -> None: ...
    def evaluated(self, split: str, step: int, scalars: dict[str, float]) -> None: ...
    def finished(self, summary: dict[str, Any], folder: Path) -> None: ...
    def close(self) -> None: ...


class Console(Quiet):
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
            columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self._progress = Progress(*columns, console=self._terminal)
            self._progress.add_task("", total=total_steps, completed=step, text="")
            self._progress.start()

    def tick(self, step: int) -> None:
        """Called after each step; moves the bar ten times a second at most."""
        now = time.perf_counter()
        if self._progress is not None and now - self._drawn > _REDRAW_SECONDS:
            self._progress.update(self._progress.task_ids[0], completed=step)
            self._drawn = now

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self._terminal.print(text, markup=False)
        self._keep(text)

    def training(self, step: int, scalars: dict[str, float], seconds_left: float) -> None:
        """A line of training metrics: the bar's text, or a line of its own."""
        text = (
            f"epoch {scalars['epoch']:.2f}  loss {scalars['loss']:.4f}  accuracy {scalars['accuracy']:.1%}  "
            f"{scalars['samples_per_second']:,.0f} images/s  {duration(seconds_left)} left"
        )
        line = f"step {step:,}/{self._total_steps:,}  {text}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, text=text)
            self._keep(line)
        else:
            self.say(line)

    def evaluated(self, split: str, step: int, scalars: dict[str, float]) -> None:
        several = f"  with several views {scalars['tta_accuracy']:.2%}" if "tta_accuracy" in scalars else ""
        self.say(f"{split} at step {step:,}: loss {scalars['loss']:.4f}  accuracy {scalars['accuracy']:.2%}{several}")

    def finished(self, summary: dict[str, Any], folder: Path) -> None:
        """The per-class table of the test set, the result in one line, and where the files are."""
        self.close()
        test = summary["test"]
        table = by_class(test["classes"], "test set, by class")
        self._terminal.print(table)
        plain = io.StringIO()
        Terminal(file=plain, width=_LOG_WIDTH).print(table)
        self._keep(plain.getvalue().rstrip())
        train, processes = summary["train"], summary["world_size"]
        self.say(
            f"test accuracy {test['accuracy']:.2%} of {test['num_samples']:,} images after {summary['steps']:,} steps "
            f"({summary['epochs']:g} epochs) in {duration(summary['seconds'])} on {processes} "
            f"process{'es' if processes > 1 else ''}, {train['samples_per_second']:,.0f} images/s in training"
        )
        self.say(f"all files: {folder}  weights: {folder / 'model.safetensors'}")
        self.say(f"next: samecurve predict {shlex.quote(str(folder))} IMAGE...")

    def close(self) -> None:
        """Takes the bar down."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def by_class(classes: list[dict[str, Any]], title: str) -> Table:
    """classes: as summary.json has them."""
    table = Table("class", *(["precision", "recall", "f1", "images"]), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in classes:
        shares = (f"{row[name]:.1%}" for name in ("precision", "recall", "f1"))
        table.add_row(row["name"], *shares, f"{row['support']:,}")
    return table
