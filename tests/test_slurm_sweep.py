"""samecurve submit and sweep on a real cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, started
from conftest import REPOSITORY
from test_slurm_train import QUICK

pytestmark = pytest.mark.slurm

SAMECURVE = (sys.executable, str(REPOSITORY / "launch" / "main.py"))
RUN = ("--config", "digits", *QUICK, "train.max_steps=20")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(2, "--gpus", "0") as made:
        yield made


def log_of(folder: Path) -> Path:
    """Where a job's output is, as its run folder says; in the project, so it is taken away afterwards."""
    path = Path(json.loads((folder / "job.json").read_text())["log"])
    assert path.parent == REPOSITORY / "slurm" / "logs"
    return path


def test_a_bad_setting_is_refused_before_sbatch_is_called(cluster: Cluster) -> None:
    for words, told in (
        (("optim.lrr=1",), "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (("--ntasks-per-node", "99"), "gives 99 ranks less than one sample each"),
        (("--array", "0-x"), "wanted seeds such as 0-4"),
        (("train.device=cuda",), "the job asks for no GPU"),
    ):
        text = cluster.call(*SAMECURVE, "submit", "--config", "digits", *words, code=2)
        assert told in text and text.count("\n") == 1
    # SLURM's own refusal is one line too.
    text = cluster.call(*SAMECURVE, "submit", *RUN, "--partition", "no-such-one", code=2)
    assert text.startswith("samecurve: sbatch: ") and "invalid partition" in text
    assert not Path("runs").exists()
    assert cluster.call("squeue", "-h", "--states=all") == ""


def test_submit_says_where_everything_will_be(cluster: Cluster) -> None:
    text = cluster.call(*SAMECURVE, "submit", *RUN, "--cpus-per-task", "2", "run.name=sent")
    job = text.split()[1].rstrip(":")
    assert "run folder  runs/sent" in text and "samecurve stop sent" in text
    assert cluster.until_over(job) == "COMPLETED", log_of(Path("runs/sent")).read_text()
    log = log_of(Path("runs/sent"))
    assert str(log) in text and "test accuracy" in log.read_text()
    assert json.loads(Path("runs/sent/summary.json").read_text())["state"] == "finished"
    log.unlink()


def test_a_sweep_whose_one_seed_fails(cluster: Cluster) -> None:
    # What lies in the folder of seed 1, put there while the array waits, is no run.
    blocked = Path("runs/swept/run-seed-1")
    words = (*SAMECURVE, "sweep", *RUN, "--slurm", "--seeds", "3", "run.name=swept")
    assert "3 runs" in cluster.call(*words, "--dry-run")
    command = [*words, "--sbatch=--begin=now+5"]
    waiting = subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cluster.until("the array", lambda: (blocked / "job.json").exists())
    (blocked / "config.yaml").write_text("run: [not, settings]\n")
    text, _ = waiting.communicate(timeout=240)
    assert waiting.returncode == 1, text
    assert "2 of 3" in text and "run-seed-1: not started" in text, text
    groups = json.loads(Path("runs/swept/results.json").read_text())["groups"]
    assert groups[0]["finished"] == 2 and groups[0]["standard_deviation"] is not None

    (blocked / "config.yaml").unlink()
    text = cluster.call(*words, timeout_seconds=240)
    assert "1 runs" in text and "3 of 3" in text
    for seed in range(3):
        log_of(Path(f"runs/swept/run-seed-{seed}")).unlink()
