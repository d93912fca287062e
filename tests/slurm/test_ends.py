"""Jobs on a real cluster that end before their time: each equals, bit for bit, a run that nobody disturbed."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, started
from support.processes import last_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

RUN = ("--config", "digits", *QUICK, "train.virtual_ranks=2", "eval.every_epochs=0")
RUN = (*RUN, "train.epochs=200", "train.max_steps=300", "checkpoint.every_epochs=0", "checkpoint.every_steps=20")

# SLURM's own clocks are slow: as long as a file lies beside this, a run does not come to its end meanwhile.
SLOW_STEPS = """
import pathlib, sys, threading, time

def slow():
    while not hasattr(sys.modules.get("trainer.step"), "Step"):
        time.sleep(0.001)
    Step = sys.modules["trainer.step"].Step
    quick = Step.__call__
    mark = pathlib.Path(__file__).with_name("slow")
    Step.__call__ = lambda *arguments: (mark.exists() and time.sleep(0.1), quick(*arguments))[1]

if "trainer/main.py" in " ".join(sys.orig_argv) and "torch.distributed.run" not in sys.orig_argv:
    threading.Thread(target=slow, daemon=True).start()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all the runs of this file lie."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(2, "--gpus", "0", "--grace-time", "15", "--kill-wait", "15") as made:
        yield made


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, place: Path) -> bytes:
    """The weights of a run that nobody disturbs."""
    job = cluster.train(settings=(*RUN, f"run.root={place}", "run.name=unbroken"))
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    return (place / "unbroken" / "model.safetensors").read_bytes()


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH: a run is slow as long as `slow` is there."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW_STEPS)
    (folder / "slow").touch()
    return folder


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def test_a_job_whose_time_is_over_goes_on(cluster: Cluster, place: Path, unbroken: bytes, hook: Path) -> None:
    folder = place / "limit"
    settings = (*RUN, f"run.root={place}", "run.name=limit")
    job = cluster.train("--time=10", "--signal=B:USR1@60", settings=settings, PYTHONPATH=str(hook))
    cluster.until("step 20", lambda: last_step(folder) >= 20)
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+65")
    # SLURM looks at its clock twice a minute, and that may be longer than the run: it is halted until it is warned.
    (rank,) = processes(cluster, "n1", "trainer/main.py")
    cluster.script("exec", "n1", "kill", "-STOP", rank)
    waiting = re.compile(r"^ShdPnd:\s*0*[1-9a-f]", re.MULTILINE)
    cluster.until("the warning", lambda: waiting.search(cluster.script("exec", "n1", "cat", f"/proc/{rank}/status")))
    cluster.script("exec", "n1", "kill", "-CONT", rank)
    cluster.until("its requeue", lambda: "Restarts=0" not in cluster.call("scontrol", "show", "job", job))
    stopped = status(folder)
    assert stopped["state"] == "stopped" and 0 < int(str(stopped["step"])) < 300, cluster.logs()
    (hook / "slow").unlink()
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    assert f"job {job}: the time of this job is over, at step" in cluster.log(job)
    assert (folder / "model.safetensors").read_bytes() == unbroken


def test_preempted_requeued_cancelled(cluster: Cluster, place: Path, unbroken: bytes, hook: Path) -> None:
    folder, settings = place / "disturbed", (*RUN, f"run.root={place}", "run.name=disturbed")
    job = cluster.train("--nodes=2", settings=settings, PYTHONPATH=str(hook))
    cluster.until("step 20", lambda: last_step(folder) >= 20)

    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    assert cluster.until_over(urgent) == "COMPLETED"
    assert status(folder)["state"] == "stopped", cluster.logs()
    before = int(str(status(folder)["step"]))
    cluster.until("more steps", lambda: last_step(folder) >= before + 10)
    assert "PreemptTime=None" in cluster.call("scontrol", "show", "job", job)

    cluster.call("scontrol", "requeue", job)
    cluster.until("a stop", lambda: status(folder)["state"] == "stopped")
    again = int(str(status(folder)["step"]))
    assert again > before
    cluster.until("more steps", lambda: last_step(folder) >= again + 10)

    cluster.call("scancel", job)
    assert cluster.until_over(job) == "CANCELLED"
    assert status(folder)["state"] == "stopped" and again < int(str(status(folder)["step"])) < 300

    job = cluster.train(settings=settings)  # on one node now
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    assert (folder / "model.safetensors").read_bytes() == unbroken


def test_a_torchrun_and_a_node_that_die(cluster: Cluster, place: Path, unbroken: bytes, hook: Path) -> None:
    folder = place / "dying"
    settings = (*RUN, f"run.root={place}", "run.name=dying")
    job = cluster.train("--nodes=2", settings=settings, PYTHONPATH=str(hook))
    cluster.until("step 25", lambda: last_step(folder) >= 25)

    lost = {"a torchrun": kill(cluster, "n2", "torch.distributed.run", folder)}
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job), "within the allocation"
    log = cluster.log(job)
    assert "the ranks ended before their time" in log

    began, step = time.monotonic(), last_step(folder)
    cluster.script("kill-node", "n2")
    cluster.until("a requeue", lambda: cluster.state(job) == "PENDING")
    cluster.script("start-node", "n2")
    cluster.until("another start", lambda: starts(folder) == 3)
    cluster.until("more steps", lambda: last_step(folder) > step)
    lost["a node"] = time.monotonic() - began
    (hook / "slow").unlink()
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
    step = last_step(folder)
    cluster.until("another start", lambda: starts(folder) > begun)
    cluster.until("more steps", lambda: last_step(folder) > step)
    return time.monotonic() - began
