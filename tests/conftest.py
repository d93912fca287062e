"""What all tests share: a clean place to run in, real processes with a time limit, small real data."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = str(REPOSITORY / "trainer" / "main.py")
# What `accelerate launch` is, by the Python that runs the tests.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# A run as small as a run can be: real digits, no trackers of others.
SMALL = ["--config", "digits", "log.wandb=off", "log.tensorboard=false"]


@pytest.fixture(autouse=True)
def clean_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees this user's keys, settings or run folders, nor the process state an earlier test left."""
    for name in os.environ:
        if name.startswith(("WANDB_", "ACCELERATE_", "SLURM_")) or name in (
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
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def launch() -> Iterator[Callable[..., Done]]:
    """Runs a command to its end; whatever of it still lives at the end of the test is ended by its process group."""
    started: list[subprocess.Popen[str]] = []

    def run(command: list[str], timeout_seconds: float = 90, **env: str) -> Done:
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


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command that starts `ranks` processes of a script on this machine, at a port of their own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def paint(path: Path, seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> None:
    """A picture file of smooth colours, its format by its suffix."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and test/ of two classes, six and three images each."""
    root = tmp_path / "images"
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                paint(root / split / name / f"{index}.png", seed=100 * label + index)
    return root
