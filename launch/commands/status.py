"""`samecurve status [RUN]`: run folders in, a table of all runs out, or what is known of one and what to do next."""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from launch.commands.arguments import add_run
from launch.runs import records, table
from launch.runs.run import NoRunError, Run, find_run, read_runs
from trainer.errors import UserError

_LAST_LINES = 5
_TITLES = ("run", "state", "step", "epoch", "test", "images/s", "left", "job", "restarts", "ranks")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, "its name under --root, or its path; default: all runs", optional=True)
    parser.add_argument("--json", action="store_true", help="for programs: a list of objects, or one object for RUN")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    root, name = arguments.root, arguments.run
    if name is None:
        if not root.is_dir():
            raise UserError(f"there is no folder {root} here; --root FOLDER looks elsewhere")
        return _show_all(records.find(root), root, arguments.json)
    try:
        path = find_run(name, root)
    except NoRunError:
        group = records.find(root / name)  # a sweep's folder
        if not group:
            raise
        return _show_all(group, root, arguments.json)
    return _show_one(path, root, arguments.json)


def _show_all(paths: list[Path], root: Path, as_json: bool) -> int:
    found, queue = read_runs(paths, root)
    tell_trouble(queue.trouble)
    if as_json:
        print(json.dumps([_plain(run) for run in found], indent=1))
    elif found:
        for line in table.lines(_TITLES, [_row(run) for run in found], table.width(), keep=_TITLES[:3]):
            print(line)
    else:
        print(f"no runs under {root}")
    return 0


def _show_one(path: Path, root: Path, as_json: bool) -> int:
    (run,), queue = read_runs([path], root)
    tell_trouble(queue.trouble)
    if as_json:
        print(json.dumps(_plain(run), indent=1))
        return 0
    print(run)
    facts = _facts(run)
    at = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"  {name:{at}}  {text}")
    for title, lines in (("last lines", _last_lines(run)), ("next", _next(run))):
        if lines:
            print(f"{title}")
            print("\n".join(f"  {line}" for line in lines))
    return 0


def tell_trouble(trouble: str) -> None:
    if trouble:
        print(f"samecurve: {trouble}; states are as the run folders have them", file=sys.stderr)


def _plain(run: Run) -> dict[str, Any]:
    return dataclasses.asdict(run) | {"path": str(run.path), "is_over": run.is_over}


def _row(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        run.state,
        _steps(run),
        _number(run.epoch, "{:.2f}"),
        _number(run.accuracy, "{:.2%}"),
        _number(run.samples_per_second, "{:,.0f}"),
        duration(run.seconds_left),
        run.job or "",
        str(run.restarts or ""),
        _number(run.world_size, "{}"),
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    ranks = "" if run.world_size is None else f"{run.world_size} on {run.host}"
    facts = [
        ("step", _steps(run) + (f", epoch {run.epoch:.2f}" if run.epoch is not None else "")),
        ("test accuracy", _number(run.accuracy, "{:.2%}")),
        ("images/s", _number(run.samples_per_second, "{:,.0f}")),
        ("time left", duration(run.seconds_left)),
        ("ranks", f"{ranks} and others" if ranks and _num_hosts(run) > 1 else ranks),
        ("restarts", str(run.restarts) if run.step is not None else ""),
        ("job", run.job or ""),
        ("job's output", run.log),
        ("last change", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.changed)) if run.changed else ""),
        ("folder", str(run.path)),
        ("hang report", str(run.path / "hang-report.txt") if run.has_hang_report else ""),
    ]
    return [(name, text) for name, text in facts if text]


def _last_lines(run: Run) -> list[str]:
    path = run.path / "logs" / "rank-0.log"
    if not path.is_file():
        path = Path(run.log or run.path / "none")
    return records.last_lines(path, _LAST_LINES) if path.is_file() else []


def _next(run: Run) -> list[str]:
    """What a person may do with it now, as commands."""
    name = shlex.quote(run.name)
    if not run.is_over:
        return [f"samecurve logs {name} --follow", f"samecurve stop {name}"]
    if run.state == "finished":
        return [f"the weights are in {run.path / 'model.safetensors'}"]
    left_behind = run.path / "stop"
    hints = [f"remove {left_behind}: it would stop the next start at once"] if left_behind.exists() else []
    return hints + [f"go on: {line}" for line in _again(run)]


def _again(run: Run) -> list[str]:
    """The command that goes on. Of several ranks environment.json has each one's own; samecurve starts them all."""
    command = _environment(run).get("command", "")
    words = shlex.split(command)
    if not words or (run.world_size or 1) == 1:
        return [command] if command else []
    if _num_hosts(run) > 1 or run.job:
        return [f"samecurve submit, or what it was started with; each rank was: {command}"]
    return [f"samecurve train --ranks {run.world_size} {shlex.join(words[2:])}".rstrip()]


def _num_hosts(run: Run) -> int:
    return len(_environment(run).get("hosts", []))


def _environment(run: Run) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run.path / "environment.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):  # then there is no hint
        return {}


def _steps(run: Run) -> str:
    if run.step is None:
        return ""
    return f"{run.step:,}/{run.total_steps:,}" if run.total_steps is not None else f"{run.step:,}"


def _number(value: float | None, shape: str) -> str:
    return "" if value is None else shape.format(value)


def duration(seconds: float | None) -> str:
    """3:07:55, 7:55, or 55 s."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}" if minutes else f"{rest} s"
