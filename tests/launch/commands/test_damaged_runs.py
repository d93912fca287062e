"""Damaged run folders: every command names them in a line and shows the others, whatever is damaged how."""

import contextlib
import ctypes
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.html_page import HtmlPage
from support.processes import Samecurve

from launch.commands.dashboard import _logged_runs
from launch.commands.sweep_points import SweepPoint
from launch.runs.find import find_runs
from launch.runs.results import Result, print_table, write_results
from trainer.config.load import load_config
from trainer.errors import DashboardError, UserError
from trainer.report import figures
from trainer.report.examples import read_examples
from trainer.report.html import write_report
from trainer.run.record import RunRecord

JSON_FILES = ("status.json", "environment.json", "summary.json", "evaluation.json", "job.json")
LINE_FILES = ("metrics.jsonl", "starts.jsonl")
OTHER_FILES = ("config.yaml", "wandb/run-id", "examples.safetensors", "report.html")
WRONG_VALUES: list[Any] = ["x", None, [], {}, {"a": 1}, True, -5, 1e308, 10**400, "\x1b[31m\n", ["x"], [[1]]]
WRONG_TEXTS = ["NaN", "1e999", "[" * 100_000, "'", "<b>", "-Infinity", "null", "{}", "[]", "5"]

Damage = Callable[[Path, random.Random], None]


def truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def overwrite(path: Path, draw: random.Random) -> None:
    path.write_text(draw.choice(WRONG_TEXTS))


