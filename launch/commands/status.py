"""`samecurve status [RUN]`: prints a table of all runs, or the facts about one run and the commands to use next.

Names unreadable files on stderr and shows the other runs.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from launch.commands.arguments import add_run_argument, print_note
from launch.runs import table, tail
from launch.runs.find import expand_user, find_runs, find_runs_of, is_run_folder
from launch.runs.run import Run, read_runs
from trainer.errors import FolderError, UserError
from trainer.run.record import RunRecord, is_file
from trainer.text.escape import escape

_NUM_LOG_LINES = 5
_TITLES = ("run", "state", "step", "epoch", "validation", "test", "images/s", "left", "job", "restarts", "ranks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    text = "name of a run or of a folder of runs, such as a sweep, under --root, or its path; default: all runs"
    add_run_argument(parser, text, optional=True)
    parser.add_argument("--json", action="store_true", help="print JSON: a list of runs, or one object for RUN")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    root, name = arguments.root, arguments.run
    if name is None:
        if not os.path.isdir(root):  # noqa: PTH112  Path.is_dir() raises for a name that is too long
            raise UserError(f"folder {root} does not exist; --root FOLDER selects the folder of the runs")
        return _show_all(find_runs(root, print_note), root, arguments.json)
    paths = find_runs_of([name], root, print_note)
    if len(paths) == 1 and any(map(is_run_folder, (root / name, expand_user(name)))):
        return _show_one(paths[0], root, arguments.json)
    return _show_all(paths, root, arguments.json)


def _show_all(paths: list[Path], root: Path, as_json: bool) -> int:
    runs, queue = read_runs(paths, root)
    print_queue_problem(queue.problem)
    for problem in [problem for run in runs for problem in _problems(run)]:
        print_note(problem)
    if as_json:
        print(json.dumps([_as_dict(run) for run in runs], indent=1))
    elif runs:
        rows = [_row(run) for run in runs]
        print("\n".join(table.format_table(_TITLES, rows, table.terminal_width(), keep=_TITLES[:3])))
    else:
        print(f"no runs under {escape(root)}")
    return 0


def _show_one(path: Path, root: Path, as_json: bool) -> int:
    (run,), queue = read_runs([path], root)
    print_queue_problem(queue.problem)
    for problem in run.problems:
        print_note(problem)
    if as_json:
        print(json.dumps(_as_dict(run), indent=1))
        return 0
    print(run)
    environment = _environment(run)
    facts = _facts(run, environment)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"  {name:{width}}  {escape(value)}")
    for title, lines in (("last lines", _last_log_lines(run)), ("next", _next_commands(run, environment))):
        if lines:
            print(title)
            for line in lines:
                print("  " + escape(line, keep="\t"))
    return 0


def _problems(run: Run) -> list[str]:
    """Returns what cannot be read of a run."""
    return [run.reason] if run.state == "unreadable" else list(run.problems)


def print_queue_problem(problem: str) -> None:
    """Prints why SLURM did not answer, if it did not."""
    if problem:
        print(f"samecurve: {problem}; the states come from the run folders alone", file=sys.stderr)


def _as_dict(run: Run) -> dict[str, Any]:
    return dataclasses.asdict(run) | {"path": str(run.path), "is_over": run.is_over}


def _row(run: Run) -> tuple[str, ...]:
    """Returns the cells of a run, in the order of _TITLES."""
    return (
        run.name,
        run.state,
        _format_steps(run),
        _format_number(run.epoch, "{:.2f}"),
        _format_number(run.validation_accuracy, "{:.2%}"),
        _format_number(run.accuracy, "{:.2%}"),
        _format_number(run.samples_per_second, "{:,.0f}"),
        format_seconds(run.seconds_left),
        run.job or "",
        str(run.restarts or ""),
        _format_number(run.world_size, "{}"),
    )


def _facts(run: Run, environment: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns names and values, without the unknown ones."""
    ranks = "" if run.world_size is None else f"{run.world_size} on {run.host}"
    facts = [
        ("step", _format_steps(run) + (f", epoch {run.epoch:.2f}" if run.epoch is not None else "")),
        ("validation accuracy", _format_number(run.validation_accuracy, "{:.2%}")),
        ("test accuracy", _format_number(run.accuracy, "{:.2%}")),
        ("best so far", _best_so_far(run)),
        ("images/s", _format_number(run.samples_per_second, "{:,.0f}")),
        ("time left", format_seconds(run.seconds_left)),
        ("ranks", f"{ranks} and others" if ranks and _num_hosts(environment) > 1 else ranks),
        ("restarts", str(run.restarts) if run.step is not None else ""),
        ("job", run.job or ""),
        ("job's output", run.log),
        ("last change", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.changed)) if run.changed else ""),
        ("folder", str(run.path)),
        ("hang report", str(run.path / "hang-report.txt") if run.has_hang_report else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _best_so_far(run: Run) -> str:
    """Returns the highest accuracy of the evaluations, which a stopped run has no summary.json for."""
    try:
        best = RunRecord(run.path).best
    except FolderError:
        return ""
    return "" if best is None else f"{best.accuracy:.2%} {best.split} accuracy at step {best.step:,}"


def _last_log_lines(run: Run) -> list[str]:
    """Returns the last lines of rank 0's log, or of the SLURM job's output if there is no log yet."""
    path = run.path / "logs" / "rank-0.log"
    if not is_file(path):
        path = Path(run.log or run.path / "none")
    if not is_file(path):
        return []
    try:
        return tail.last_lines(path, _NUM_LOG_LINES)
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror})"]


def _next_commands(run: Run, environment: dict[str, Any]) -> list[str]:
    """Returns hints on what the user can do with the run now."""
    name = shlex.quote(run.name)
    if not run.is_over:
        return [f"samecurve logs {name} --follow", f"samecurve stop {name}"]
    if run.state == "finished":
        return [f"the weights are in {run.path / 'model.safetensors'}"]
    stop_file = run.path / "stop"
    hints = [f"remove {stop_file}, which would stop the next session at once"] if stop_file.exists() else []
    command = _resume_command(run, environment)
    return [*hints, f"continue: {command}"] if command else hints


def _resume_command(run: Run, environment: dict[str, Any]) -> str:
    """Returns the command that continues the run; empty if unknown. environment.json has the command of one rank."""
    command = environment.get("command") or ""
    try:
        words = shlex.split(command)
    except ValueError:  # environment.json was edited: a quote is missing
        return ""
    if not words or (run.world_size or 1) == 1:
        return command
    if _num_hosts(environment) > 1 or run.job:
        return f"samecurve submit, or the launcher that started it; the command of each rank was: {command}"
    return f"samecurve train --ranks {run.world_size} {shlex.join(words[2:])}".rstrip()


def _num_hosts(environment: dict[str, Any]) -> int:
    return len(environment.get("hosts") or [])


def _environment(run: Run) -> dict[str, Any]:
    """Returns environment.json; empty if it cannot be read, because it only serves hints."""
    try:
        return RunRecord(run.path).environment
    except FolderError:
        return {}


def _format_steps(run: Run) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,}/{run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}"


def _format_number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def format_seconds(seconds: float | None) -> str:
    """Returns "3:07:55", "7:55" or "55 s"; empty for None."""
    if seconds is None:
        return ""
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{whole_seconds:02}"
    return f"{minutes}:{whole_seconds:02}" if minutes else f"{whole_seconds} s"
