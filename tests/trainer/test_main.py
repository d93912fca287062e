"""trainer/main.py as a whole: the files of a run, resuming, refused input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from support.images import write_image
from support.processes import MAIN, REPOSITORY, SMALL
from support.workers.tiny import tiny

from launch.verify import compare
from launch.verify.compare import read_curves
from trainer import main
from trainer.config.plugins import MODELS
from trainer.config.schema import ModelSettings
from trainer.models.lookup import build_model
from trainer.run import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate")


def run(*arguments: str) -> int:
    return main.main([*SMALL, "train.max_steps=6", "log.every_steps=2", *arguments])


def test_run_writes_every_file_of_the_run_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("log.tensorboard=true", "eval.every_epochs=0", "checkpoint.every_steps=4") == 0
    folder = tmp_path / "runs" / "digits"
    out = capfd.readouterr().out
    assert "test set, by class" in out and "precision" in out and "runs/digits" in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["split"], row["step"]) for row in rows] == [("train", 2), ("train", 4), ("train", 6), ("test", 6)]
    assert {"epoch", "samples", "seconds", "loss", "lr", "accuracy", "samples_per_second"} <= set(rows[0])
    assert rows[1]["samples"] == 256 and rows[0]["lr"] < rows[2]["lr"] <= 0.05
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["steps"] == 6 and summary["world_size"] == 1
    test = summary["test"]
    assert sum(map(sum, test["confusion"])) == test["num_samples"] == 364 and len(test["classes"]) == 10
    assert set(test["classes"][0]) == {"name", "precision", "recall", "f1", "support"}
    assert summary["best"] == {"step": 6, "accuracy": test["accuracy"], "split": "test"}
    assert json.loads((folder / "status.json").read_text()) == {"state": "finished", "step": 6, "reason": ""}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_steps"] == 6
    assert list((folder / "tensorboard").glob("events*")) and (folder / "environment.json").is_file()


def test_final_weights_have_metadata_to_rebuild_the_network(tmp_path: Path) -> None:
    assert run() == 0
    path = tmp_path / "runs" / "digits" / "model.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["samecurve"])
    net = build_model(ModelSettings(**about["model"]), len(about["classes"]), about["channels"], about["image_size"])
    net.load_state_dict(load_file(path))
    assert len(about["normalization"]["mean"]) == 1


def rows_in(folder: Path) -> list[dict[str, float]]:
    return compare.read_rows(folder)


@pytest.fixture
def norm_and_dropout_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces LeNet by a network with BatchNorm and dropout."""
    monkeypatch.setitem(MODELS, "lenet", "support.workers.tiny:tiny")