def garble(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(max(1, len(content) // 50)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    path.write_bytes(content)


def empty(path: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def make_folder(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.symlink_to(path)


def replace_value(content: Any, draw: random.Random) -> Any:
    """Returns the content with one value, at any depth, replaced or removed."""
    if not isinstance(content, dict | list) or not content or draw.random() < 0.1:
        return draw.choice(WRONG_VALUES)
    key = draw.choice(list(content) if isinstance(content, dict) else range(len(content)))
    if draw.random() < 0.2:
        del content[key]
    else:
        content[key] = replace_value(content[key], draw)
    return content


def change_json(path: Path, draw: random.Random) -> None:
    path.write_text(json.dumps(replace_value(json.loads(path.read_text()), draw)))


def change_lines(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    for index in draw.sample(range(len(lines)), k=max(1, len(lines) // 3)):
        is_foreign = draw.random() < 0.3
        changed = replace_value(json.loads(lines[index]), draw)
        lines[index] = draw.choice(["<<<<<<< HEAD", "[]", "\0\0\0"]) if is_foreign else json.dumps(changed)
    path.write_text("\n".join(lines) + "\n")


def change_settings(path: Path, draw: random.Random) -> None:
    lines = path.read_text().splitlines()
    for index in draw.sample(range(len(lines)), k=3):
        lines[index] = draw.choice(
            ["", "run: 3", "  name: [a, {b: c}]", "? [x]", "  lr: .nan", "model:", "\t", "&a [*a]"]
        )
    path.write_text("\n".join(lines) + "\n")


EVERY_FILE: list[Damage] = [truncate, overwrite, garble, empty, remove, make_folder, link_to_itself]
CASES = [(name, damage) for name in (*JSON_FILES, *LINE_FILES, *OTHER_FILES) for damage in EVERY_FILE]
CASES += [(name, change_json) for name in JSON_FILES for _ in range(12)]
CASES += [(name, change_lines) for name in LINE_FILES for _ in range(12)] + [("config.yaml", change_settings)] * 12


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    """A folder with two equal runs, `good` and `bad`, that were submitted to SLURM and logged to W&B."""
    root = tmp_path / "runs"
    for name in ("good", "bad"):
        folder = shutil.copytree(finished, root / name)
        settings = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(settings.replace("name: x", f"name: {name}"))
        (folder / "job.json").write_text('{"job_id": "7", "array_task": null, "log": "logs/7.out"}')
        (folder / "wandb").mkdir()
        (folder / "wandb" / "run-id").write_text("abcd1234")
    return root


KINDS = pytest.mark.parametrize(
    "damage", dict.fromkeys(damage for _, damage in CASES), ids=lambda damage: damage.__name__
)


@KINDS
def test_no_damage_hides_the_other_runs(damage: Damage, runs: Path, samecurve: Samecurve) -> None:
    names = [name for name, case in CASES if case is damage]
    check_damage(damage, random.Random(damage.__name__).sample(names, k=3), runs, samecurve)


@pytest.mark.slow
@KINDS
def test_no_damage_of_any_file_hides_the_other_runs(damage: Damage, runs: Path, samecurve: Samecurve) -> None:
    check_damage(damage, [name for name, case in CASES if case is damage], runs, samecurve)


def check_damage(damage: Damage, names: list[str], runs: Path, samecurve: Samecurve) -> None:
    draw = random.Random(damage.__name__)
    sound = shutil.copytree(runs / "bad", runs.parent / "sound", symlinks=True)
    for name in names:
        shutil.rmtree(runs / "bad")
        shutil.copytree(sound, runs / "bad", symlinks=True)
        damage(runs / "bad" / name, draw)
        check_status(runs, samecurve)
        check_reports(runs)
        check_sweep(runs)
        check_dashboard(runs)


def check_status(runs: Path, samecurve: Samecurve) -> None:
    out, err = samecurve("status", "--root", str(runs))
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert states["good"] == "finished" and "bad" in states
    assert states["bad"] != "unreadable" or f"{runs / 'bad'}" in err
    listed = {run["name"]: run for run in json.loads(samecurve("status", "--root", str(runs), "--json")[0])}
    assert listed["good"]["state"] == "finished" and listed["good"]["accuracy"] is not None
    assert samecurve("status", "bad", "--root", str(runs))[0].startswith("bad: ")


def check_reports(runs: Path) -> None:
    out = runs / "both.html"
    problems = write_report([runs / "good", runs / "bad"], out)
    text = HtmlPage(out.read_text(errors="replace")).text
    assert "good finished" in text and all(str(runs / "bad") in problem for problem in problems)
    try:
        write_report([runs / "bad"], out)
        figures._vector_figures(RunRecord(runs / "bad"))  # not rendered: that takes a second
        read_examples(runs / "bad")
    except UserError as error:
        assert str(runs / "bad") in str(error) and "\n" not in str(error)


def check_sweep(runs: Path) -> None:
    points = [
        SweepPoint(name, "all", (), load_config([], [f"run.root={runs}", f"run.name={name}"]))
        for name in ("good", "bad")
    ]
    assert not points[0].damage and (not points[1].damage or str(runs / "bad") in points[1].damage)
    results = [Result.from_run(point.group, point.config) for point in points]
    assert results[0].state == "finished" and results[0].validation_accuracy is not None
    assert results[1].state != "unreadable" or str(runs / "bad") in results[1].reason
    write_results(runs, results)
    print_table("all", results)


def check_dashboard(runs: Path) -> None:
    names = [run.path.name for run in _logged_runs(find_runs(runs), runs, are_named=False)]
    assert "good" in names
    try:
        _logged_runs([runs / "bad"], runs, are_named=True)
    except DashboardError as error:
        assert "\n" not in str(error)


@contextlib.contextmanager
def permissions_apply() -> Iterator[None]:
    """Takes the capabilities by which root may read and write all files from this thread, for a while."""
    if os.getuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    effective = before[0] & ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, (ctypes.c_uint32 * 6)(effective, *before[1:])) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.skipif(sys.platform != "linux", reason="root reads all files")
def test_files_that_this_user_may_not_read_are_named(runs: Path, samecurve: Samecurve) -> None:
    for folder in (runs / "closed", runs / "half", runs / "locked"):
        shutil.copytree(runs / "good", folder)
    modes = {"half/status.json": 0, "closed": 0, "locked": 0o644, ".": 0o555}  # files of `locked` can only be listed
    for name, mode in modes.items():
        (runs / name).chmod(mode)
    try:
        with permissions_apply():
            out, err = samecurve("status", "--root", str(runs))
            report_err = samecurve("report", str(runs), code=2)[1]
            one = samecurve("status", "closed", "--root", str(runs), code=2)[1]
    finally:
        for name in modes:
            (runs / name).chmod(0o755)  # pytest removes them
    states = {line.split()[0]: line.split()[1] for line in out.splitlines()[1:]}
    assert states == {"good": "finished", "bad": "finished", "half": "unreadable", "locked": "unreadable"}
    assert f"{runs / 'closed'} is skipped, because it cannot be read (Permission denied)" in err
    assert f"{runs / 'half' / 'status.json'} cannot be read as a file of a run (Permission denied)" in err
    assert f"{runs / 'locked'}" in err and "Traceback" not in err, err
    assert f"{runs / 'report.html'} cannot be written (Permission denied)" in report_err
    assert "Traceback" not in report_err + one
