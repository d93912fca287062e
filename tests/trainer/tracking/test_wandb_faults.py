"""Tests W&B with the real client against a server that fails, disappears or never existed.

Every value of metrics.jsonl must be in W&B exactly once, and no start or end may wait long.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.local_wandb import (
    MISSING,
    Server,
    metrics_file_values,
    read_rows,
    read_summary,
    sync_sessions,
    wandb_values,
)
from support.processes import ENDLESS, MAIN, REPOSITORY, Ranks, last_step, signal_all

from trainer.config.load import load_config
from trainer.run.folder import RunFolder
from trainer.tracking.wandb import WandbTracker

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
# 5 s to choose the mode; the rest is for a busy machine that opens a run offline. W&B alone takes 100 s or asks.
MAX_START_SECONDS = 45
SETTINGS = ["--config", "digits", "log.tensorboard=false", "log.report=false", "log.every_steps=5", "run.name=x"]
SETTINGS += ["data.global_batch_size=8", "train.max_steps=200", "train.threads_per_rank=1"]
FOLDER = Path("runs/x")


def assert_values_once(history: list[dict[str, object]], folder: Path = FOLDER) -> None:
    """Asserts that W&B has every value of metrics.jsonl once, and no other value."""
    expected = metrics_file_values(folder)
    assert wandb_values(history) == expected and max(expected.values()) == 1


@pytest.fixture
def endless_answer_url() -> Iterator[str]:
    """URL of a server whose answer begins at once and never ends, so that no read timeout applies."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        is_stopped = threading.Event()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    while not is_stopped.wait(0.5):
                        connection.sendall(b"x-a: b\r\n")
                except OSError:
                    pass

        def listen() -> None:
            while not is_stopped.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        is_stopped.set()
        listener.shutdown(socket.SHUT_RDWR)


