"""samecurve doctor in a job of three real nodes: nothing where all is well, and each planted fault with its node."""

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster, started
from support.processes import REPOSITORY

pytestmark = pytest.mark.slurm

# On node n2 every matrix product takes longer, as on a GPU that is too hot.
SLOW_NODE = """
import os, sys, threading, time

def slow():
    while not hasattr(sys.modules.get("torch"), "matmul"):
        time.sleep(0.001)
    Tensor = sys.modules["torch"].Tensor
    quick = Tensor.__matmul__
    Tensor.__matmul__ = lambda left, right: (time.sleep(2.0), quick(left, right))[1]

if os.environ.get("SLURMD_NODENAME") == "n2" and "probe.py" in " ".join(sys.orig_argv):
    threading.Thread(target=slow, daemon=True).start()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(3, "--gpus", "1") as made:
        yield made


def doctor(cluster: Cluster, *words: str, code: int | None, **env: str) -> dict[str, Any]:
    """What `samecurve doctor --json` says on the login node of three nodes."""
    command = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "doctor", "--json", "--nodes=3", *words]
    said = cluster.call(*command, "log.wandb=off", code=code, timeout_seconds=240, **env)
    found: dict[str, Any] = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    return found


def bad(found: dict[str, Any], state: str = "fail") -> dict[tuple[str, str], str]:
    return {(entry["check"], entry["node"]): entry["got"] for entry in found["findings"] if entry["state"] == state}


def test_three_nodes_that_are_well(cluster: Cluster) -> None:
    found = doctor(cluster, "--config", "digits", code=None)
    # Of three ranks on fewer cores one may be slow.
    assert found["nodes"] == ["n1", "n2", "n3"] and [check for check, _ in bad(found)] in ([], ["product"])
    measured = {(entry["check"], entry["node"]) for entry in found["findings"] if entry["state"] == "ok"} | {
        *bad(found)
    }
    assert measured >= {(check, node) for check in ("reach", "shared", "product", "ranks") for node in found["nodes"]}
    (pairs,) = [entry["got"] for entry in found["findings"] if entry["check"] == "pairs" and entry["state"] == "ok"]
    assert "of 3 between nodes" in pairs
    assert [path.name for path in Path("runs").iterdir()] == ["doctor-1.log"]  # nothing else is left behind


def test_each_planted_fault_is_named_with_its_node(cluster: Cluster, image_folder: Path, tmp_path: Path) -> None:
    runs, empty, hook = (tmp_path / name for name in ("runs", "empty", "hook"))
    for folder in (runs, empty, hook):
        folder.mkdir()
    (hook / "sitecustomize.py").write_text(SLOW_NODE)
    real = Path(str(importlib.metadata.distribution("accelerate")._path)) / "METADATA"  # type: ignore[attr-defined]
    (tmp_path / "METADATA").write_text(real.read_text().replace("\nVersion: ", "\nVersion: 0.", 1))
    cluster.script("exec", "n2", "ip", "route", "add", "blackhole", "127.1.0.13/32")
    cluster.script("exec", "n2", "mount", "--bind", str(runs), str(runs))
    cluster.script("exec", "n2", "mount", "-o", "remount,bind,ro", str(runs))
    cluster.script("exec", "n3", "mount", "--bind", str(empty), str(image_folder))
    cluster.script("exec", "n3", "mount", "--bind", str(tmp_path / "METADATA"), str(real))
    try:
        settings = ("--config", "image_folder", f"data.root={image_folder}", f"run.root={runs}")
        found = doctor(cluster, "--gpus-per-node=1", *settings, code=1, PYTHONPATH=str(hook))
    finally:
        cluster.script("exec", "n2", "ip", "route", "del", "blackhole", "127.1.0.13/32")
        for node, place in (("n2", runs), ("n3", image_folder), ("n3", real)):
            cluster.script("exec", node, "umount", str(place))
    faults = bad(found)
    assert "not reached from n2" in faults["reach", "n3"] and "rank 2 by rank 1" in faults["reach", "n3"]
    assert "not reached from n3" in faults["reach", "n2"] and "n1" not in faults["reach", "n2"]
    assert f"{runs}: Read-only file system" in faults["run folder", "n2"]
    assert f"{image_folder}/train: No such file or directory" in faults["data", "n3"]
    assert faults["versions", "n3"].startswith("accelerate 0.")
    assert faults["product", "n2"].startswith("rank 1: ")
    assert {node for check, node in faults if check == "gpus"} == {"n1", "n2", "n3"}
    # Nobody is accused of another's fault; the node that does not reach all others is said to be left out.
    others = [key for key in faults if key[0] != "gpus"]
    assert sorted(others) == sorted(
        [("reach", "n2"), ("reach", "n3"), ("run folder", "n2"), ("data", "n3"), ("versions", "n3"), ("product", "n2")]
    )
    assert "not measured" in bad(found, "warning")["speed", "n3"]
    doctor(cluster, "--config", "digits", "--short", f"run.root={runs}", code=0)  # all of it is mended


def test_a_node_whose_python_does_not_start(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SLURMD_NODENAME') == 'n3': os._exit(7)\n")
    found = doctor(cluster, "--config", "digits", "--short", "--timeout-seconds=40", code=1, PYTHONPATH=str(tmp_path))
    assert bad(found) == {("answer", "n3"): "no answer"}
