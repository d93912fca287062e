"""samecurve submit and sweep on a real cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, started
from support.processes import REPOSITORY

pytestmark = pytest.mark.slurm

SAMECURVE = (sys.executable, str(REPOSITORY / "launch" / "main.py"))
RUN = ("--config", "digits", *QUICK, "train.max_steps=20")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    logs = REPOSITORY / "slurm" / "logs"
    before = set(logs.glob("*.log"))
    with started(2, "--gpus", "0") as made:
        yield made
    for log in set(logs.glob("*.log")) - before:
        log.unlink()


def log_of(folder: Path) -> Path:
    """Where a job's output is, as its run folder says; in the project, so it is taken away afterwards."""
    path = Path(json.loads((folder / "job.json").read_text())["log"])
    assert path.parent == REPOSITORY / "slurm" / "logs"
    return path


def test_a_bad_setting_is_refused_before_sbatch_is_called(cluster: Cluster) -> None:
    before = cluster.call("squeue", "-h", "--states=all")
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
    assert cluster.call("squeue", "-h", "--states=all") == before


def test_submit_says_where_everything_will_be(cluster: Cluster) -> None:
    site = Path("my site's $(touch HACKED).sh")
    site.write_text("export SBATCH_PARTITION=urgent\necho read in ${SLURM_JOB_ID:-the login node} >> site.log\n")
    words = ("submit", *RUN, "--cpus-per-task", "2", "--doctor", "run.name=sent")
    text = cluster.call(*SAMECURVE, *words, SAMECURVE_SITE=str(site.resolve()))
    job = text.split()[1].rstrip(":")
    assert "Partition=urgent" in cluster.call("scontrol", "show", "job", job)
    assert "run folder  runs/sent" in text and "samecurve stop sent" in text
    assert cluster.until_over(job) == "COMPLETED", log_of(Path("runs/sent")).read_text()
    log = log_of(Path("runs/sent"))
    assert str(log) in text and "test accuracy" in log.read_text()
    assert json.loads(Path("runs/sent/summary.json").read_text())["state"] == "finished"
    assert "samecurve doctor: " in log.read_text()
    assert Path("site.log").read_text() == f"read in the login node\nread in {job}\n" and not Path("HACKED").exists()


def test_a_sweep_whose_one_seed_fails(cluster: Cluster) -> None:
    # What lies in the folder of seed 1, put there while the array waits, is no run.
    blocked = Path("runs/swept/run-seed-1")
    words = (*SAMECURVE, "sweep", *RUN, "--slurm", "--seeds", "3", "run.name=swept")
    assert "3 runs" in cluster.call(*words, "--dry-run")
    command = [*words, "--sbatch=--begin=now+20"]
    waiting = subprocess.Popen(command, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    cluster.until("the array", lambda: Path("runs/swept/sweep-job.json").exists())
    (blocked / "config.yaml").write_text("run: [not, settings]\n")
    text = cluster.call(*words, "--seeds", "2", "optim.lr=0.01", code=2)
    assert "has other points of runs/swept in the queue" in text
    text, _ = waiting.communicate(timeout=240)
    assert waiting.returncode == 1, text
    assert "2 of 3" in text and "run-seed-1: not started" in text, text
    groups = json.loads(Path("runs/swept/results.json").read_text())["groups"]
    assert groups[0]["finished"] == 2 and groups[0]["standard_deviation"] is not None

    (blocked / "config.yaml").unlink()
    text = cluster.call(*words, timeout_seconds=240)
    assert "1 runs" in text and "3 of 3" in text
