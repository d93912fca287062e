"""Fixtures for all tests: an isolated environment, real processes with a time limit, small real data."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.images import write_image
from support.processes import REPOSITORY, CommandResult, Ranks, Samecurve

# Variables of trackers, launchers and schedulers that would change what a test sees.
HIDDEN_PREFIXES = (
    "WANDB_", "ACCELERATE_", "SLURM_", "SBATCH_", "SAMECURVE_", "TORCHELASTIC_", "PET_", "OMPI_", "PMI_", "MPI_",
)  # fmt: skip
HIDDEN_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NETRC"}
# These fixtures start processes; a test that uses one is marked `processes`.
PROCESS_FIXTURES = {
    "launch", "ranks", "server", "cluster", "finished", "run", "tensorboard", "launchers", "start_machine",
    "start_training",
}  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Hides the machine's GPUs, unless tests marked `gpu` are selected, and tests this checkout in every process."""
    if "gpu" not in config.getoption("markexpr").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PROCESS_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.processes)


@pytest.fixture(autouse=True)
def isolated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hides the user's keys, settings and run folders from the test, and resets state that an earlier test left."""
    for name in os.environ:
        if name.startswith(HIDDEN_PREFIXES) or name in HIDDEN_VARIABLES:
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    yield
    if writers := sys.modules.get("tensorboard.summary.writer.event_file_writer"):
        # Event files of the same second sort by this number as text, so 10 would come before 9. Only this private name
        # resets it.
        writers._global_uid = writers.AtomicCounter(0)
    if packs := sys.modules.get("trainer.data.images.pack"):
        packs.release_packs()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # as Accelerate's own tests do; no public way exists


@pytest.fixture
def launch() -> Iterator[Callable[..., CommandResult]]:
    """Runs a command to its end. At the end of the test, kills what is left of its process group."""
    processes: list[subprocess.Popen[str]] = []

    def run(command: list[str], timeout_seconds: float = 240, **env: str) -> CommandResult:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | env,
        )
        processes.append(process)
        out, err = process.communicate(timeout=timeout_seconds)
        return CommandResult(process.returncode, out, err)

    yield run
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    """Starts ranks as forked processes. At the end of the test, kills those that still run."""
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture
def samecurve(capfd: pytest.CaptureFixture[str]) -> Samecurve:
    """Runs samecurve commands in this process."""
    return Samecurve(capfd)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts a local W&B server, and sets its URL and an API key for the real client."""
    from support import local_wandb

    if local_wandb.MISSING:
        pytest.skip(local_wandb.MISSING)
    server = local_wandb.Server(tmp_path / "server")
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", local_wandb.API_KEY)
    yield server
    server.stop()


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Returns a data folder with two classes: six training and three test images per class."""
    root = tmp_path / "images"
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                write_image(root / split / name / f"{index}.png", seed=100 * label + index)
    return root
