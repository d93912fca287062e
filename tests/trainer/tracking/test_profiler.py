"""Tests the profiler: which steps are in a trace, the table of operations, and disks that fail."""

import gzip
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from support.processes import SMALL, Ranks

from launch.verify.compare import compare_runs
from trainer.config.load import load_config
from trainer.data.sampler import BatchSampler
from trainer.errors import ConfigError
from trainer.tracking import profiler

RUN = [*SMALL, "train.threads_per_rank=1", "log.every_steps=3", "train.max_steps=8"]


def traced_steps(run: str, rank: int = 0) -> list[int]:
    """Returns the steps in a rank's trace. Asserts that each has one data wait and one pass through the network."""
    with gzip.open(Path("runs") / run / "profile" / f"rank-{rank}.json.gz", "rt") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = [int(event["name"][5:]) for event in events if re.fullmatch(r"step \d+", event["name"])]
    assert steps == sorted(set(steps))
    for name in ("waiting for data", "aten::addmm"):
        assert len([event for event in events if event["name"] == name]) == len(steps), name
    return steps


@pytest.mark.parametrize(
    ("text", "steps"), [("steps 10-20", (10, 20)), ("10-20", (10, 20)), ("step 7-7", (7, 7)), (" steps 3 - 4 ", (3, 4))]
)
def test_step_range_is_parsed(text: str, steps: tuple[int, int]) -> None:
    assert load_config([], [f"train.profile={text}"]).train.profile_steps == steps


@pytest.mark.parametrize("text", ["", "10", "steps 20-10", "0-3", "steps -1-3", "epochs 1-2", "10-20 steps", "1-2-3"])
def test_invalid_step_range_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.profile=.*counted from 1, such as 'steps 10-20'[^\n]*$"):
        load_config([], [f"train.profile={text}"])


def test_profile_has_the_requested_steps_and_changes_no_result(ranks: Ranks) -> None:
    virtual = [*RUN, "train.virtual_ranks=2"]
    ranks.run(1, *virtual, "run.name=plain")
    output = ranks.run(2, *virtual, "run.name=profiled", "train.profile=steps 3-5")
    assert not compare_runs(Path("runs/plain"), Path("runs/profiled"))
    assert traced_steps("profiled") == traced_steps("profiled", rank=1) == [3, 4, 5]
    assert not Path("runs/plain/profile").exists()
    for text in (output, Path("runs/profiled/logs/rank-0.log").read_text()):
        _, _, table = text.partition("steps 3-5 on rank 0, by the CPU time of each operation")
        names = re.findall(r"│ (\S.*?) +│ +[\d.]+% │ +[\d.]+ │ +[\d.]+ │", table)
        complete_names = [name for name in names if not name.endswith(":")]  # the others continue in the next line
        assert len(names) == 10 and len(set(complete_names)) == len(complete_names) and "step" not in names
        assert "aten::convolution_backward" in names
        shares = [float(share) for share in re.findall(r"([\d.]+)% │ +[\d.]+ │ +[\d.]+ │", table)]
        assert shares == sorted(shares, reverse=True) and 50 < sum(shares) <= 100
    assert "ms/step" not in Path("runs/profiled/logs/rank-1.log").read_text()


def test_stopped_run_writes_its_trace_and_the_resumed_run_profiles_the_rest(ranks: Ranks) -> None:
    ranks.run(1, *RUN, "run.name=uninterrupted", "train.profile=7-99")
    assert traced_steps("uninterrupted") == [7, 8], "up to the last step of the run"
    Path("runs/x").mkdir()
    Path("runs/x/stop").touch()  # stops the run after its first step
    assert "steps 1-1 on rank 0" in ranks.run(1, *RUN, "run.name=x", "train.profile=1-3", code=75)
    assert traced_steps("x") == [1]
    Path("runs/x/stop").touch()
    output = ranks.run(1, *RUN, "run.name=x", "train.profile=1-3", code=75)
    assert traced_steps("x") == [2] and "steps 2-2 on rank 0" in output
    output = ranks.run(1, *RUN, "run.name=x", "train.profile=1-2")  # both steps are over
    assert "profile" not in output and "ms/step" not in output and traced_steps("x") == [2]
    assert not compare_runs(Path("runs/uninterrupted"), Path("runs/x"))


def test_failed_run_writes_its_trace(ranks: Ranks) -> None:
    sampler = BatchSampler(1433, 64, seed=0)
    bad_step = next(step for step in range(23) if 7 in sampler.sample_ids(step)) + 1
    settings = ["train.max_steps=23", "train.max_bad_steps=0", "run.name=x"]
    settings += [f"train.profile={bad_step - 2}-{bad_step + 5}"]
    ranks.run(1, *RUN, *settings, fault="nan_image", code=2)
    assert traced_steps("x") == [bad_step - 2, bad_step - 1, bad_step]


def test_unwritable_trace_is_one_warning_on_each_rank(ranks: Ranks) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/profile").touch()
    output = ranks.run(2, *RUN, "run.name=x", "train.profile=2-4")
    logs = [Path(f"runs/x/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    for text in (output, *logs):
        assert text.count("json.gz cannot be written (File exists); training continues without the trace") == 1
    assert "steps 2-4 on rank 0" in output


def test_step_range_after_the_end_of_the_run_is_a_note(ranks: Ranks) -> None:
    output = ranks.run(1, *RUN, "run.name=y", "train.profile=9-10")
    assert "the run has only 8 steps, so there is no profile" in output


@pytest.mark.parametrize(("max_bytes", "operations"), [(4000, 1), (20_000, 200)], ids=["truncated", "absent"])
def test_incomplete_trace_of_torch_profiler_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int, operations: int
) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    with torch.autograd.profiler.profile(use_kineto=True) as recording:
        for _ in range(operations):
            torch.ones(2).add(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    try:
        with pytest.raises(OSError, match=r"torch\.profiler could not write"):
            profiler._write_compressed_trace(recording, tmp_path / "x.json.gz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
