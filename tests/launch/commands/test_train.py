"""Tests samecurve train: checks before the start, the forecast, signals and restarts with real ranks."""

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
from support.processes import REPOSITORY, SMALL, CommandResult, Samecurve, last_step

from launch import forecast
from launch import main as launcher
from launch.hardware import Machine, visible_gpus
from launch.torchrun import choose_layout
from trainer.config.schema import DataSettings
from trainer.data import digits
from trainer.data.image_counts import count_training_images
from trainer.errors import DataError, WorldError

SAMECURVE = [sys.executable, str(REPOSITORY / "launch" / "main.py")]
LONG = [*SMALL, "train.epochs=1000", "log.every_steps=1", "train.threads_per_rank=1"]


def test_help_imports_neither_torch_nor_omegaconf_nor_rich(launch: Callable[..., CommandResult]) -> None:
    program = "import sys; from launch.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "print(sorted({'torch', 'omegaconf', 'rich'} & set(sys.modules)))"
    result = launch([sys.executable, "-c", program], PYTHONPATH=str(REPOSITORY))
    assert result.code == 0 and result.out.endswith("[]\n") and "submit" in result.out


def test_no_launch_module_imports_torch(launch: Callable[..., CommandResult]) -> None:
    paths = [path.relative_to(REPOSITORY).with_suffix("") for path in (REPOSITORY / "launch").rglob("*.py")]
    modules = {".".join(path.parts) for path in paths if path.name != "__init__"}
    modules.remove("launch.doctor.node.probe")  # a script that runs as a rank, in its own process
    program = f"import importlib, sys\nfor module in {sorted(modules)}: importlib.import_module(module)\n"
    program += "print('torch' in sys.modules)"
    result = launch([sys.executable, "-c", program], PYTHONPATH=str(REPOSITORY))
    assert result.out == "False\n", result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "no setting 'optim.lrr'"),
        (["--rank", "2"], "'--rank' is neither an option nor a setting"),
        (["--ranks", "0"], "--ranks 0: expected 1 or more"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected 0 or more"),
        (["--ranks", "65"], "has less than one sample for each of 65 ranks"),
        (["--ranks", "3", "train.virtual_ranks=2"], "has less than one shard for each of 3 ranks"),
        (["train.device=cuda"], "this machine has no usable GPU"),
        (["data.name=image_folder", "data.root=nowhere"], "no folder nowhere/train"),
        (["data.global_batch_size=2000"], "is larger than the training set of 1433 images"),
        (["model.name=vgg16", "model.pretrained=nowhere.pth"], "no file nowhere.pth"),
    ],
)
def test_invalid_arguments_are_refused_with_one_line(
    words: list[str], message: str, launch: Callable[..., CommandResult]
) -> None:
    # A dry run starts no rank, so that the launcher must find the error itself.
    result = launch([*SAMECURVE, "train", "--config", "digits", "--dry-run", *words], CUDA_VISIBLE_DEVICES="")
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith("samecurve: ") and message in result.err


def test_command_without_settings_refuses_a_setting(samecurve: Samecurve) -> None:
    _, error = samecurve("status", "x", "optim.lr=1", code=2)
    assert error.startswith("samecurve: 'optim.lr=1' is not an option of this command")


def test_default_is_one_rank_per_gpu_or_one_cpu_rank() -> None:
    config = forecast.load_settings(["digits"], [])
    assert str(choose_layout(config, Machine(8, 4), None)) == "4 gpu ranks"
    assert str(choose_layout(config, Machine(8, 4), 1)) == "1 gpu rank"
    assert str(choose_layout(config, Machine(8, 0), None)) == "1 cpu rank"
    cpu_config = forecast.load_settings(["digits"], ["train.device=cpu"])
    assert str(choose_layout(cpu_config, Machine(8, 4), 6)) == "6 cpu ranks"
    with pytest.raises(WorldError, match="--ranks 5: expected one GPU per rank, but the machine has 4 GPUs"):
        choose_layout(config, Machine(8, 4), 5)


@pytest.mark.parametrize(
    ("visible_devices", "count"), [(None, 8), ("", 0), ("0,1", 2), ("2,-1,3", 1), ("7,8,0", 1), ("GPU-a,GPU-b", 2)]
)
def test_visible_gpus_are_counted_as_cuda_does(visible_devices: str | None, count: int) -> None:
    assert visible_gpus(visible_devices, installed=8) == count


def test_training_images_are_counted_without_held_out_ones(image_folder: Path) -> None:
    data = DataSettings(name="digits", image_size=8)
    assert count_training_images(data) == len(digits.load(data).train)
    folder_data = DataSettings(name="image_folder", root=str(image_folder), validation_fraction=0.25)
    assert count_training_images(folder_data) == 12 - 2 * 2
    with pytest.raises(DataError, match="no folder"):
        count_training_images(DataSettings(name="image_folder", root="nowhere"))


