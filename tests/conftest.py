"""What all tests share: a clean place to run in, real processes with a time limit, small real data."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.images import paint
from support.processes import Done, Ranks, Samecurve


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees this user's keys, settings or run folders, nor the process state an earlier test left."""
    for name in os.environ:
        if name.startswith(("WANDB_", "ACCELERATE_", "SLURM_", "SBATCH_", "SAMECURVE_")) or name in (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    yield
    if writers := sys.modules.get("tensorboard.summary.writer.event_file_writer"):
        writers._global_uid = writers.AtomicCounter(0)  # files of one second are in the order of their names, up to 9
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def launch() -> Iterator[Callable[..., Done]]:
    """Runs a command to its end; whatever of it still lives at the end of the test is ended by its process group."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], timeout_seconds: float = 240, **env: str) -> Done:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | env,
        )
        started.append(process)
        out, err = process.communicate(timeout=timeout_seconds)
        return Done(process.returncode, out, err)

    yield run
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    for process in made.processes:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def samecurve(capfd: pytest.CaptureFixture[str]) -> Samecurve:
    """The command, in this process."""
    return Samecurve(capfd)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A W&B server for the real client, and a key for it."""
    from support import local_wandb

    if local_wandb.MISSING:
        pytest.skip(local_wandb.MISSING)
    made = local_wandb.Server(tmp_path / "server")
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", local_wandb.KEY)
    yield made
    made.end()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, six and three images each."""
    root = tmp_path / "images"
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                paint(root / split / name / f"{index}.png", seed=100 * label + index)
    return root
