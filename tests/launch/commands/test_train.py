"""samecurve train: real ranks through torchrun, signals, restarts; what would fail is told before anything starts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from support.processes import REPOSITORY, SMALL, Done, last_step

from launch import forecast
from launch.hardware import Machine, visible_gpus
from launch.torchrun import choose_layout
from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.data.registry import count_training_images
from trainer.errors import DataError, WorldError

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]
LONG = [*SMALL, "train.epochs=1000", "log.every_steps=1", "train.threads_per_rank=1"]


def test_help_is_there_at_once_and_without_torch(launch: Callable[..., Done]) -> None:
    code = "import sys; from launch.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'omegaconf', 'rich'} & set(sys.modules)))"
    done = launch([sys.executable, "-c", code], PYTHONPATH=str(REPOSITORY))
    assert done.code == 0 and done.out.endswith("[]\n") and "submit" in done.out


def test_no_room_of_the_launcher_imports_torch(launch: Callable[..., Done]) -> None:
    paths = [path.relative_to(REPOSITORY).with_suffix("") for path in (REPOSITORY / "launch").rglob("*.py")]
    rooms = [".".join(path.parts) for path in paths if path.name != "__init__"]
    code = f"import importlib, sys\nfor room in {rooms}: importlib.import_module(room)\nprint('torch' in sys.modules)"
    done = launch([sys.executable, "-c", code], PYTHONPATH=str(REPOSITORY))
    assert done.out == "False\n", done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim.lrr=1"], "no setting 'optim.lrr'"),
        (["--rank", "2"], "'--rank' is neither an option nor a setting"),
        (["--ranks", "0"], "--ranks 0: wanted 1 or more"),
        (["--ranks", "65"], "gives 65 ranks less than one sample each"),
        (["--ranks", "3", "train.virtual_ranks=2"], "leaves some of 3 ranks without a shard"),
        (["train.device=cuda"], "this machine has no usable GPU"),
        (["data.name=image_folder", "data.root=nowhere"], "no folder nowhere/train"),
        (["data.global_batch_size=2000"], "is larger than the training set of 1433 images"),
    ],
)
def test_what_would_fail_is_told_in_one_line(words: list[str], told: str, launch: Callable[..., Done]) -> None:
    done = launch([*SAMECURVE, "train", "--config", "digits", *words], CUDA_VISIBLE_DEVICES="")
    assert done.code == 2 and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith("samecurve: ") and told in done.err


def test_ranks_are_one_a_gpu_or_one_on_the_cpu() -> None:
    config = forecast.load_settings(["digits"], [])
    assert str(choose_layout(config, Machine(8, 4), None)) == "4 gpu ranks"
    assert str(choose_layout(config, Machine(8, 4), 1)) == "1 gpu rank"
    assert str(choose_layout(config, Machine(8, 0), None)) == "1 cpu rank"
    on_cpu = forecast.load_settings(["digits"], ["train.device=cpu"])
    assert str(choose_layout(on_cpu, Machine(8, 4), 6)) == "6 cpu ranks"
    with pytest.raises(WorldError, match="--ranks 5 but 4 GPUs"):
        choose_layout(config, Machine(8, 4), 5)


def test_visible_gpus_are_counted_as_cuda_does() -> None:
    assert [visible_gpus(asked, 8) for asked in (None, "", "0,1", "2,-1,3", "7,8,0", "GPU-a,GPU-b")] == [
        8, 0, 2, 1, 1, 2,
    ]  # fmt: skip


def test_the_sizes_are_those_of_the_data(image_folder: Path) -> None:
    data = DataSettings(name="digits", image_size=8)
    assert count_training_images(data) == len(digits.load(data).train)
    folder = DataSettings(name="image_folder", root=str(image_folder), validation_fraction=0.25)
    assert count_training_images(folder) == 12 - 2 * 2
    with pytest.raises(DataError, match="no folder"):
        count_training_images(DataSettings(name="image_folder", root="nowhere"))


def test_the_forecast_is_what_the_trainer_does(launch: Callable[..., Done]) -> None:
    words = [*SMALL, "data.validation_fraction=0.1", "train.epochs=2", "schedule.warmup_epochs=0.5"]
    done = launch([*SAMECURVE, "train", *words, "--ranks", "3", "--dry-run"])
    assert "global batch   64 samples = 1 x 22 + 2 x 21" in done.out and not Path("runs").exists()
    done = launch([*SAMECURVE, "train", *words, "log.every_steps=1"])
    assert done.code == 0, done.err
    summary = json.loads(Path("runs/digits/summary.json").read_text())
    config = forecast.load_settings(["digits"], words[2:])
    facts = dict(forecast.facts(config, choose_layout(config, Machine(2, 0), None)))
    assert facts["steps"].endswith(f"{summary['steps']} in all (2 epochs)")
    first = json.loads(Path("runs/digits/metrics.jsonl").read_text().splitlines()[0])
    assert f"{first['lr']:.4g} at step 1," in facts["learning rate"]
    assert "finished at step" in facts["run folder"]


class Running:
    """A `samecurve train` under way."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [*SAMECURVE, "train", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.family: list[psutil.Process] = []
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)  # a pipe that is full would hold the run
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.append(line)

    def until_step(self, step: int) -> None:
        until = time.monotonic() + 150
        while last_step(Path("runs/digits")) < step:
            assert self.process.poll() is None and time.monotonic() < until, "".join(self._said)
            time.sleep(0.02)
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """Its exit code and all that it said, when no process of it is left."""
        code = self.process.wait(timeout=150)
        assert not psutil.wait_procs(self.family, timeout=60)[1]
        self._reader.join(timeout=60)
        return code, "".join(self._said)


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*words: str) -> Running:
        started.append(Running(*words))
        return started[-1]

    yield start
    for each in started:
        for process in [*each.family, psutil.Process(each.process.pid)] if each.process.poll() is None else each.family:
            if process.is_running():
                process.kill()
        each.process.wait()
        each._reader.join(timeout=60)
        each.process.stdout.close()


