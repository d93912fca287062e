"""samecurve submit and samecurve sweep on a real cluster."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, running_cluster
from support.processes import REPOSITORY

pytestmark = pytest.mark.slurm

SAMECURVE = (sys.executable, str(REPOSITORY / "launch" / "main.py"))
RUN = ("--config", "digits", *QUICK, "train.max_steps=20")
LOGS = REPOSITORY / "slurm" / "logs"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two nodes; removes the logs of its jobs from the project afterwards."""
    before = set(LOGS.glob("*.log"))
    with running_cluster(2, "--gpus", "0") as running:
        yield running
    for log in set(LOGS.glob("*.log")) - before:
        log.unlink()


def log_of(folder: Path) -> Path:
    """Returns the path of the job's output that the run folder records."""
    path = Path(json.loads((folder / "job.json").read_text())["log"])
    assert path.parent == LOGS
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optim.lrr=1",), "no setting 'optim.lrr'; did you mean 'optim.lr'?"),
        (("--ntasks-per-node", "99"), "less than one sample for each of 99 ranks"),
        (("--partition", "no-such-one"), "invalid partition"),  # SLURM's own message
    ],
)
def test_submit_prints_one_line_for_a_refused_job(cluster: Cluster, arguments: tuple[str, ...], message: str) -> None:
    before = cluster.call("squeue", "-h", "--states=all")
    text = cluster.call(*SAMECURVE, "submit", *RUN, *arguments, code=2)
    assert message in text and text.startswith("samecurve: ") and text.count("\n") == 1
    assert not Path("runs").exists()
    assert cluster.call("squeue", "-h", "--states=all") == before


def test_submit_prints_log_and_run_folder_and_reads_the_site_file(cluster: Cluster) -> None:
    site = Path("my site's $(touch HACKED).sh")
    site.write_text("export SBATCH_PARTITION=urgent\necho read in ${SLURM_JOB_ID:-the login node} >> site.log\n")
    arguments = ("submit", *RUN, "--cpus-per-task", "2", "--doctor", "run.name=sent")
    text = cluster.call(*SAMECURVE, *arguments, SAMECURVE_SITE=str(site.resolve()))
    job = text.split()[1].rstrip(":")
    assert "Partition=urgent" in cluster.call("scontrol", "show", "job", job)
    assert "run folder  runs/sent" in text and "samecurve stop sent" in text
    assert cluster.wait_for_end(job) == "COMPLETED", log_of(Path("runs/sent")).read_text()
    log = log_of(Path("runs/sent"))
    assert str(log) in text and "test accuracy" in log.read_text()
    assert json.loads(Path("runs/sent/summary.json").read_text())["state"] == "finished"
    assert "samecurve doctor: " in log.read_text()
    assert Path("site.log").read_text() == f"read in the login node\nread in {job}\n" and not Path("HACKED").exists()


def test_sweep_continues_after_one_run_failed(cluster: Cluster) -> None:
    blocked = Path("runs/swept/run-seed-1")
    command = (*SAMECURVE, "sweep", *RUN, "--slurm", "--seeds", "3", "run.name=swept")
    assert "3 runs" in cluster.call(*command, "--dry-run")
    waiting = subprocess.Popen(
        [*command, "--sbatch=--begin=now+20"], env=cluster.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    cluster.wait_for("the array", lambda: Path("runs/swept/sweep-job.json").exists())
    (blocked / "config.yaml").write_text("run: [not, settings]\n")  # while the array waits: this folder holds no run
    text = cluster.call(*command, "--seeds", "2", "optim.lr=0.01", code=2)
    assert "runs/swept" in text and "in the queue" in text, text
    text, _ = waiting.communicate(timeout=240)
    assert waiting.returncode == 1, text
    assert "2 of 3" in text and "run-seed-1: not started" in text, text
    groups = json.loads(Path("runs/swept/results.json").read_text())["groups"]
    assert groups[0]["finished"] == 2 and groups[0]["standard_deviation"] is not None

    (blocked / "config.yaml").unlink()
    text = cluster.call(*command, timeout_seconds=240)
    assert "1 runs" in text and "3 of 3" in text
