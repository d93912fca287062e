"""Jobs on a real cluster with odd site files, wrong clocks, suspensions and refusals before the queue."""

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, running_cluster
from support.processes import REPOSITORY, last_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SAMECURVE = (sys.executable, str(REPOSITORY / "launch" / "main.py"))
RUN = ("--config", "digits", *QUICK, "train.max_steps=10", "eval.every_epochs=0")
ENDLESS = ("--config", "digits", *QUICK, "train.epochs=99999", "eval.every_epochs=0", "checkpoint.every_steps=5")

# Python's clock on node n1 is two hours ahead, in the job's own process, in srun's task and in the ranks.
FAST_CLOCK = """
import os, time
original = time.time
if os.environ.get("SLURMD_NODENAME") == "n1":
    time.time = lambda: original() + 7200
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(2, "--gpus", "0", "--kill-wait", "20") as running:
        yield running


def has_stalled(folder: Path) -> bool:
    """Returns whether no step ends for more than a second."""
    step = last_step(folder)
    time.sleep(1.2)
    return step == last_step(folder)


def restarts(cluster: Cluster, job: str) -> int:
    match = re.search(r"Restarts=(\d+)", cluster.call("scontrol", "show", "job", job))
    assert match is not None
    return int(match[1])


def next_job_id(cluster: Cluster) -> str:
    """Returns the id that the next job gets. A list of jobs may lose old ones meanwhile."""
    match = re.search(r"NEXT_JOB_ID\s*=\s*(\d+)", cluster.call("scontrol", "show", "config"))
    assert match is not None
    return match[1]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("exit 0\n", "ended its shell (exit code 0)"),
        ("if true\n", "is not valid bash"),
        ("export SAMECURVE_PYTHON=/no/python\n", "no Python on n1 (/no/python)"),
        ("export SAMECURVE_SRUN_ARGS='\"'\n", "not readable as arguments of srun"),
    ],
)
def test_job_with_an_unusable_site_file_fails_and_says_why(cluster: Cluster, site: str, message: str) -> None:
    Path("site.sh").write_text(site)
    job = cluster.train(settings=RUN, SAMECURVE_SITE="site.sh")
    assert cluster.wait_for_end(job) == "FAILED"
    assert message in cluster.log(job) and "Traceback" not in cluster.log(job)
    assert "ExitCode=2:0" in cluster.call("scontrol", "show", "job", job)


def test_job_with_an_odd_site_file_trains_in_its_folder(cluster: Cluster) -> None:
    Path("site.sh").write_text(
        "(while :; do sleep 60; done) &\ncd /\nset -eu\ntrap 'exit 3' EXIT\nexec >/dev/null 2>&1\n"
        "export RUN_NAME=odd\nalias python=false\n"
    )
    job = cluster.train(settings=(*RUN, "run.name=odd"), SAMECURVE_SITE="site.sh")
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert Path("runs/odd/summary.json").is_file() and "test accuracy" in cluster.log(job)


def test_warning_while_the_site_file_runs_requeues_the_job(cluster: Cluster) -> None:
    Path("site.sh").write_text("[ -e begun ] || { touch begun; sleep 4; }\n")
    job = cluster.train(settings=(*RUN, "run.name=warned"), SAMECURVE_SITE="site.sh")
    cluster.wait_for("the site file", Path("begun").exists)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert restarts(cluster, job) == 1
    assert "SLURM's warning before the time limit came while site file" in cluster.log(job)
    assert "the time of this job is over" in cluster.log(job)


def test_wrong_clock_of_a_node_neither_stops_the_run_nor_repeats_it(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAST_CLOCK)
    settings = (*RUN, "run.name=clock")
    job = cluster.train("--nodes=2", "--time=30", settings=settings, PYTHONPATH=str(tmp_path))
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert restarts(cluster, job) == 0
    (line,) = [line for line in cluster.log(job).splitlines() if "the clock of" in line]
    assert re.search(r"the clock of n1 is 7,(19|20)\d s ahead of the controller's", line)


def test_job_that_is_warned_at_once_ends_after_three_attempts(cluster: Cluster) -> None:
    folder = Path("runs/early")
    job = cluster.train("--time=30", settings=(*ENDLESS, "run.name=early"))
    for attempt in range(3):  # each saves some steps, although 30 minutes are left
        step = last_step(folder)
        cluster.wait_for("steps", lambda step=step: last_step(folder) > step, 90)  # type: ignore[misc]
        cluster.call("scancel", "--batch", "--signal=USR1", job)
        if attempt < 2:
            cluster.wait_for("a restart", lambda attempt=attempt: restarts(cluster, job) == attempt + 1, 90)  # type: ignore[misc]
    assert cluster.wait_for_end(job, 90) == "FAILED", cluster.logs()
    log = cluster.log(job)
    assert restarts(cluster, job) == 2 and "giving up after 3 attempts in a row without progress" in log
    assert re.search(
        r"the last one ended after \d+ s, when 1,[78]\d\d s of the job's time were left; the clock of the first", log
    )


def test_stop_on_two_nodes_leaves_no_traceback_and_a_suspended_job_is_shown(cluster: Cluster) -> None:
    folder = Path("runs/stopped")
    job = cluster.train("--nodes=2", settings=(*ENDLESS, "run.name=stopped"))
    cluster.wait_for("steps", lambda: last_step(folder) >= 5)
    cluster.call("scontrol", "suspend", job)
    try:
        cluster.wait_for("the suspension", lambda: has_stalled(folder), 60)  # SLURM suspends some seconds later
        text = cluster.call(*SAMECURVE, "status", "stopped")
        assert f"stopped: suspended (SLURM has suspended job {job};" in text and "time left" not in text
    finally:
        cluster.call("scontrol", "resume", job)
    step = last_step(folder)
    cluster.wait_for("more steps", lambda: last_step(folder) > step)
    cluster.call("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    cluster.wait_for("the end of its processes", lambda: not cluster.call("squeue", "-h"), 60)
    assert cluster.call(*SAMECURVE, "status", "stopped").startswith("stopped: stopped"), cluster.log(job)
    assert "Traceback" not in cluster.log(job), cluster.log(job)


def test_refusal_on_two_nodes_is_a_few_lines(cluster: Cluster) -> None:
    job = cluster.train("--nodes=2", settings=(*RUN, "model.freeze=[conv9]"))
    assert cluster.wait_for_end(job) == "FAILED"
    log = cluster.log(job)
    assert log.count("the network has no 'conv9'") == 2 and "Traceback" not in log, (
        log
    )  # the rank, and the job's last line


def test_submit_queues_nothing_that_cannot_run(cluster: Cluster) -> None:
    before = next_job_id(cluster)
    refused = {
        ("run.root=/proc/x",): "cannot be written",
        ("model.name=torchvision/resnet19",): "no classifier 'resnet19'",
        ("run.resume=/no/such/run",): "no such folder",
        ("--after", "999999"): "SLURM does not know this job",
    }
    for words, message in refused.items():
        text = cluster.call(*SAMECURVE, "submit", *RUN, *words, code=2)
        assert message in text and text.count("\n") == 1, text
    assert next_job_id(cluster) == before