def inject_start_problem(
    problem: str, server: Server, endless_answer_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if problem == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif problem == "short key":
        monkeypatch.setenv("WANDB_API_KEY", "f" * 20)
    elif problem == "refused port":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: no process listens
    elif problem == "endless answer":
        monkeypatch.setenv("WANDB_BASE_URL", endless_answer_url)
    elif problem == "no answer":
        server.inject_fault(match="", hang_s=60)
    elif problem == "run not created":
        server.inject_fault(op="UpsertBucket", status=500)
    else:
        server.inject_fault(match="graphql", status=int(problem))


# Each problem, and the text that must be in the printed line.
START_PROBLEMS = {
    "no key": "no API key: set WANDB_API_KEY or run `wandb login`",
    "short key": "API key",
    "refused port": "Connection refused",
    "endless answer": "no connection",
    "no answer": "no connection",
    "401": "401",
    "500": "500",
    "run not created": "500",
}
SLOW_START_PROBLEMS = ("no answer", "run not created")


@pytest.mark.filterwarnings("ignore")  # warnings of wandb's imports
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(problem, marks=pytest.mark.slow) if problem in SLOW_START_PROBLEMS else problem
        for problem in START_PROBLEMS
    ],
)
def test_auto_mode_with_a_start_problem_logs_offline_within_seconds(
    problem: str, server: Server, endless_answer_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # wandb reads its environment variables once a process
    inject_start_problem(problem, server, endless_answer_url, monkeypatch)
    lines: list[str] = []
    config, folder = load_config([], ["run.name=x", "log.wandb=auto"]), RunFolder(tmp_path / "x")
    start = time.monotonic()
    tracker = WandbTracker(config, folder, "abcd1234", lines.append)
    assert time.monotonic() - start < MAX_START_SECONDS
    tracker.log("train", {"loss": 0.5}, 1)
    tracker.close()
    assert time.monotonic() - start < MAX_START_SECONDS
    (line,) = lines
    assert line.startswith("W&B: offline (") and START_PROBLEMS[problem] in line and "wandb sync" in line
    (session,) = (tmp_path / "x" / "wandb").glob("offline-run-*")
    assert wandb_values(read_rows(session)) == {(1, "train/loss", 0.5): 1}


def test_online_mode_without_key_or_network_is_refused(server: Server, ranks: Ranks) -> None:
    settings = [*SETTINGS, "log.wandb=online"]
    start = time.monotonic()
    text = ranks.run(1, *settings, code=2, WANDB_API_KEY="")
    assert time.monotonic() - start < 90  # includes all imports
    assert "log.wandb=online: no API key: set WANDB_API_KEY or run `wandb login`" in text
    text = ranks.run(1, *settings, code=2, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "log.wandb=online: no connection to http://127.0.0.1:9" in text and "Traceback" not in text


@pytest.mark.slow
def test_resume_on_another_world_size_continues_the_same_wandb_run(server: Server, ranks: Ranks) -> None:
    settings = [*SETTINGS, "log.wandb=online"]
    processes = ranks.start(2, *settings, *ENDLESS)
    ranks.wait_for_step(FOLDER, 20)
    signal_all(processes, signal.SIGTERM)
    assert ranks.join(processes) == [75, 75], ranks.log.read_text()
    run = server.only_run()
    assert run["complete"] and run["exitcode"] == 0, "the stopped session is closed"
    assert_values_once(run["history"])
    last_step_before_stop = max(step for step, _, _ in metrics_file_values(FOLDER))
    (FOLDER / "wandb" / "run-id").unlink()  # the checkpoint has the id too
    ranks.run(1, *settings, *ENDLESS, f"train.max_steps={last_step_before_stop + 50}")
    run = server.only_run()
    assert run["inserts"] == 1 and run["name"] == (FOLDER / "wandb" / "run-id").read_text()
    assert_values_once(run["history"])
    steps = {step for step, _, _ in metrics_file_values(FOLDER)}
    assert steps >= {last_step_before_stop, last_step_before_stop + 50}
    assert run["config_values"]["restarts"] == 1


@pytest.mark.slow
def test_run_branched_from_a_checkpoint_is_a_new_wandb_run(ranks: Ranks) -> None:
    settings = [*SETTINGS, "log.wandb=offline", "checkpoint.every_steps=100", "checkpoint.keep=9"]
    ranks.run(1, *settings)
    ranks.run(1, *settings, "run.name=branch", f"run.resume={FOLDER / 'checkpoints' / 'step-00000100'}")
    branch = FOLDER.parent / "branch"
    (session,) = (branch / "wandb").glob("offline-run-*")
    assert read_summary(session)["run_id"] != (FOLDER / "wandb" / "run-id").read_text()
    assert_values_once(read_rows(session), branch)
    assert min(step for step, _, _ in metrics_file_values(branch)) > 100


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_training_continues_after_the_wandb_process_is_killed(ranks: Ranks, is_stopped: bool) -> None:
    """The kernel kills W&B's process if memory is short, and a launcher may signal all processes of a job."""
    length = ENDLESS if is_stopped else ["train.max_steps=2000"]
    processes = ranks.start(1, *SETTINGS, *length, "log.wandb=offline")
    ranks.wait_for_step(FOLDER, 5)
    children = psutil.Process(processes[0].pid).children()
    wandb_processes = [child.pid for child in children if "core" in child.name()]
    assert wandb_processes
    for process_id in wandb_processes:
        os.kill(process_id, signal.SIGKILL)
    if is_stopped:
        os.kill(processes[0].pid, signal.SIGTERM)
    assert ranks.join(processes) == [75 if is_stopped else 0], ranks.log.read_text()
    assert ranks.log.read_text().count("this session logs no more to W&B") == 1
    assert json.loads((FOLDER / "status.json").read_text())["state"] == ("stopped" if is_stopped else "finished")


@pytest.mark.slow
def test_refused_weights_upload_does_not_fail_the_run(server: Server, ranks: Ranks) -> None:
    server.inject_fault(op="CreateArtifact", status=403)
    ranks.run(1, *SETTINGS, "log.wandb=online", "log.artifact=true")
    assert "weights are left out" in ranks.log.read_text()
    assert json.loads((FOLDER / "status.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_server_outage_during_a_run_loses_and_repeats_no_row(server: Server, ranks: Ranks) -> None:
    processes = ranks.start(1, *SETTINGS, *ENDLESS, "log.wandb=online")
    ranks.wait_for_step(FOLDER, 20)
    server.inject_fault(match="", drop=True, times=3)
    ranks.wait_until("a dropped request", lambda: any("fault" in request for request in server.request("/_/requests")))
    os.kill(processes[0].pid, signal.SIGTERM)
    assert ranks.join(processes) == [75], ranks.log.read_text()
    assert_values_once(server.only_run()["history"])


@pytest.mark.slow
def test_sync_uploads_all_rows_after_a_permanent_server_outage(server: Server, ranks: Ranks, tmp_path: Path) -> None:
    processes = ranks.start(1, *SETTINGS, "log.wandb=online", "train.max_steps=1500")
    ranks.wait_for_step(FOLDER, 20)
    server.stop()
    start = time.monotonic()
    assert ranks.join(processes) == [0], ranks.log.read_text()
    assert time.monotonic() - start < 120  # the remaining steps, and 15 s at the end
    text = ranks.log.read_text()
    assert "W&B: not all was uploaded within 15 s" in text and "--include-online --yes" in text
    new_server = Server(tmp_path / "new-server")
    sync_sessions(new_server, *(FOLDER / "wandb").glob("run-2*"))
    assert_values_once(new_server.only_run()["history"])
    new_server.stop()


def test_offline_tracker_sends_no_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING")  # the tracker must set it
    script = (
        "import pathlib\n"
        "from trainer.config.load import load_config\n"
        "from trainer.run.folder import RunFolder\n"
        "from trainer.tracking.wandb import WandbTracker\n"
        "config = load_config([], ['run.name=x', 'log.wandb=offline'])\n"
        "tracker = WandbTracker(config, RunFolder(pathlib.Path('x')), 'abcd1234', print)\n"
        "tracker.log('train', {'loss': 0.5}, 1)\n"
        "tracker.close()\n"
    )
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert list(Path("x/wandb").glob("offline-run-*")) and server.request("/_/requests") == []


@pytest.mark.slow
def test_offline_sessions_send_no_request_and_sync_to_one_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    command = [sys.executable, MAIN, *SETTINGS, "log.wandb=offline"]
    with subprocess.Popen([*command, *ENDLESS], stdout=subprocess.DEVNULL) as first_session:
        while first_session.poll() is None and not (FOLDER / "metrics.jsonl").is_file():
            time.sleep(0.02)
        first_session.terminate()
        assert first_session.wait(timeout=150) == 75
    length = [*ENDLESS, f"train.max_steps={last_step(FOLDER) + 40}"]
    subprocess.run([*command, *length], check=True, timeout=150, stdout=subprocess.DEVNULL)
    assert server.request("/_/requests") == [], "no telemetry either"
    sessions = sorted((FOLDER / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    assert_values_once([row for session in sessions for row in read_rows(session)])
    for session in sessions:
        summary = read_summary(session)
        assert summary["state"] == "finished" and summary["exit_code"] == 0
        assert summary["run_id"] == (FOLDER / "wandb" / "run-id").read_text()
    sync_sessions(server, *sessions)
    history = server.only_run()["history"]
    assert_values_once(history)
    assert [row["step"] for row in history] == sorted(row["step"] for row in history)
    sync_sessions(server, *sessions)
    assert_values_once(server.only_run()["history"])
