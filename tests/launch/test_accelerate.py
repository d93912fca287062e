"""Every way to launch: real launchers, real processes, each with a time limit."""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import yaml
from support.processes import ACCELERATE, MAIN, REPOSITORY, SMALL, Done, free_port


def test_accelerate_launch_without_arguments_trains_cifar10(launch: Callable[..., Done]) -> None:
    # Where there is no network the download fails, and the line that says so is the proof that it was tried.
    done = launch([*ACCELERATE, MAIN, "data.download=false"])
    (line,) = [line for line in done.err.splitlines() if line.startswith("samecurve: ")]
    assert line.startswith("samecurve: CIFAR-10 is not under data.root=data") and "--config digits" in line
    assert [path.name for path in Path("runs/cifar10").iterdir()] == [".lock"]


def test_accelerate_launch_trains_in_one_process(launch: Callable[..., Done]) -> None:
    done = launch([*ACCELERATE, MAIN, *SMALL, "train.max_steps=3"], OMP_NUM_THREADS="1")
    assert done.code == 0 and "test set, by class" in done.out, done.err
    environment = json.loads(Path("runs/digits/environment.json").read_text())
    assert environment["world_size"] == 1 and environment["threads_per_rank"] == environment["cores"]


def test_the_gpu_files_are_what_accelerate_reads() -> None:
    folder = REPOSITORY / "launch" / "accelerate"
    assert {path.stem for path in folder.glob("*.yaml")} == {
        "single_cpu",
        "multi_cpu",
        "single_gpu",
        "multi_gpu",
        "multi_node",
    }
    from accelerate.commands.config.config_args import ClusterConfig

    for path in folder.glob("*.yaml"):
        known = ClusterConfig.from_yaml_file(str(path))
        assert known.num_processes == yaml.safe_load(path.read_text())["num_processes"]
        assert known.mixed_precision == "no"  # not False, which is what YAML makes of a bare no


def test_two_machines_are_one_group(launch: Callable[..., Done]) -> None:
    """Two launchers, as on two machines, on this one's loopback; the first is waited for last."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
    ]
    command += [f"--master_port={port}"]
    done: dict[int, Done] = {}

    def start(node: int) -> None:
        done[node] = launch([*command, f"--node_rank={node}", MAIN, *SMALL, "train.max_steps=3", "run.root=runs"])

    threads = [threading.Thread(target=start, args=(node,)) for node in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
    assert [done[node].code for node in (0, 1)] == [0, 0], done
    assert "test set, by class" in done[0].out and done[1].out == ""
    assert json.loads(Path("runs/digits/summary.json").read_text())["world_size"] == 2
    assert json.loads(Path("runs/digits/environment.json").read_text())["backend"] == "gloo"