def test_forecast_matches_the_training(launch: Callable[..., CommandResult]) -> None:
    words = [*SMALL, "data.validation_fraction=0.1", "train.epochs=2", "schedule.warmup_epochs=0.5"]
    dry_run = launch([*SAMECURVE, "train", *words, "--ranks", "3", "--dry-run"])
    assert "global batch   64 samples = 1 x 22 + 2 x 21" in dry_run.out and not Path("runs").exists()
    result = launch([*SAMECURVE, "train", *words, "log.every_steps=1"])
    assert result.code == 0, result.err
    summary = json.loads(Path("runs/digits/summary.json").read_text())
    config = forecast.load_settings(["digits"], words[2:])
    facts = dict(forecast.describe_run(config, choose_layout(config, Machine(2, 0), None)))
    assert facts["steps"].endswith(f"{summary['steps']} in total (2 epochs)")
    first_row = json.loads(Path("runs/digits/metrics.jsonl").read_text().splitlines()[0])
    assert f"{first_row['lr']:.4g} at step 1," in facts["learning rate"]
    assert "not trained again" in facts["run folder"]
    longer = forecast.load_settings(["digits"], [*words[2:], "train.epochs=3"])
    facts = dict(forecast.describe_run(longer, choose_layout(longer, Machine(2, 0), None)))
    assert f"finished at step {summary['steps']}; continues to step" in facts["run folder"]


class TrainingProcess:
    """A running `samecurve train` and its descendants."""

    def __init__(self, *words: str) -> None:
        self.launcher = subprocess.Popen(
            [*SAMECURVE, "train", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self.descendants: list[psutil.Process] = []
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)  # a full pipe would block the run
        self._reader.start()

    def _read(self) -> None:
        assert self.launcher.stdout is not None
        for line in self.launcher.stdout:
            self._lines.append(line)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 150
        while last_step(Path("runs/digits")) < step:
            assert self.launcher.poll() is None and time.monotonic() < deadline, "".join(self._lines)
            time.sleep(0.02)
        self.descendants = psutil.Process(self.launcher.pid).children(recursive=True)

    def wait(self) -> tuple[int, str]:
        """Waits until the launcher and all descendants have ended; returns the exit code and the output."""
        code = self.launcher.wait(timeout=150)
        assert not psutil.wait_procs(self.descendants, timeout=60)[1]
        self._reader.join(timeout=60)
        return code, "".join(self._lines)

    def kill(self) -> None:
        """Kills what still runs and closes the pipe."""
        launchers = [psutil.Process(self.launcher.pid)] if self.launcher.poll() is None else []
        for process in [*self.descendants, *launchers]:
            if process.is_running():
                process.kill()
        self.launcher.wait()
        self._reader.join(timeout=60)
        assert self.launcher.stdout is not None
        self.launcher.stdout.close()


@pytest.fixture
def start_training() -> Iterator[Callable[..., TrainingProcess]]:
    trainings: list[TrainingProcess] = []

    def start(*words: str) -> TrainingProcess:
        trainings.append(TrainingProcess(*words))
        return trainings[-1]

    yield start
    for training in trainings:
        training.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_stops_all_ranks_with_a_checkpoint(
    start_training: Callable[..., TrainingProcess], number: signal.Signals
) -> None:
    training = start_training(*LONG, "--ranks", "2")
    training.wait_for_step(20)
    # A terminal sends Ctrl-C to the foreground process group. That is the launcher alone: torchrun has its own group.
    os.killpg(training.launcher.pid, number)
    code, output = training.wait()
    assert code == 75, output
    status = json.loads(Path("runs/digits/status.json").read_text())
    assert status["state"] == "stopped" and status["reason"] == number.name


@pytest.mark.slow
def test_killed_launcher_leaves_no_process_and_a_checkpoint(start_training: Callable[..., TrainingProcess]) -> None:
    training = start_training(*LONG, "--ranks", "2")
    training.wait_for_step(20)
    training.launcher.kill()
    _, alive = psutil.wait_procs(training.descendants, timeout=90)
    assert not alive
    assert json.loads(Path("runs/digits/status.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_killed_torchrun_leaves_no_process_and_a_checkpoint(start_training: Callable[..., TrainingProcess]) -> None:
    training = start_training(*LONG, "--ranks", "2")
    training.wait_for_step(20)
    torchrun = next(
        process
        for process in training.descendants
        if any(word.endswith("launch/elastic.py") for word in process.cmdline())
    )
    torchrun.kill()
    code, output = training.wait()
    # The ranks became children of the launcher, which terminated them.
    assert code == 75 and "stopped by the end of the launcher" in output, output


@pytest.mark.slow
def test_user_error_of_the_ranks_is_not_restarted(launch: Callable[..., CommandResult]) -> None:
    # The loss is not finite at the first step. Only the ranks can find that, and a restart does not help.
    settings = [*SMALL, "run.name=nan", "optim.lr=1e30"]
    result = launch([*SAMECURVE, "train", *settings, "--ranks", "2", "--max-restarts", "3"])
    assert result.code == 2 and result.err.count("not finite") >= 1, result.err
    assert result.out.count("training nan:") == 1
    assert result.err.strip().splitlines()[-1].startswith("samecurve: ")


def test_train_help_lists_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        launcher.main(["train", "--help"])
    out = capsys.readouterr().out
    assert exit_info.value.code == 0 and "train.threads_per_rank=auto" in out and "--dry-run" in out
    assert "%%" not in out and "up to 2 % of the run time" in out


def test_unknown_command_is_refused_without_hidden_ones(samecurve: Samecurve) -> None:
    _, err = samecurve("trian", code=2)
    assert "did you mean 'train'?" in err and "batch" not in err and "node" not in err and err.count("\n") == 1
