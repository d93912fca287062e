"""A refused or continued start says what differs, never advises to remove a run, and leaves nothing behind."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import forked
from support.processes import SMALL, Ranks
from support.runs import read_status

from trainer.run import exit

RUN = [*SMALL, "run.root=runs", "log.report=false", "train.threads_per_rank=1", "train.max_steps=4"]


def run_rank_with_own_settings(env: dict[str, str], log: str, argv: list[str], of_rank_1: list[str]) -> None:
    """Runs the trainer; rank 1 gets further settings, as on a node with other folders or another command."""
    exit._REPORTER_SECONDS = 1.0
    forked.run_rank(env, log, [*argv, *(of_rank_1 if env.get("RANK") == "1" else [])], "tiny")


def refusal(ranks: Ranks, size: int, *settings: str) -> str:
    """Starts ranks, expects exit code 2, and returns the line."""
    (line,) = [line for line in ranks.run(size, *RUN, *settings, code=2).splitlines() if line.startswith("samecurve: ")]
    assert "remove" not in line and "delete" not in line
    return line


def refusal_with_own_settings(ranks: Ranks, of_rank_1: list[str], *settings: str) -> str:
    started = ranks.call(2, run_rank_with_own_settings, [*RUN, *settings], of_rank_1)
    codes, output = ranks.join(started), ranks.log.read_text()
    assert codes == [2, 2], output
    (line,) = {line for line in output.splitlines() if line.startswith("samecurve: ")}  # the same on both ranks
    return line


@pytest.fixture
def finished(ranks: Ranks) -> Path:
    """The folder of a run that has finished four steps."""
    ranks.run(1, *RUN, "run.name=first")
    return Path("runs/first")


def test_run_folder_as_resume_starts_from_its_newest_valid_checkpoint(ranks: Ranks, finished: Path) -> None:
    (finished / "checkpoints" / "step-00000009").mkdir()
    longer = ["train.max_steps=6", "train.virtual_ranks=null"]
    output = ranks.run(1, *RUN, "run.name=second", f"run.resume={finished}", *longer)
    assert "skipped the damaged checkpoint" in output and read_status("second")["step"] == 6
    assert json.loads(Path("runs/second/starts.jsonl").read_text().splitlines()[0])["step"] == 4
    # 4 steps of a cosine of 4, then of one of 6.
    assert "the run now ends at step 6 instead of 4" in output and "the learning rate jumps from" in output
    assert "the run now ends at step 6" in Path("runs/second/logs/rank-0.log").read_text()


def test_folder_without_checkpoints_as_resume_is_refused(ranks: Ranks, finished: Path) -> None:
    shutil.rmtree(finished / "checkpoints")
    for path, reason in ((finished, "no checkpoint in it"), (Path("nowhere"), "no such folder")):
        line = refusal(ranks, 1, "run.name=second", f"run.resume={path}")
        assert f"run.resume={path}: {reason}; expected a run folder with a checkpoint" in line
    assert "always continues from its newest" in refusal(ranks, 1, "run.name=first", f"run.resume={finished}")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["first"]


def test_renamed_run_folder_goes_on(ranks: Ranks, finished: Path) -> None:
    finished.rename("runs/other")
    output = ranks.run(1, *RUN, "run.name=other", "train.max_steps=6", "schedule.name=cosine")
    assert "resuming other" in output and read_status("other")["step"] == 6
    assert json.loads(Path("runs/other/starts.jsonl").read_text().splitlines()[1])["step"] == 4


def test_setting_that_differs_on_a_rank_is_named_with_both_values(ranks: Ranks) -> None:
    line = refusal_with_own_settings(ranks, ["optim.lr=0.3", "run.seed=4", "log.project=b"], "run.name=x")
    assert "rank 1 differs from rank 0 in its settings" in line
    assert "run.seed is 0 on rank 0 and 4 on rank 1; optim.lr is 0.05 on rank 0 and 0.3 on rank 1" in line
    assert not Path("runs").exists()


def test_checkpoint_that_a_node_does_not_see_is_refused_with_its_name(ranks: Ranks) -> None:
    """run.root may differ between ranks: rank 1 then sees no run folder, as on a node with a disk of its own."""
    started = ranks.call(2, run_rank_with_own_settings, [*RUN, "run.name=x"], ["run.root=elsewhere"])
    assert ranks.join(started) == [0, 0]
    host = os.uname().nodename
    assert f"warning: runs/x does not exist on {host}; to continue" in ranks.log.read_text()
    longer = ["run.name=x", "train.max_steps=6"]
    line = refusal_with_own_settings(ranks, ["run.root=elsewhere"], *longer)
    assert f"checkpoint runs/x/checkpoints/step-00000004 exists on {host}, but not on {host}; set run.root to" in line

    Path("runs").rename("elsewhere")  # rank 0 is now on the other node
    line = refusal_with_own_settings(ranks, ["run.root=elsewhere"], *longer)
    assert not Path("runs").exists()
    assert f"run x has checkpoints on {host}, but none on {host}, where rank 0 runs; set run.root to a folder" in line


def test_refusal_leaves_nothing_behind(ranks: Ranks) -> None:
    refusal(ranks, 1, "run.root=new/runs", "run.name=sweep/x", "model.name=tudui", "data.image_size=64")
    refusal_with_own_settings(ranks, ["optim.lr=0.3"], "run.root=new/runs", "run.name=sweep/x")
    assert not Path("new").exists() and not Path("runs").exists()
    Path("runs/kept").mkdir(parents=True)
    refusal(ranks, 1, "run.name=kept/x", "model.freeze=[conv9]")
    assert list(Path("runs").rglob("*")) == [Path("runs/kept")]


def test_refused_start_changes_nothing_in_a_run(ranks: Ranks, finished: Path) -> None:
    def files() -> dict[str, Any]:
        return {str(path): path.stat().st_mtime_ns for path in Path("runs").rglob("*")}

    before = files()
    assert "optim.lr was 0.05, now 0.3" in refusal(ranks, 1, "run.name=first", "optim.lr=0.3")
    assert "run.resume=never" in refusal(ranks, 1, "run.name=first", "run.resume=never")
    assert "lies inside the run" in refusal(ranks, 1, "run.name=first/second")
    assert files() == before
