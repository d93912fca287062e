"""sbatch slurm/train.sh on a real cluster: several nodes, hostile arguments, and refused jobs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.cluster import QUICK, Cluster, running_cluster

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(4, "--gpus", "2") as running:
        yield running


def test_weights_are_equal_on_one_two_and_four_nodes(cluster: Cluster) -> None:
    weights = {}
    for nodes in (1, 2, 4):
        settings = ("--config", "digits", *QUICK, "train.max_steps=20", "train.virtual_ranks=4", f"run.name={nodes}")
        job = cluster.train(f"--nodes={nodes}", settings=settings)
        assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
        summary = json.loads(Path(f"runs/{nodes}/summary.json").read_text())
        assert summary["state"] == "finished" and summary["world_size"] == nodes
        weights[nodes] = Path(f"runs/{nodes}/model.safetensors").read_bytes()
        environment = json.loads(Path(f"runs/{nodes}/environment.json").read_text())
        assert environment["hosts"] == [f"n{node + 1}" for node in range(nodes)]
    assert weights[1] == weights[2] == weights[4]


def test_hostile_arguments_arrive_unchanged(cluster: Cluster) -> None:
    name = "a b'\"$(touch HACKED)`touch HACKED`\\;&|<>*?#%j"
    project = "p \"$HOME\" '$(touch HACKED)' ;exit 3"
    settings = ("--config", "digits", *QUICK, "train.max_steps=2", f"run.name={name}", f"log.project={project}")
    job = cluster.train("--ntasks-per-node=2", "--job-name=$(touch HACKED)", settings=settings)  # through torchrun
    assert cluster.wait_for_end(job) == "COMPLETED", cluster.logs()
    folder = Path("runs") / name
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"
    assert yaml.safe_load((folder / "config.yaml").read_text())["log"]["project"] == project
    assert not list(Path.cwd().rglob("HACKED*"))


def test_job_that_would_fail_again_is_not_requeued(cluster: Cluster) -> None:
    job = cluster.train(settings=("--config", "digits", "optim.lrr=3"))
    assert cluster.wait_for_end(job) == "FAILED"
    assert "no setting 'optim.lrr'; did you mean 'optim.lr'?" in cluster.log(job)
    # The ranks find this loss that is not finite, after a minute of training or a day.
    settings = ("--config", "digits", *QUICK, "optim.lr=1e30", "run.name=nan")
    job = cluster.train(settings=settings)
    assert cluster.wait_for_end(job) == "FAILED", cluster.logs()
    log = cluster.log(job)
    assert log.count("training nan:") == 1 and f"job {job}: a restart would fail again:" in log
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)


def test_job_with_unequal_nodes_is_refused(cluster: Cluster) -> None:
    job = cluster.train("--nodes=2", "--gpus=3", settings=("--config", "digits"))
    assert cluster.wait_for_end(job) == "FAILED"
    log = cluster.log(job)
    assert "all nodes must have the same number of GPUs" in log and "--gpus-per-node" in log
