"""W&B when something is wrong: the real client against a server that fails, is lost, or was never there.

Each number of metrics.jsonl is in W&B exactly once, whatever happened, and nothing waits long.
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
from support.local_wandb import MISSING, Server, inspect, logged, summarize, sync, values
from support.processes import ENDLESS, MAIN, REPOSITORY, Ranks, last_step, tell

from trainer.config.load import load_config
from trainer.run.folder import RunFolder
from trainer.tracking.wandb import WandbTracker

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
# Seconds: 5 to decide, and the rest for a busy machine to open a run offline; W&B takes 100, or asks.
LONGEST_START = 45
SETTINGS = ["--config", "digits", "log.tensorboard=false", "log.report=false", "log.every_steps=5", "run.name=x"]
SETTINGS += ["data.global_batch_size=8", "train.max_steps=200", "train.threads_per_rank=1"]
FOLDER = Path("runs/x")


@pytest.fixture
def dripping() -> Iterator[str]:
    """The address of a server that begins to answer and never ends, so that no single wait for it is long."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def answer(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n")
                    while not over.wait(0.5):
                        connection.sendall(b"x-a: b\r\n")
                except OSError:
                    pass

        def listen() -> None:
            while not over.is_set():
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


def is_wrong(what: str, server: Server, dripping: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it so."""
    if what == "no key":
        monkeypatch.delenv("WANDB_API_KEY")
    elif what == "half a key":
        monkeypatch.setenv("WANDB_API_KEY", "f" * 20)
    elif what == "refused port":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # of discard: nobody listens
    elif what == "dripping":
        monkeypatch.setenv("WANDB_BASE_URL", dripping)
    elif what == "silent":
        server.fault(match="", hang_s=60)
    elif what == "no start":
        server.fault(op="UpsertBucket", status=500)
    else:
        server.fault(match="graphql", status=int(what))


WRONG = {
    "no key": "no API key: set WANDB_API_KEY or run `wandb login`",
    "half a key": "API key",
    "refused port": "Connection refused",
    "dripping": "no connection",
    "silent": "no connection",
    "401": "401",
    "500": "500",
    "no start": "500",
}


@pytest.mark.filterwarnings("ignore")  # wandb's own, of its imports
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what in ("silent", "no start") else what for what in WRONG]
)
def test_what_is_wrong_at_the_start_is_told_in_seconds(
    what: str, server: Server, dripping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # it reads its variables once a process
    is_wrong(what, server, dripping, monkeypatch)
    said: list[str] = []
    config, folder = load_config([], ["run.name=x", "log.wandb=auto"]), RunFolder(tmp_path / "x")
    began = time.monotonic()
    tracker = WandbTracker(config, folder, "abcd1234", said.append)
    assert time.monotonic() - began < LONGEST_START
    tracker.log("train", {"loss": 0.5}, 1)
    tracker.close()
    assert time.monotonic() - began < LONGEST_START
    (line,) = said
    assert line.startswith("W&B: offline (") and WRONG[what] in line and "wandb sync" in line
    (path,) = (tmp_path / "x" / "wandb").glob("offline-run-*")
    assert values(row["history"]["item"] for row in inspect(path) if row["type"] == "history") == {
        (1, "train/loss", 0.5): 1
    }


def test_online_that_was_asked_for_and_cannot_be_says_what_is_missing(server: Server, ranks: Ranks) -> None:
    asked = [*SETTINGS, "log.wandb=online"]
    began = time.monotonic()
    text = ranks.run(1, *asked, code=2, WANDB_API_KEY="")
    assert time.monotonic() - began < 90  # with all of a start
    assert "log.wandb=online: no API key: set WANDB_API_KEY or run `wandb login`" in text
    text = ranks.run(1, *asked, code=2, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "log.wandb=online: no connection to http://127.0.0.1:9" in text and "Traceback" not in text


def test_a_run_stopped_and_continued_on_other_ranks_is_one_run_with_each_row_once(server: Server, ranks: Ranks) -> None:
    asked = [*SETTINGS, "log.wandb=online"]
    started = ranks.start(2, *asked, *ENDLESS)
    ranks.until_step(FOLDER, 20)
    tell(started, signal.SIGTERM)
    assert ranks.end(started) == [75, 75], ranks.log.read_text()
    run = server.run()
    assert run["complete"] and run["exitcode"] == 0  # closed, not left as if it were running
    assert values(run["history"]) == logged(FOLDER) and max(logged(FOLDER).values()) == 1
    stopped_at = max(step for step, _, _ in logged(FOLDER))
    (FOLDER / "wandb" / "run-id").unlink()  # the checkpoint has it too
    ranks.run(1, *asked, *ENDLESS, f"train.max_steps={stopped_at + 50}")
    run = server.run()
    assert run["inserts"] == 1 and run["name"] == (FOLDER / "wandb" / "run-id").read_text()
    assert values(run["history"]) == logged(FOLDER) and max(logged(FOLDER).values()) == 1
    assert {step for step, _, _ in logged(FOLDER)} >= {stopped_at, stopped_at + 50}
    assert run["config_values"]["restarts"] == 1


@pytest.mark.slow
def test_a_branch_is_a_wandb_run_of_its_own(ranks: Ranks) -> None:
    asked = [*SETTINGS, "log.wandb=offline", "checkpoint.every_steps=100", "checkpoint.keep=9"]
    ranks.run(1, *asked)
    branched = ["run.name=branch", f"run.resume={FOLDER / 'checkpoints' / 'step-00000100'}"]
    ranks.run(1, *asked, *branched)
    branch = FOLDER.parent / "branch"
    (session,) = (branch / "wandb").glob("offline-run-*")
    assert summarize(session)["run_id"] != (FOLDER / "wandb" / "run-id").read_text()
    rows = [record["history"]["item"] for record in inspect(session) if record["type"] == "history"]
    assert values(rows) == logged(branch) and min(step for step, _, _ in logged(branch)) > 100


@pytest.mark.parametrize("is_stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_goes_on_without_wandbs_process(ranks: Ranks, is_stopped: bool) -> None:
    """A machine short of memory ends it, or a signal that all processes of a job are sent."""
    length = ENDLESS if is_stopped else ["train.max_steps=2000"]
    started = ranks.start(1, *SETTINGS, *length, "log.wandb=offline")
    ranks.until_step(FOLDER, 5)
    of_run = [child.pid for child in psutil.Process(started[0].pid).children() if "core" in child.name()]
    assert of_run, "W&B's process"
    for pid in of_run:
        os.kill(pid, signal.SIGKILL)
    if is_stopped:
        os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.end(started) == [75 if is_stopped else 0], ranks.log.read_text()
    assert ranks.log.read_text().count("W&B's process is gone") == 1
    assert json.loads((FOLDER / "status.json").read_text())["state"] == ("stopped" if is_stopped else "finished")


@pytest.mark.slow
def test_weights_that_are_refused_cost_nothing_but_themselves(server: Server, ranks: Ranks) -> None:
    server.fault(op="CreateArtifact", status=403)
    ranks.run(1, *SETTINGS, "log.wandb=online", "log.artifact=true")
    assert "weights are left out" in ranks.log.read_text()
    assert json.loads((FOLDER / "status.json").read_text())["state"] == "finished"


def test_a_server_that_is_lost_for_a_while_gets_each_row_once(server: Server, ranks: Ranks) -> None:
    started = ranks.start(1, *SETTINGS, *ENDLESS, "log.wandb=online")
    ranks.until_step(FOLDER, 20)
    server.fault(match="", drop=True, times=3)
    ranks.until("a request that is lost", lambda: any("fault" in request for request in server.ask("/_/requests")))
    os.kill(started[0].pid, signal.SIGTERM)
    assert ranks.end(started) == [75], ranks.log.read_text()
    assert values(server.run()["history"]) == logged(FOLDER) and max(logged(FOLDER).values()) == 1


@pytest.mark.slow
def test_a_server_that_is_lost_for_good_is_made_up_for_by_sync(server: Server, ranks: Ranks, tmp_path: Path) -> None:
    started = ranks.start(1, *SETTINGS, "log.wandb=online", "train.max_steps=1500")
    ranks.until_step(FOLDER, 20)
    server.end()
    began = time.monotonic()
    assert ranks.end(started) == [0], ranks.log.read_text()
    assert time.monotonic() - began < 120  # the steps that are left, and 15 s at the end
    text = ranks.log.read_text()
    assert "W&B: not all was uploaded within 15 s" in text and "--include-online --yes" in text
    again = Server(tmp_path / "again")
    sync(again, *(FOLDER / "wandb").glob("run-2*"))
    assert values(again.run()["history"]) == logged(FOLDER) and max(logged(FOLDER).values()) == 1
    again.end()


def test_an_offline_tracker_calls_nobody_when_its_process_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING")  # the tracker itself sees to that
    script = (
        "import pathlib\n"
        "from trainer.config.load import load_config\n"
        "from trainer.run.folder import RunFolder\n"
        "from trainer.tracking.wandb import WandbTracker\n"
        "asked = load_config([], ['run.name=x', 'log.wandb=offline'])\n"
        "tracker = WandbTracker(asked, RunFolder(pathlib.Path('x')), 'abcd1234', print)\n"
        "tracker.log('train', {'loss': 0.5}, 1)\n"
        "tracker.close()\n"
    )
    command = [sys.executable, "-c", script]
    subprocess.run(command, check=True, timeout=60, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})
    assert list(Path("x/wandb").glob("offline-run-*")) and server.ask("/_/requests") == []


@pytest.mark.slow
def test_offline_sessions_call_nobody_and_become_one_run_when_they_are_synced(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    command = [sys.executable, MAIN, *SETTINGS, "log.wandb=offline"]
    with subprocess.Popen([*command, *ENDLESS], stdout=subprocess.DEVNULL) as first:
        while first.poll() is None and not (FOLDER / "metrics.jsonl").is_file():
            time.sleep(0.02)
        first.terminate()
        assert first.wait(timeout=150) == 75
    length = [*ENDLESS, f"train.max_steps={last_step(FOLDER) + 40}"]
    subprocess.run([*command, *length], check=True, timeout=150, stdout=subprocess.DEVNULL)
    assert server.ask("/_/requests") == []  # no telemetry either
    sessions = sorted((FOLDER / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2
    records = [record for session in sessions for record in inspect(session)]
    assert values(record["history"]["item"] for record in records if record["type"] == "history") == logged(FOLDER)
    for session in sessions:
        about = summarize(session)
        assert about["state"] == "finished" and about["exit_code"] == 0
        assert about["run_id"] == (FOLDER / "wandb" / "run-id").read_text()
    sync(server, *sessions)
    run = server.run()
    assert values(run["history"]) == logged(FOLDER) and max(logged(FOLDER).values()) == 1
    assert [row["step"] for row in run["history"]] == sorted(row["step"] for row in run["history"])
    sync(server, *sessions)  # once more adds nothing
    assert values(server.run()["history"]) == logged(FOLDER)