@pytest.mark.slow
def test_ctrl_c_stops_all_ranks_with_a_checkpoint(running: Callable[..., Running]) -> None:
    number = signal.SIGINT
    run = running(*LONG, "--ranks", "2")
    run.until_step(20)
    # A terminal sends Ctrl-C to the whole group; here the group is the launcher alone, for torchrun has its own.
    os.killpg(run.process.pid, number)
    code, text = run.end()
    assert code == 75, text
    status = json.loads(Path("runs/digits/status.json").read_text())
    assert status["state"] == "stopped" and status["reason"] == signal.Signals(number).name


@pytest.mark.slow
def test_a_killed_launcher_leaves_nobody_behind(running: Callable[..., Running]) -> None:
    run = running(*LONG, "--ranks", "2")
    run.until_step(20)
    run.process.kill()
    _, alive = psutil.wait_procs(run.family, timeout=90)
    assert not alive
    assert json.loads(Path("runs/digits/status.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_a_mistake_that_ranks_find_is_not_repeated(launch: Callable[..., Done]) -> None:
    # The loss is no number at once: known to the ranks alone, and no restart will change it.
    done = launch([*SAMECURVE, "train", *SMALL, "run.name=nan", "optim.lr=1e30", "--ranks", "2", "--max-restarts", "3"])
    assert done.code == 2 and done.err.count("not finite") >= 1, done.err
    assert done.out.count("training nan:") == 1
    assert done.err.strip().splitlines()[-1].startswith("samecurve: ")


@pytest.mark.slow
def test_a_killed_torchrun_leaves_nobody_behind(running: Callable[..., Running]) -> None:
    run = running(*LONG, "--ranks", "2")
    run.until_step(20)
    torchrun = next(process for process in run.family if "torch.distributed.run" in process.cmdline())
    torchrun.kill()
    code, text = run.end()
    assert code == 75 and "stopped by SIGTERM" in text, text  # by the launcher, to which its ranks fell
