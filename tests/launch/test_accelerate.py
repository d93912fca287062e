"""Tests `accelerate launch` and torchrun on two nodes with real launchers and processes."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, CommandResult, free_port


def test_accelerate_launch_without_arguments_trains_cifar10(launch: Callable[..., CommandResult]) -> None:
    # With data.download=false, the error about missing CIFAR-10 files shows that the default configuration was loaded.
    result = launch([*ACCELERATE, MAIN, "data.download=false"])
    (line,) = [line for line in result.err.splitlines() if line.startswith("samecurve: ")]
    assert "CIFAR-10 in data/cifar-10-batches-py" in line and "--config digits" in line
    assert not Path("runs/cifar10").exists()


def test_accelerate_launch_trains_in_one_process(launch: Callable[..., CommandResult]) -> None:
    result = launch([*ACCELERATE, MAIN, *SMALL, "train.max_steps=3"], OMP_NUM_THREADS="1")
    assert result.code == 0 and "test set, by class" in result.out, result.err
    environment = json.loads(Path("runs/digits/environment.json").read_text())
    assert environment["world_size"] == 1 and environment["threads_per_rank"] == environment["cores"]


def test_accelerate_reads_the_shipped_config_files() -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    paths = list((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))
    assert {path.stem for path in paths} == {"single_cpu", "multi_cpu", "single_gpu", "multi_gpu", "multi_node"}
    for path in paths:
        cluster_config = ClusterConfig.from_yaml_file(str(path))
        assert cluster_config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
        assert cluster_config.mixed_precision == "no"  # an unquoted `no` in YAML would be False


@pytest.mark.slow
def test_torchrun_on_two_nodes_forms_one_process_group(launch: Callable[..., CommandResult]) -> None:
    """The two launchers run on this machine and meet on its loopback address."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    results: dict[int, CommandResult] = {}

    def start(node: int) -> None:
        results[node] = launch([*command, f"--node_rank={node}", MAIN, *SMALL, "train.max_steps=3", "run.root=runs"])

    threads = [threading.Thread(target=start, args=(node,)) for node in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
    assert [results[node].code for node in (0, 1)] == [0, 0], results
    assert "test set, by class" in results[0].out and results[1].out == ""
    assert json.loads(Path("runs/digits/summary.json").read_text())["world_size"] == 2
    assert json.loads(Path("runs/digits/environment.json").read_text())["backend"] == "gloo"
