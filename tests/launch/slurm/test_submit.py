"""Checks of samecurve submit before sbatch, and its records, with fakes of SLURM's commands."""

import argparse
import json
import os
from pathlib import Path

import pytest
from support.processes import REPOSITORY, Samecurve

from launch.hardware import Machine
from launch.slurm import submit


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an sbatch that records its arguments and a squeue with job 7 into PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    commands = {
        "sbatch": f'printf "%s\\n" "$SAMECURVE_SCRIPTS" "$@" > {tmp_path}/sbatch; echo "7;cluster"',
        "squeue": 'echo "7|7|N/A|PENDING|Resources"',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "sbatch"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes=0"], "--nodes 0: expected 1 or more"),
        (["--gpus-per-node=-1"], "--gpus-per-node -1: expected 0 or more"),
        (["--array=0-x"], "expected seeds such as 0-4"),
        (["--array=0-4", "run.seed=1"], "leave out one of the two"),
        (["train.device=cuda"], "train.device=cuda, but the job requests no GPU; add --gpus-per-node"),
        (["--ntasks-per-node=99"], "99 ranks"),
        (
            ["--sbatch=--chdir=/tmp"],
            "--sbatch=--chdir=/tmp: samecurve cannot pass this on; call samecurve from the folder",
        ),
    ],
)
def test_submit_refuses_invalid_request_before_sbatch(
    samecurve: Samecurve, fake_slurm: Path, arguments: list[str], message: str
) -> None:
    _, error = samecurve("submit", "--config", "digits", *arguments, code=2)
    assert message in error and error.count("\n") == 1 and not fake_slurm.exists()


def test_submit_records_the_job_and_refuses_a_second_one(samecurve: Samecurve, fake_slurm: Path) -> None:
    out, _ = samecurve("submit", "--config", "digits", "--cpus-per-task=2")
    script = str(REPOSITORY / "slurm" / "train.sh")
    log = f"{REPOSITORY}/slurm/logs/7.log"
    assert fake_slurm.read_text().splitlines()[0] == str(REPOSITORY / "slurm")
    assert script in fake_slurm.read_text().splitlines() and "job 7: digits on" in out and log in out
    record = json.loads(Path("runs/digits/job.json").read_text())
    assert record == {"job_id": "7", "array_task": None, "log": log, "attempts": 0, "without_progress": 0, "step": 0}
    _, error = samecurve("submit", "--config", "digits", code=2)
    assert "job 7 for this run is already in the queue; wait for it, or choose another run.name" in error
    fake_slurm.unlink()
    (fake_slurm.parent / "bin" / "squeue").write_text(
        "#!/bin/sh\necho Unable to contact slurm controller >&2; exit 1\n"
    )
    _, error = samecurve("submit", "--config", "digits", code=2)
    assert "job 7 for this run may still be in the queue, which cannot be read (squeue: Unable to contact" in error
    assert error.count("\n") == 1 and not fake_slurm.exists()


def test_submit_array_records_every_task(samecurve: Samecurve, fake_slurm: Path) -> None:
    out, _ = samecurve("submit", "--config", "digits", "--array=3,5", "run.root=my runs")
    assert "run folder  my runs/digits-seed-3 and 1 more" in out
    assert "samecurve status 'my runs/digits-seed-3'" in out and f"{REPOSITORY}/slurm/logs/7_*.log" in out
    record = json.loads(Path("my runs/digits-seed-5/job.json").read_text())
    assert record["array_task"] == 5 and record["log"] == f"{REPOSITORY}/slurm/logs/7_5.log"


def test_percent_sign_in_the_log_path_is_escaped_for_sbatch() -> None:
    parser = argparse.ArgumentParser()
    submit.add_arguments(parser)
    arguments = parser.parse_args([])
    machine = Machine(4, 0, "python", Path("/100%"))
    assert "--output=/100%%/slurm/logs/%j.log" in submit.sbatch_arguments(arguments, machine, "x")
    assert "--output=/100%%/slurm/logs/%A_%a.log" in submit.sbatch_arguments(arguments, machine, "x", "0-4")