@pytest.mark.usefixtures("norm_and_dropout_network")
def test_evaluation_uses_running_statistics_and_no_dropout(tmp_path: Path) -> None:
    assert run("data.normalize=half") == 0
    net = tiny(None, 10, 1, 32).eval()
    net.load_state_dict(load_file(tmp_path / "runs" / "digits" / "model.safetensors"))
    from trainer.config.schema import DataSettings
    from trainer.data import digits

    test = digits.load(DataSettings(name="digits")).test
    logits = net((torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for label, predicted in zip(test.labels, logits.argmax(1), strict=True):
        confusion[label, predicted] += 1
    summary = json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())
    assert summary["test"]["confusion"] == confusion.tolist()


@pytest.mark.usefixtures("norm_and_dropout_network")
def test_run_killed_in_mid_epoch_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [
        "data.augment=[flip,crop,cutout]",
        "checkpoint.every_steps=5",
        "train.max_steps=30",
        "log.every_steps=3",
    ]
    assert run(*settings, "run.name=whole") == 0

    from trainer.step import Step

    take_step = Step.__call__

    def fail_at_step_28(self: Step, shards: object, step: int, *arguments: int) -> torch.Tensor:
        if step == 28:  # of 30; the checkpoint before it is that of step 25, two steps after an epoch's end
            raise RuntimeError("killed")
        return take_step(self, shards, step, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Step, "__call__", fail_at_step_28)
        run(*settings, "run.name=broken")
    broken = tmp_path / "runs" / "broken"
    assert json.loads((broken / "status.json").read_text()) == {
        "state": "failed", "step": 28, "reason": "RuntimeError: killed"
    }  # fmt: skip
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert run(*settings, "run.name=broken") == 0
    whole = tmp_path / "runs" / "whole"
    first, second = load_file(whole / "model.safetensors"), load_file(broken / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert rows_in(whole) == rows_in(broken)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorBoard's reader
def test_run_killed_before_its_results_writes_them_once(tmp_path: Path) -> None:
    assert run("log.tensorboard=true") == 0
    folder = tmp_path / "runs" / "digits"
    summary, rows = json.loads((folder / "summary.json").read_text()), rows_in(folder)
    (folder / "summary.json").unlink()
    assert run("log.tensorboard=true") == 0
    again = json.loads((folder / "summary.json").read_text())
    assert again["test"] == summary["test"] and again["train"]["loss"] == summary["train"]["loss"]
    assert again["train"]["samples_per_second"] > 0 and rows_in(folder) == rows
    assert [step for step, _ in read_curves(folder)["test/loss"]] == [6]


def test_run_shortened_to_its_current_step_has_a_result(tmp_path: Path) -> None:
    assert run("log.every_steps=500", "train.time_limit=1s") == 75  # a save may take 1 s: stops after its first step
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    assert run("log.every_steps=500", "train.max_steps=1") == 0
    summary = json.loads((tmp_path / "runs" / "digits" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["train"]["loss"] > 0
    rows = rows_in(tmp_path / "runs" / "digits")
    assert [row["split"] for row in rows] == ["test", "train"]
    assert "grad_norm" not in rows[1]  # this session took no step


def test_new_run_starts_from_checkpoint_of_another_run(tmp_path: Path) -> None:
    first = ["run.name=first", "checkpoint.every_steps=2", "checkpoint.keep=9"]
    assert run(*first) == 0
    start = tmp_path / "runs" / "first" / "checkpoints" / "step-00000002"
    assert run("run.name=second", f"run.resume={start}") == 0
    assert [row["step"] for row in rows_in(tmp_path / "runs" / "second") if row["split"] == "train"] == [4, 6]
    weights = [load_file(tmp_path / "runs" / name / "model.safetensors") for name in ("first", "second")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def train_losses(tmp_path: Path, *settings: str) -> list[float]:
    name = f"run{len(list((tmp_path / 'runs').glob('*')))}"
    assert run(f"run.name={name}", *settings) == 0
    return [row["loss"] for row in rows_in(tmp_path / "runs" / name)]


def test_settings_change_the_training_losses(tmp_path: Path) -> None:
    reference = train_losses(tmp_path)
    assert train_losses(tmp_path) == reference
    for setting in (
        "data.shuffle=false",
        "data.normalize=half",
        "data.augment=[]",
        "run.seed=1",
        "optim.nesterov=true",
    ):
        assert train_losses(tmp_path, setting) != reference, setting
    unchanged = train_losses(tmp_path, "optim.lr=1e-12")
    assert train_losses(tmp_path, "train.clip_grad_norm=1e-12", "optim.weight_decay=0") == pytest.approx(
        unchanged, rel=1e-5
    )
    assert reference[-1] != pytest.approx(unchanged[-1], rel=1e-5)
    assert run("run.name=short", "data.drop_last=true", "data.global_batch_size=1000") == 0
    assert [row["samples"] for row in rows_in(tmp_path / "runs" / "short")][-1] == 6000


def test_shard_of_one_sample_with_batchnorm_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    small = ["data.channels=3", "model.name=torchvision/resnet18", "data.global_batch_size=2"]  # 1433 is odd
    assert run(*small) == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "which torchvision/resnet18 cannot normalize" in line and "data.drop_last=true" in line


def test_finished_run_is_printed_and_not_trained_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before = (tmp_path / "runs" / "digits" / "model.safetensors").stat().st_mtime_ns
    capfd.readouterr()
    assert run() == 0
    assert "is finished (6 steps); nothing was trained" in capfd.readouterr().out
    assert (tmp_path / "runs" / "digits" / "model.safetensors").stat().st_mtime_ns == before


def test_run_whose_last_checkpoint_does_not_fit_is_finished(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", raise_disk_full)
        assert run() == 0
    assert "the run is complete without it; a longer run would continue from the first step" in capfd.readouterr().out
    assert run() == 0
    assert "is finished (6 steps); nothing was trained" in capfd.readouterr().out
    assert run("train.max_steps=7") == 0
    assert "step 0 of 7" in capfd.readouterr().out


def test_step_of_the_highest_validation_accuracy_is_saved_and_kept(tmp_path: Path) -> None:
    settings = ["data.validation_fraction=0.2", "train.max_steps=54", "optim.lr=0.5"]
    assert run(*settings, "checkpoint.keep=1", "checkpoint.every_epochs=0") == 0  # saves the best and the last alone
    folder = tmp_path / "runs" / "digits"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validation_rows = [(row["accuracy"], -row["step"]) for row in rows if row["split"] == "validation"]
    accuracy, step = max(validation_rows)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best"] == {"step": -step, "accuracy": accuracy, "split": "validation"}
    assert summary["validation"]["num_samples"] == pytest.approx(0.2 * 1433, abs=5)
    assert -step < 54  # or the last checkpoint is the best one
    assert (folder / "checkpoints" / f"step-{-step:08}").is_dir()


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision=bf16"],
        ["train.clip_grad_norm=0.1", "optim.name=adamw", "optim.lr=0.001"],
        ["loss.name=mse", "schedule.name=linear"],
        ["data.workers=2"],
    ],
)
def test_training_with_other_settings_finishes(settings: list[str]) -> None:
    assert run(*settings) == 0


class TestBadInput:
    """Refusals print one line on stderr, exit with 2 and overwrite nothing."""

    def refused(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
        capfd.readouterr()
        assert run(*arguments) == 2
        err = capfd.readouterr().err.strip().splitlines()
        assert len(err) == 1 and err[0].startswith("samecurve: ")
        return err[0]

    def test_wrong_setting_is_refused(self, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "did you mean 'train.epochs'" in self.refused(capfd, "train.epoch=3")
        assert "did you mean 'digits'" in self.refused(capfd, "--config", "digit")
        assert "--config NAME_OR_PATH" in self.refused(capfd, "--config")
        (tmp_path / "bad.yaml").write_text("train: {")
        assert "bad.yaml is not readable as YAML" in self.refused(capfd, "--config", "bad.yaml")
        assert not (tmp_path / "runs").exists()

    def test_missing_device_is_refused(
        self, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "a CPU has no fp16 training; set train.precision" in self.refused(capfd, "train.precision=fp16")
        assert "this machine has no usable GPU" in self.refused(capfd, "train.device=cuda")
        assert not (tmp_path / "runs").exists()

    def test_wrong_data_is_refused(self, capfd: pytest.CaptureFixture[str], image_folder: Path) -> None:
        assert "larger than the training set of 1433" in self.refused(capfd, "data.global_batch_size=2000")
        folder = ["data.name=image_folder", "data.channels=3", "data.global_batch_size=4"]
        assert "Set data.root to the folder" in self.refused(capfd, *folder, "data.root=nowhere")
        (image_folder / "train" / "cat" / "0.png").write_bytes(b"broken")
        assert "1 of 18 image files" in self.refused(capfd, *folder, f"data.root={image_folder}")

    def test_wrong_model_setting_is_refused(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "set it to 32" in self.refused(capfd, "data.image_size=28")
        assert "set data.channels=3" in self.refused(capfd, "model.name=torchvision/resnet18")
        assert "no file" in self.refused(
            capfd, "model.name=torchvision/resnet18", "data.channels=3", "model.pretrained=nowhere.pth"
        )

    def test_unusable_run_folder_is_refused(self, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert run() == 0
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "digits").rglob("*")}
        assert "optim.lr was 0.05, now 0.1" in self.refused(capfd, "optim.lr=0.1")
        assert "run.resume=never" in self.refused(capfd, "run.resume=never")
        assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "digits").rglob("*")}
        (tmp_path / "file").write_text("")
        assert "cannot be written" in self.refused(capfd, "run.root=file")
        assert "not-there" in self.refused(capfd, "run.name=other", "run.resume=not-there")
        checkpoint = next((tmp_path / "runs" / "digits" / "checkpoints").iterdir())
        other = ["run.name=other", f"run.resume={checkpoint}", "model.name=tudui"]
        assert "model.name was lenet, now tudui" in self.refused(capfd, *other)
        assert "choose another run.name to start a new run from it" in self.refused(capfd, f"run.resume={checkpoint}")

    def test_wandb_online_without_key_is_refused(self, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "no API key" in self.refused(capfd, "log.wandb=online")
        assert json.loads((tmp_path / "runs" / "digits" / "status.json").read_text())["state"] == "failed"


def test_images_of_other_sizes_are_scaled(image_folder: Path) -> None:
    write_image(image_folder / "train" / "cat" / "wide.jpg", seed=3, size=(90, 40))
    settings = ["data.name=image_folder", f"data.root={image_folder}", "data.global_batch_size=5", "model.name=tudui"]
    assert run(*settings, "data.augment=[flip]", "data.normalize=half") == 0


def test_print_config_and_help_import_no_torch() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from trainer.main import main\n"
        "print('exit', main(['--config', 'tudui', '--print-config', 'run.seed=4']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    shown, _, result = done.stdout.rpartition("exit ")
    assert result.split() == ["0", "False"]
    assert yaml.safe_load(shown)["run"] == {"name": "tudui", "root": "runs", "seed": 4, "resume": "auto"}
    help_text = subprocess.run(
        [sys.executable, MAIN, "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "train.threads_per_rank=auto" in help_text and "--print-config" in help_text
