"""Jobs that end early on a real cluster: each continues, and its weights equal those of an undisturbed run."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, running_cluster
from support.processes import last_step

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

RUN = ("--config", "digits", *QUICK, "train.virtual_ranks=2", "eval.every_epochs=0")
RUN = (*RUN, "train.epochs=200", "train.max_steps=300", "checkpoint.every_epochs=0", "checkpoint.every_steps=20")

# SLURM's clocks are slow. While a file named `slow` lies beside this hook, no run finishes before them.
SLOW_STEPS = """
import pathlib, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("trainer.step"), "Step"):
        time.sleep(0.001)
    Step = sys.modules["trainer.step"].Step
    original = Step.__call__
    marker = pathlib.Path(__file__).with_name("slow")
    Step.__call__ = lambda *arguments: (marker.exists() and time.sleep(0.1), original(*arguments))[1]

if "trainer/main.py" in " ".join(sys.orig_argv) and "elastic.py" not in " ".join(sys.orig_argv):
    threading.Thread(target=slow_down, daemon=True).start()
"""


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of this file."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(2, "--gpus", "0", "--grace-time", "15", "--kill-wait", "15") as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed_weights(cluster: Cluster, run_root: Path) -> bytes:
    """The weights of a run that finishes in one attempt."""
    job = cluster.train(settings=(*RUN, f"run.root={run_root}", "run.name=undisturbed"))
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    return (run_root / "undisturbed" / "model.safetensors").read_bytes()


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that slows down a run while its file `slow` exists."""
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SLOW_STEPS)
    (folder / "slow").touch()
    return folder


def status(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "status.json").read_text())
    return content


def test_job_at_its_time_limit_is_requeued_and_continues(
    cluster: Cluster, run_root: Path, undisturbed_weights: bytes, hook: Path
) -> None:
    folder = run_root / "limit"
    settings = (*RUN, f"run.root={run_root}", "run.name=limit")
    job = cluster.train("--time=10", "--signal=B:USR1@60", settings=settings, PYTHONPATH=str(hook))
    cluster.wait_for("step 20", lambda: last_step(folder) >= 20)
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+65")
    # SLURM checks its clock twice a minute, which may be longer than the run, so the rank stops until the warning.
    (rank,) = process_ids(cluster, "n1", "trainer/main.py")
    cluster.control("exec", "n1", "kill", "-STOP", rank)
    pending = re.compile(r"^ShdPnd:\s*0*[1-9a-f]", re.MULTILINE)
    cluster.wait_for(
        "the warning", lambda: pending.search(cluster.control("exec", "n1", "cat", f"/proc/{rank}/status"))
    )
    cluster.control("exec", "n1", "kill", "-CONT", rank)
    cluster.wait_for("the requeue", lambda: "Restarts=0" not in cluster.call("scontrol", "show", "job", job))
    stopped = status(folder)
    assert stopped["state"] == "stopped" and 0 < int(str(stopped["step"])) < 300, cluster.logs()
    (hook / "slow").unlink()
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert f"job {job}: the time of this job is over, at step" in cluster.log(job)
    assert (folder / "model.safetensors").read_bytes() == undisturbed_weights


def test_preempted_requeued_and_cancelled_job_continues(
    cluster: Cluster, run_root: Path, undisturbed_weights: bytes, hook: Path
) -> None:
    folder, settings = run_root / "disturbed", (*RUN, f"run.root={run_root}", "run.name=disturbed")
    job = cluster.train("--nodes=2", settings=settings, PYTHONPATH=str(hook))
    cluster.wait_for("step 20", lambda: last_step(folder) >= 20)

    urgent = cluster.call(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    assert cluster.wait_for_end(urgent) == "COMPLETED"
    assert status(folder)["state"] == "stopped", cluster.logs()
    preempted_step = int(str(status(folder)["step"]))
    cluster.wait_for("more steps", lambda: last_step(folder) >= preempted_step + 10)
    assert "PreemptTime=None" in cluster.call("scontrol", "show", "job", job)

    cluster.call("scontrol", "requeue", job)
    cluster.wait_for("a stop", lambda: status(folder)["state"] == "stopped")
    requeued_step = int(str(status(folder)["step"]))
    assert requeued_step > preempted_step
    cluster.wait_for("more steps", lambda: last_step(folder) >= requeued_step + 10)

    cluster.call("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert status(folder)["state"] == "stopped" and requeued_step < int(str(status(folder)["step"])) < 300

    job = cluster.train(settings=settings)  # a new job on one node
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert (folder / "model.safetensors").read_bytes() == undisturbed_weights


def test_job_continues_after_torchrun_and_a_node_died(
    cluster: Cluster, run_root: Path, undisturbed_weights: bytes, hook: Path
) -> None:
    folder = run_root / "dying"
    settings = (*RUN, f"run.root={run_root}", "run.name=dying")
    job = cluster.train("--nodes=2", settings=settings, PYTHONPATH=str(hook))
    cluster.wait_for("step 25", lambda: last_step(folder) >= 25)

    step = last_step(folder)
    cluster.control("exec", "n2", "kill", "-9", process_ids(cluster, "n2", "launch/elastic.py")[0])
    cluster.wait_for("a second session", lambda: num_sessions(folder) == 2)
    cluster.wait_for("more steps", lambda: last_step(folder) > step)
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job), "restarted in the same allocation"
    assert "the ranks ended early" in cluster.log(job)

    step = last_step(folder)
    cluster.control("kill-node", "n2")
    cluster.wait_for("a requeue", lambda: cluster.state(job) == "PENDING")
    cluster.control("start-node", "n2")
    cluster.wait_for("a third session", lambda: num_sessions(folder) == 3)
    cluster.wait_for("more steps", lambda: last_step(folder) > step)
    (hook / "slow").unlink()
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    assert (folder / "model.safetensors").read_bytes() == undisturbed_weights


def num_sessions(folder: Path) -> int:
    """Returns how many times training has started."""
    return len((folder / "starts.jsonl").read_text().splitlines())


def process_ids(cluster: Cluster, node: str, script: str) -> list[str]:
    """Returns the ids of a node's processes that run a script, without the launchers above them."""
    lines = cluster.control("exec", node, "ps", "-eo", "pid,args").splitlines()
    launchers = {"launch/main.py", "launch/elastic.py"} - {script}
    ids = [line.split()[0] for line in lines if script in line and not any(name in line for name in launchers)]
    assert ids, "\n".join(lines)
    return ids
