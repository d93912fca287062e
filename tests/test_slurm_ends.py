"""Jobs on a real cluster that end before their time: each equals, bit for bit, a run that nobody disturbed."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, started
from test_slurm_train import QUICK

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

# Long enough to be met in the middle of an epoch of 23 steps.
RUN = ("--config", "digits", *QUICK, "train.virtual_ranks=2", "eval.every_epochs=0")
RUN = (*RUN, "train.epochs=200", "train.max_steps=600", "checkpoint.every_epochs=0", "checkpoint.every_steps=50")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(2, "--gpus", "0", "--grace-time", "15") as made:
        yield made


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, place: Path) -> bytes:
    """The weights of a run that nobody disturbs."""
    job = cluster.train(settings=(*RUN, f"run.root={place}", "run.name=unbroken"))
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    return (place / "unbroken" / "model.safetensors").read_bytes()


def steps(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def test_a_job_whose_time_is_over_goes_on(cluster: Cluster, place: Path, unbroken: bytes) -> None:
    folder = place / "limit"
    settings = (*RUN, f"run.root={place}", "run.name=limit")
    job = cluster.train("--time=10", "--signal=B:USR1@60", settings=settings)
    cluster.until("step 20", lambda: steps(folder) >= 20)
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+65")
    # SLURM looks at its clock twice a minute, and the run may last less: it is halted until the warning has reached it.
    (rank,) = processes(cluster, "n1", "trainer/main.py")
    cluster.script("exec", "n1", "kill", "-STOP", rank)
    waiting = re.compile(r"^ShdPnd:\s*0*[1-9a-f]", re.MULTILINE)
    cluster.until("the warning", lambda: waiting.search(cluster.script("exec", "n1", "cat", f"/proc/{rank}/status")))
    cluster.script("exec", "n1", "kill", "-CONT", rank)
    cluster.until("its requeue", lambda: "Restarts=0" not in cluster.call("scontrol", "show", "job", job))
    stopped = status(folder)
    assert stopped["state"] == "stopped" and 0 < int(str(stopped["step"])) < 600, cluster.logs()
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    assert f"job {job}: the time of this job is over, at step" in cluster.log(job)
    assert (folder / "model.safetensors").read_bytes() == unbroken


def test_preempted_requeued_cancelled(cluster: Cluster, place: Path, unbroken: bytes) -> None:
    folder, settings = place / "disturbed", (*RUN, f"run.root={place}", "run.name=disturbed")
    job = cluster.train("--nodes=2", settings=settings)
    cluster.until("step 60", lambda: steps(folder) >= 60)

    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    assert cluster.until_over(urgent) == "COMPLETED"
    assert status(folder)["state"] == "stopped", cluster.logs()
    before = int(str(status(folder)["step"]))
    cluster.until("more steps", lambda: steps(folder) >= before + 20)
    assert "PreemptTime=None" in cluster.call("scontrol", "show", "job", job)

    cluster.call("scontrol", "requeue", job)
    cluster.until("a stop", lambda: status(folder)["state"] == "stopped")
    again = int(str(status(folder)["step"]))
    assert again > before
    cluster.until("more steps", lambda: steps(folder) >= again + 20)

    cluster.call("scancel", job)
    assert cluster.until_over(job) == "CANCELLED"
    assert status(folder)["state"] == "stopped" and again < int(str(status(folder)["step"])) < 600

    job = cluster.train(settings=settings)  # on one node now
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    assert (folder / "model.safetensors").read_bytes() == unbroken


def test_a_torchrun_and_a_node_that_die(cluster: Cluster, place: Path, unbroken: bytes) -> None:
    folder = place / "dying"
    job = cluster.train("--nodes=2", settings=(*RUN, f"run.root={place}", "run.name=dying"))
    cluster.until("step 60", lambda: steps(folder) >= 60)

    lost = {"a torchrun": kill(cluster, "n2", "torch.distributed.run", folder)}
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job), "within the allocation"
    log = cluster.log(job)
    assert "the ranks ended before their time" in log

    began, step = time.monotonic(), steps(folder)
    cluster.script("kill-node", "n2")
    cluster.until("a requeue", lambda: cluster.state(job) == "PENDING")
    cluster.script("start-node", "n2")
    cluster.until("another start", lambda: starts(folder) == 3)
    cluster.until("more steps", lambda: steps(folder) > step)
    lost["a node"] = time.monotonic() - began
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    assert (folder / "model.safetensors").read_bytes() == unbroken
    print({what: f"{seconds:.0f} s" for what, seconds in lost.items()})


def starts(folder: Path) -> int:
    """How often training was begun."""
    return len((folder / "starts.jsonl").read_text().splitlines())


def processes(cluster: Cluster, node: str, words: str) -> list[str]:
    """The ids of a node's processes that have these words in their command."""
    listed = cluster.script("exec", node, "ps", "-eo", "pid,args").splitlines()
    others = {"launch/main.py", "torch.distributed.run"} - {words}
    found = [line.split()[0] for line in listed if words in line and not any(other in line for other in others)]
    assert found, "\n".join(listed)
    return found


def kill(cluster: Cluster, node: str, words: str, folder: Path) -> float:
    """Kills the process of a node that has these words in its command; seconds until the run is further than it was."""
    begun, began = starts(folder), time.monotonic()
    cluster.script("exec", node, "kill", "-9", processes(cluster, node, words)[0])
    step = steps(folder)
    cluster.until("another start", lambda: starts(folder) > begun)
    cluster.until("more steps", lambda: steps(folder) > step)
    return time.monotonic() - began
