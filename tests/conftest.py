"""What all tests share: a clean place to run in, real processes with a time limit, small real data."""

import contextlib
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch import main as launcher

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = str(REPOSITORY / "trainer" / "main.py")
# What `accelerate launch` is, by the Python that runs the tests.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
# A run as small as a run can be: real digits, no trackers of others.
SMALL = ["--config", "digits", "log.wandb=off", "log.tensorboard=false", "log.figures=false", "train.precision=fp32"]
# A run that is met in its middle has no end until then; its rates must not depend on its length.
ENDLESS = ["train.epochs=99999", "train.max_steps=99999"]


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


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


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


class Ranks:
    """Real ranks of one run, forked from a process that has imported everything: a start takes no six seconds."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["forked"])
        here = str(Path(__file__).parent)
        with pytest.MonkeyPatch.context() as patch:  # Python 3.11's server looks nowhere else, and says nothing
            patch.setenv("PYTHONPATH", here)
            multiprocessing.forkserver.ensure_running()
        self.processes: list[Any] = []
        self._launches = 0

    def start(self, size: int, *argv: str, plant: str = "tiny", **env: str) -> list[Any]:
        """The ranks' processes, under way."""
        import forked

        return self.call(size, forked.run_rank, list(argv), plant, **env)

    def call(self, size: int, work: Callable[..., object], *arguments: object, **env: str) -> list[Any]:
        """The same for `work(environment, log, *arguments)`, a function of a module."""
        self._launches += 1
        self.log = self._place / f"ranks-{self._launches}.log"
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        started = []
        for rank in range(size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (group if size > 1 else {})
            own = {"OMP_NUM_THREADS": "1"} if size == 1 else own
            given = (os.environ | own | env, str(self.log), *arguments)
            started.append(self._context.Process(target=work, args=given))
            started[-1].start()
        self.processes += started
        return started

    def until(self, what: str, ready: Callable[[], object], timeout_seconds: float = 150) -> None:
        """Waits until something is so."""
        until = time.monotonic() + timeout_seconds
        while not ready():
            if time.monotonic() > until:
                raise AssertionError(f"{what} was not seen\n{self.log.read_text()}")
            time.sleep(0.002)

    def until_step(self, folder: Path, step: int, timeout_seconds: float = 150) -> None:
        """Waits until a run has written a line of metrics of that step, or of a later one."""
        self.until(f"step {step}", lambda: last_step(folder) >= step, timeout_seconds)

    def end(self, started: list[Any], timeout_seconds: float = 180) -> list[int | None]:
        """Their exit codes; None for one that is still there after the time."""
        until = time.monotonic() + timeout_seconds
        for process in started:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in started]

    def run(self, size: int, *argv: str, plant: str = "tiny", code: int = 0, **env: str) -> str:
        """All of them to their end, with the exit code that is expected; what they printed."""
        codes = self.end(self.start(size, *argv, plant=plant, **env))
        text = self.log.read_text()
        assert codes == [code] * size, f"{codes}\n{text}"
        return text


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    for process in made.processes:
        if process.is_alive():
            process.kill()
        process.join()


class Samecurve:
    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self._capfd = capfd

    def __call__(self, *words: str, code: int = 0) -> tuple[str, str]:
        """What the command printed: to whoever reads on, and to the person."""
        self._capfd.readouterr()
        assert launcher.main(words) == code
        return self._capfd.readouterr()


@pytest.fixture
def samecurve(capfd: pytest.CaptureFixture[str]) -> Samecurve:
    """The command, in this process."""
    return Samecurve(capfd)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A W&B server for the real client, and a key for it."""
    import local_wandb

    if local_wandb.MISSING:
        pytest.skip(local_wandb.MISSING)
    made = local_wandb.Server(tmp_path / "server")
    monkeypatch.setenv("WANDB_BASE_URL", made.url)
    monkeypatch.setenv("WANDB_API_KEY", local_wandb.KEY)
    yield made
    made.end()


def last_step(folder: Path) -> int:
    """The last step that has a whole line of metrics, 0 if none has."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def tell(processes: list[Any], number: signal.Signals) -> None:
    """A signal for several ranks. All are halted first, so that none sees another's end before it has its own."""
    for sent in (signal.SIGSTOP, number, *([] if number == signal.SIGKILL else [signal.SIGCONT])):
        for process in processes:
            os.kill(process.pid, sent)


def finished_run(root: Path, *settings: str) -> Path:
    """A real run on real digits, by one thread, for all tests of a file."""
    command = [sys.executable, MAIN, *SMALL, "train.threads_per_rank=1", "run.name=x", f"run.root={root}", *settings]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return next(path.parent for path in root.rglob("summary.json"))


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """The command that starts `ranks` processes of a script on this machine, at a port of their own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]


_PORTS = itertools.count(os.getpid())


def free_port() -> int:
    """One of this worker of pytest, and none of those from 32768 on, which any connection may be given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 12000 + worker % 4 * 4000 + next(_PORTS) % 4000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
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
