"""samecurve doctor as a command: on this machine, and among the ranks of torchrun."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import REPOSITORY, CommandResult, free_port, torchrun

DOCTOR = [str(REPOSITORY / "launch" / "main.py"), "doctor"]
Launch = Callable[..., CommandResult]


def test_doctor_reports_missing_wandb_access_and_missing_data(launch: Launch, image_folder: Path) -> None:
    settings = ["--config", "image_folder", f"data.root={image_folder}", "log.wandb=online", "--short", "--json"]
    result = launch([sys.executable, *DOCTOR, *settings], WANDB_API_KEY="a-secret", WANDB_BASE_URL="http://127.0.0.1:9")
    report = json.loads(result.out)
    failures = {entry["check"]: entry for entry in report["findings"] if entry["state"] == "fail"}
    assert result.code == 1 and set(failures) == {"wandb"} and failures["wandb"]["node"] == os.uname().nodename
    assert "a-secret" not in result.out + result.err
    (image_folder / "train").rename(image_folder / "training")
    result = launch([sys.executable, *DOCTOR, *settings[:3], "--short", "log.wandb=off"])
    assert result.code == 1 and "FAIL     data" in result.out and "train: No such file or directory" in result.out
    assert list(Path.cwd().glob("runs*")) == []  # nothing remains


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--ranks=0", "--ranks 0: expected 1 or more"),
        ("--timeout-seconds=1", "--timeout-seconds 1: expected 5 or more"),
        ("train.epoch=3", "did you mean"),
    ],
)
def test_doctor_refuses_invalid_options_in_one_line(launch: Launch, argument: str, message: str) -> None:
    result = launch([sys.executable, *DOCTOR, argument])
    assert result.code == 2 and message in result.err and result.err.count("\n") == 1, result.err


COMPLETE_SET = {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("left_over", [{"RANK": "9"}, {"RANK": "1", "MASTER_PORT": "29500", **COMPLETE_SET}])
def test_left_over_variables_of_torchrun_give_a_warning(launch: Launch, left_over: dict[str, str]) -> None:
    arguments = ["--config", "digits", "--short", "--json", "log.wandb=off"]
    result = launch([sys.executable, *DOCTOR, *arguments], timeout_seconds=60, **left_over)
    assert result.code == 0 and result.err == "", result
    (finding,) = (entry for entry in json.loads(result.out)["findings"] if entry["check"] == "launcher")
    assert finding["state"] == "warning" and "RANK" in finding["got"], finding


@pytest.mark.slow
def test_rank_0_reports_for_two_torchrun_machines(launch: Launch) -> None:
    """Two launchers on this machine's loopback with two ranks each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
    command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    arguments = ["--config", "digits", "--json", "--timeout-seconds=180"]
    results: dict[int, CommandResult] = {}

    def start(node: int) -> None:
        results[node] = launch([*command, f"--node_rank={node}", *DOCTOR, *arguments])

    threads = [threading.Thread(target=start, args=(node,)) for node in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=250)
    assert results[1].out == "", results
    report = json.loads(results[0].out.splitlines()[0])
    failed_checks = {entry["check"] for entry in report["findings"] if entry["state"] == "fail"}
    assert failed_checks <= {"product"}, report  # one of four ranks on two cores may be slow
    assert results[0].code == bool(failed_checks) and (failed_checks or results[1].code == 0), results
    name = os.uname().nodename
    assert report["nodes"] == [f"{name}#0", f"{name}#1"] and report["ranks_per_node"] == 2
    products = [entry for entry in report["findings"] if entry["check"] == "product"]
    assert [entry["got"].partition(":")[0] for entry in products] == ["rank 0", "rank 1", "rank 2", "rank 3"]


@pytest.mark.slow
def test_rank_that_hangs_is_reported_within_the_time_limit(launch: Launch, tmp_path: Path) -> None:
    """Rank 1 stops before its first output, as if its GPU did not answer."""
    hook = "import os, signal, sys\n"
    hook += "if os.environ.get('RANK') == '1' and 'probe.py' in ' '.join(sys.orig_argv):\n"
    (tmp_path / "sitecustomize.py").write_text(f"{hook}    os.kill(os.getpid(), signal.SIGSTOP)\n")
    arguments = [*DOCTOR, "--config", "digits", "--json", "--timeout-seconds=30"]
    result = launch(torchrun(2, *arguments), PYTHONPATH=str(tmp_path))
    report = json.loads(result.out.splitlines()[0])
    failures = [(entry["check"], entry["got"]) for entry in report["findings"] if entry["state"] == "fail"]
    assert result.code == 1 and report["seconds"] < 60
    assert failures == [("ranks", "rank 1 hung before its first output and was killed")]
