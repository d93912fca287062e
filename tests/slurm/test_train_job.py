"""sbatch slurm/train.sh on a real cluster: any number of nodes, hostile words, what a job is refused for."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cluster import QUICK, Cluster, started

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(4, "--gpus", "2") as made:
        yield made


def test_the_same_bits_on_one_two_and_four_nodes(cluster: Cluster) -> None:
    weights = {}
    for nodes in (1, 2, 4):
        settings = ("--config", "digits", *QUICK, "train.max_steps=20", "train.virtual_ranks=4", f"run.name={nodes}")
        job = cluster.train(f"--nodes={nodes}", settings=settings)
        assert cluster.until_over(job) == "COMPLETED", cluster.logs()
        summary = json.loads(Path(f"runs/{nodes}/summary.json").read_text())
        assert summary["state"] == "finished" and summary["world_size"] == nodes
        weights[nodes] = Path(f"runs/{nodes}/model.safetensors").read_bytes()
        environment = json.loads(Path(f"runs/{nodes}/environment.json").read_text())
        assert environment["hosts"] == [f"n{node + 1}" for node in range(nodes)]
    assert weights[1] == weights[2] == weights[4]


def test_hostile_words_arrive_as_they_were_typed(cluster: Cluster) -> None:
    name = "a b'\"$(touch HACKED)`touch HACKED`\\;&|<>*?#%j\nc"
    project = "p \"$HOME\" '$(touch HACKED)'\n;exit 3"
    settings = ("--config", "digits", *QUICK, "train.max_steps=2", f"run.name={name}", f"log.project={project}")
    job = cluster.train("--ntasks-per-node=2", "--job-name=$(touch HACKED)", settings=settings)  # through torchrun
    assert cluster.until_over(job) == "COMPLETED", cluster.logs()
    folder = Path("runs") / name
    assert json.loads((folder / "summary.json").read_text())["state"] == "finished"
    import yaml

    assert yaml.safe_load((folder / "config.yaml").read_text())["log"]["project"] == project
    assert not list(Path.cwd().rglob("HACKED*"))


def test_what_would_fail_again_is_not_queued_again(cluster: Cluster) -> None:
    job = cluster.train(settings=("--config", "digits", "optim.lrr=3"))
    assert cluster.until_over(job) == "FAILED"
    assert "no setting 'optim.lrr'; did you mean 'optim.lr'?" in cluster.log(job)
    # A loss that is no number: found by the ranks, after a minute of training or a day.
    settings = ("--config", "digits", *QUICK, "optim.lr=1e30", "run.name=nan")
    job = cluster.train(settings=settings)
    assert cluster.until_over(job) == "FAILED", cluster.logs()
    log = cluster.log(job)
    assert log.count("training nan:") == 1 and f"job {job}: not to be repeated:" in log
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)


def test_nodes_that_differ_are_refused(cluster: Cluster) -> None:
    job = cluster.train("--nodes=2", "--gpus=3", settings=("--config", "digits"))
    assert cluster.until_over(job) == "FAILED"
    log = cluster.log(job)
    assert "the nodes have different numbers of GPUs" in log and "--gpus-per-node" in log
