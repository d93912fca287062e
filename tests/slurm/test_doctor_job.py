"""samecurve doctor on three real nodes: healthy nodes, and planted faults that it reports with their node."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster, running_cluster
from support.processes import REPOSITORY

pytestmark = pytest.mark.slurm

# On node n2 every matrix product takes two seconds longer, as on a GPU that is too hot.
SLOW_NODE = """
import os, sys, threading, time

def slow_down():
    while not hasattr(sys.modules.get("torch"), "matmul"):
        time.sleep(0.001)
    Tensor = sys.modules["torch"].Tensor
    original = Tensor.__matmul__
    Tensor.__matmul__ = lambda left, right: (time.sleep(2.0), original(left, right))[1]

if os.environ.get("SLURMD_NODENAME") == "n2" and "probe.py" in " ".join(sys.orig_argv):
    threading.Thread(target=slow_down, daemon=True).start()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(3, "--gpus", "1") as running:
        yield running


def doctor_report(cluster: Cluster, *arguments: str, code: int | None, **env: str) -> dict[str, Any]:
    """Runs `samecurve doctor --json` on the login node for three nodes and returns its report."""
    command = [sys.executable, str(REPOSITORY / "launch" / "main.py"), "doctor", "--json", "--nodes=3", *arguments]
    output = cluster.call(*command, "log.wandb=off", code=code, timeout_seconds=240, **env)
    report: dict[str, Any] = next(json.loads(line) for line in output.splitlines() if line.startswith("{"))
    return report


def findings_of(report: dict[str, Any], state: str = "fail") -> dict[tuple[str, str], str]:
    """Returns what was found, by check and node, for the findings in a state."""
    return {(entry["check"], entry["node"]): entry["got"] for entry in report["findings"] if entry["state"] == state}


def metadata_of(package: str) -> Path:
    """Returns the METADATA file of an installed package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parents[1].glob(f"{package}-*.dist-info/METADATA")
    return path


def test_healthy_nodes_pass_and_nothing_remains(cluster: Cluster) -> None:
    report = doctor_report(cluster, "--config", "digits", code=None)
    # One of three ranks may be slow when they share fewer cores.
    failures = findings_of(report)
    assert report["nodes"] == ["n1", "n2", "n3"] and [check for check, _ in failures] in ([], ["product"])
    measured = {*findings_of(report, "ok"), *failures}
    assert measured >= {(check, node) for check in ("reach", "shared", "product", "ranks") for node in report["nodes"]}
    (pairs,) = [entry["got"] for entry in report["findings"] if entry["check"] == "pairs" and entry["state"] == "ok"]
    assert "of 3 between nodes" in pairs
    assert [path.name for path in Path("runs").iterdir()] == ["doctor-1.log"]


def test_planted_faults_are_reported_with_their_nodes(cluster: Cluster, image_folder: Path, tmp_path: Path) -> None:
    runs, empty, hook = (tmp_path / name for name in ("runs", "empty", "hook"))
    for folder in (runs, empty, hook):
        folder.mkdir()
    (hook / "sitecustomize.py").write_text(SLOW_NODE)
    metadata = metadata_of("accelerate")
    (tmp_path / "METADATA").write_text(metadata.read_text().replace("\nVersion: ", "\nVersion: 0.", 1))
    cluster.control("exec", "n2", "ip", "route", "add", "blackhole", "127.1.0.13/32")
    cluster.control("exec", "n2", "mount", "--bind", str(runs), str(runs))
    cluster.control("exec", "n2", "mount", "-o", "remount,bind,ro", str(runs))
    cluster.control("exec", "n3", "mount", "--bind", str(empty), str(image_folder))
    cluster.control("exec", "n3", "mount", "--bind", str(tmp_path / "METADATA"), str(metadata))
    try:
        settings = ("--config", "image_folder", f"data.root={image_folder}", f"run.root={runs}")
        report = doctor_report(cluster, "--gpus-per-node=1", *settings, code=1, PYTHONPATH=str(hook))
    finally:
        cluster.control("exec", "n2", "ip", "route", "del", "blackhole", "127.1.0.13/32")
        for node, path in (("n2", runs), ("n3", image_folder), ("n3", metadata)):
            cluster.control("exec", node, "umount", str(path))
    failures = findings_of(report)
    assert "not reached from n2" in failures["reach", "n3"] and "rank 2 by rank 1" in failures["reach", "n3"]
    assert "not reached from n3" in failures["reach", "n2"] and "n1" not in failures["reach", "n2"]
    assert f"{runs}: Read-only file system" in failures["run folder", "n2"]
    assert f"{image_folder}/train: No such file or directory" in failures["data", "n3"]
    assert failures["versions", "n3"].startswith("accelerate 0.")
    assert failures["product", "n2"].startswith("rank 1: ")
    assert {node for check, node in failures if check == "gpus"} == {"n1", "n2", "n3"}
    # No node has a finding for another node's fault, and the report names the node that was not measured.
    other_failures = [key for key in failures if key[0] != "gpus"]
    assert sorted(other_failures) == sorted(
        [("reach", "n2"), ("reach", "n3"), ("run folder", "n2"), ("data", "n3"), ("versions", "n3"), ("product", "n2")]
    )
    assert "not measured" in findings_of(report, "warning")["speed", "n3"]
    doctor_report(cluster, "--config", "digits", "--short", f"run.root={runs}", code=0)  # without the faults


def test_node_on_which_python_does_not_start_has_no_answer(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('SLURMD_NODENAME') == 'n3': os._exit(7)\n")
    arguments = ("--config", "digits", "--short", "--timeout-seconds=40")
    report = doctor_report(cluster, *arguments, code=1, PYTHONPATH=str(tmp_path))
    assert findings_of(report) == {("answer", "n3"): "no answer"}
