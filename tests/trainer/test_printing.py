"""A run goes on when nothing can be printed, and its log has the lines. Odd names pass through a real run."""

import csv
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from support import forked
from support.html_page import HtmlPage
from support.images import write_image
from support.processes import MAIN, REPOSITORY, SMALL, CommandResult, Ranks, Samecurve
from support.runs import read_status

from trainer import main
from trainer.config.schema import DataSettings
from trainer.data import image_folder
from trainer.errors import DataError
from trainer.text.escape import is_visible
from trainer.text.streams import protect_streams

RUN = [*SMALL, "run.root=runs", "run.name=x", "log.report=false", "train.threads_per_rank=1", "train.max_steps=4"]
RUN += ["log.every_steps=1"]


def run_rank_without_streams(env: dict[str, str], log: str, argv: list[str], kind: str, worker_warns: bool) -> None:
    """Runs the trainer with stdout and stderr closed, on a full disk, or on a pipe without a reader."""
    forked.become_rank(env, log)
    read_end, write_end = os.pipe()
    os.close(read_end)
    for descriptor in (1, 2):
        if kind == "closed":
            os.close(descriptor)
        else:
            os.dup2(os.open("/dev/full", os.O_WRONLY) if kind == "/dev/full" else write_end, descriptor)
    if kind == "closed":
        sys.stdout = sys.stderr = None  # type: ignore[assignment]
    protect_streams()
    forked.tiny_network()
    if worker_warns:
        forked.call_before_images(lambda call: warnings.warn(f"a library's warning {call}", stacklevel=1))
    code = main.main(argv)
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.parametrize("kind", ["closed", "/dev/full", "closed pipe"])
def test_run_goes_on_without_streams_and_logs_its_lines(ranks: Ranks, kind: str) -> None:
    started = ranks.call(2, run_rank_without_streams, [*RUN, "data.workers=1"], kind, True)
    assert ranks.join(started) == [0, 0] and read_status("x")["state"] == "finished"
    for rank in (0, 1):
        log = Path(f"runs/x/logs/rank-{rank}.log").read_text()
        assert "a library's warning 1" in log and log.splitlines()[-1].endswith(f"rank {rank} ends")
    assert "step 4/4" in Path("runs/x/logs/rank-0.log").read_text()


@pytest.mark.parametrize("kind", ["closed", "/dev/full", "closed pipe"])
def test_refused_start_without_streams_has_its_exit_code(ranks: Ranks, kind: str) -> None:
    started = ranks.call(1, run_rank_without_streams, [*RUN, "model.freeze=[conv9]"], kind, False)
    assert ranks.join(started) == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "env"),
    [
        ("| head -n 1", {}), (">/dev/full 2>&1", {}), (">&- 2>&- <&-", {}),
        ("| cat", {"PYTHONIOENCODING": "ascii:strict", "COLUMNS": "0", "TERM": "dumb"}),
    ],
)  # fmt: skip
def test_command_trains_to_the_end_whatever_becomes_of_its_output(
    launch: Callable[..., CommandResult], redirection: str, env: dict[str, str]
) -> None:
    command = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "train", *RUN, "--ranks", "2", "log.notes=猫"]
    done = launch(["bash", "-c", f"{' '.join(command)} {redirection}; exit ${{PIPESTATUS[0]}}"], **env)
    assert done.code == 0 and "Traceback" not in done.err and read_status("x")["state"] == "finished"
    assert "step 4/4" in Path("runs/x/logs/rank-0.log").read_text()


@pytest.mark.slow
def test_single_process_with_a_closed_stderr_logs_what_was_lost(launch: Callable[..., CommandResult]) -> None:
    script = f"import warnings, runpy, sys; sys.argv = {[MAIN, *RUN]!r}\n"
    script += "import trainer.session; warnings.warn('before the run')\n"
    script += f"runpy.run_path({MAIN!r}, run_name='__main__')"
    done = launch(["bash", "-c", f'{sys.executable} -c "$0" 2>&-', script], PYTHONPATH=str(REPOSITORY))
    assert done.code == 0 and "step 4/4" in done.out


NAMES = [
    "[cat]", "[bold]", "[bold red]", "[link=x.example]", ":smile:", "猫", "é", "=1+1", "@SUM(A1)", "-1", "+1", "a;=1",
    "<script>alert(1)", "$x$", "%s{0}", "a b", "'\"", "\\x1b[31m", "\u3164", "a\ufe0f",
]  # fmt: skip


@pytest.mark.slow
def test_twenty_odd_class_names_pass_through_a_run_and_all_commands(ranks: Ranks, samecurve: Samecurve) -> None:
    for split, count in (("train", 4), ("test", 1)):
        for label, name in enumerate(NAMES):
            for index in range(count):
                write_image(Path("images") / split / name / f"={index}\x1b\u202e.png", seed=100 * label + index)
    settings = [
        "data.name=image_folder",
        "data.root=images",
        "log.report=true",
        "log.figures=true",
        "log.tensorboard=true",
    ]
    output = ranks.run(1, *RUN, *settings, "run.name=[a] 猫", fault="")
    assert all(character == "\n" or is_visible(character) for character in output)
    folder = Path("runs/[a] 猫")
    assert "[cat]" in output and ":smile:" in output and "\\u3164" in output
    report = (folder / "report.html").read_text()
    assert "<script>alert" not in report and "\x1b" not in report and "\u202e" not in report
    assert "[cat]" in HtmlPage(report).text
    classes = json.loads((folder / "summary.json").read_text())["test"]["classes"]
    assert {row["name"] for row in classes} == set(NAMES)
    for words in (["status"], ["status", folder.name], ["logs", folder.name], ["report", folder.name]):
        out, err = samecurve(*words)
        assert all(character in "\n\t" or is_visible(character) for character in out + err)
    out, _ = samecurve("predict", folder.name, "images/test", "--csv", "--device", "cpu")
    rows = list(csv.reader(out.splitlines()))
    assert len(rows) == 1 + 3 * len(NAMES) and not any(
        cell.lstrip()[:1] in tuple("=+-@") for row in rows for cell in row
    )


@pytest.mark.parametrize("name", ["\x1b[31mred", "\x1b]0;t\a", "a\nb", "\u202egpj", "\u200b", "\udcff"])
def test_class_name_that_acts_on_a_terminal_is_refused_with_one_line(name: str) -> None:
    write_image(Path("images") / "train" / name / "a.png", seed=1)
    with pytest.raises(DataError) as caught:
        image_folder.count_per_class(DataSettings(name="image_folder", root="images"))
    text = str(caught.value)
    assert text.isprintable() and "rename it" in text
