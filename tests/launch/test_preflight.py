"""submit, train --dry-run and sweep refuse what the ranks would refuse, before anything starts or waits in a queue."""

import dataclasses
import os
import random
import shutil
from pathlib import Path

import pytest
from support.images import write_image
from support.processes import SMALL, Ranks, Samecurve

from launch import forecast, preflight
from launch.forecast import RankLayout
from trainer.config.schema import RunConfig
from trainer.data import cifar10_files
from trainer.errors import UserError
from trainer.run import checkpoint
from trainer.run.checkpoint import Progress, TrainingState

DIGITS = ("--config", "digits")
# Settings, and what the refusal says. The first ones need the network, the others the data or the run folder.
REFUSED = {
    "model": (["model.name=torchvision/resnet19", "data.channels=3"], "torchvision has no classifier 'resnet19'"),
    "freeze": (["model.freeze=[conv9]"], "model.freeze=['conv9']: the network has no 'conv9'"),
    "freeze all": (["model.freeze=[conv1,conv2,fc1,fc2,fc3]"], "leaves nothing to train"),
    "part": (["optim.lr_parts=[conv9=0.1]"], "the network has no 'conv9'"),
    "frozen part": (["model.freeze=[conv1]", "optim.lr_parts=[conv1=0.1]"], "applies to no trainable weight"),
    "frozen head": (["model.freeze=[fc3]", "optim.lr_head=0.1"], "has no trainable linear layer"),
    "feature maps": (["log.feature_maps=[conv9]"], "the network has no 'conv9'"),
    "weight": (["log.feature_maps=[conv1.weight]"], "is a weight and has no feature maps"),
    "size": (["data.image_size=64"], "takes images of 32 pixels"),
    "widths": (["model.name=speedrun", "model.widths=[8,8,8,8,8,8]"], "takes images of at least 65 pixels"),
    "channels": (["model.name=torchvision/resnet18"], "takes 3 channels, the data set has 1"),
    "shard": (
        ["model.name=speedrun", "model.widths=[8]", "data.image_size=3", "data.global_batch_size=1432"],
        "leave a single sample",
    ),
    "progressive": (
        ["model.name=speedrun", "model.widths=[8,8,8]", "data.progressive_sizes=[4]"],
        "cannot process images of 4 pixels",
    ),
    "precision": (["train.precision=fp16", "train.device=auto"], "a CPU has no fp16 training"),
    "resume": (["run.resume=/no/such/run"], "run.resume=/no/such/run: no such folder"),
    "pretrained": (["model.name=vgg16", "data.channels=3", "model.pretrained=/nowhere.pth"], "no file /nowhere.pth"),
    "no weights": (
        ["model.name=torchvision/resnet18", "data.channels=3", "model.pretrained=empty.pth"],
        "does not contain weights",
    ),
    "virtual ranks": (["data.global_batch_size=2", "train.virtual_ranks=3"], "virtual_ranks=3 is more than"),
    "data": (["data.name=cifar10", "data.download=false"], "no complete and unchanged CIFAR-10 in data/"),
    "folder": (["run.root=/proc/nowhere"], "run folder /proc/nowhere/digits cannot be written"),
    "file": (["run.root=empty.pth"], "run folder empty.pth/digits cannot be written (Not a directory)"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def working_folder() -> None:
    Path("empty.pth").touch()


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an sbatch into PATH that creates the returned file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "squeue"):
        (folder / name).write_text(f"#!/bin/sh\n[ {name} = squeue ] || touch {tmp_path}/called\necho 7\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "called"


@pytest.mark.parametrize("name", REFUSED)
def test_submit_and_dry_run_refuse_before_a_start(samecurve: Samecurve, sbatch: Path, name: str) -> None:
    settings, message = REFUSED[name]
    before = sorted(Path.cwd().rglob("*"))
    commands = [("submit",), ("train", "--dry-run")]
    commands += (
        [("sweep", "--dry-run", "--seeds=2"), ("sweep", "--slurm", "--dry-run")] if name in ("freeze", "size") else []
    )
    for command in commands:
        out, error = samecurve(*command, *DIGITS, *settings, code=2)
        assert message in error and error.count("\n") == 1 and out == "", (command, error)
    assert not sbatch.exists() and sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("name", ["freeze", "frozen head", "feature maps", "shard", "resume", "data"])
def test_the_ranks_refuse_with_the_same_line(samecurve: Samecurve, ranks: Ranks, name: str) -> None:
    settings, _ = REFUSED[name]
    _, error = samecurve("train", "--dry-run", *DIGITS, *settings, code=2)
    output = ranks.run(1, *SMALL, *settings, fault="none", code=2)
    assert error in output


def test_dry_run_tells_whether_cifar10_can_be_downloaded(samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_files, "download_problem", lambda: "no route")
    settings = ["--config", "cifar10", "model.name=lenet"]
    _, error = samecurve("train", "--dry-run", *settings, code=2)
    assert "it cannot be downloaded (no route)" in error
    monkeypatch.setattr(cifar10_files, "download_problem", lambda: "")
    samecurve("train", "--dry-run", *settings)
    monkeypatch.setattr(cifar10_files, "download_problem", lambda: "no route")
    (Path("data") / cifar10_files.FOLDER).mkdir(parents=True)
    for name in cifar10_files.FILES:
        (Path("data") / cifar10_files.FOLDER / name).touch()
    samecurve("train", "--dry-run", *settings)


def test_class_without_test_images_is_refused(samecurve: Samecurve, image_folder: Path) -> None:
    settings = ["--config", "image_folder", "model.name=lenet", f"data.root={image_folder}", "data.global_batch_size=4"]
    samecurve("train", "--dry-run", *settings)
    shutil.rmtree(image_folder / "test" / "cat")
    (image_folder / "test" / "cat").mkdir()
    _, error = samecurve("train", "--dry-run", *settings, code=2)
    assert "test/cat is empty" in error
    write_image(image_folder / "test" / "cat" / "0.png", seed=1)
    for path in list((image_folder / "train" / "dog").iterdir())[1:]:
        path.unlink()
    _, error = samecurve("train", "--dry-run", *settings, "data.validation_fraction=0.1", code=2)
    assert "too few to hold some out for validation" in error


def test_runs_that_differ_in_seed_build_the_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[RunConfig] = []
    monkeypatch.setattr(preflight, "_check_network", lambda config, *rest: built.append(config))
    configs = [forecast.load_settings(["digits"], [f"run.seed={seed}", f"run.name=s{seed}"]) for seed in range(9)]
    configs += [forecast.load_settings(["digits"], ["optim.lr=0.5"])]
    preflight.check_runs(configs, RankLayout(1, 1, "cpu"))
    assert len(built) == 2


PRETRAINED = ["model.name=torchvision/squeezenet1_0", "data.channels=3", "data.image_size=64", "model.pretrained=w.pth"]


def save_checkpoint(folder: Path) -> None:
    checkpoint.save(folder / "checkpoints", TrainingState({}, {"state": {}, "param_groups": []}, {}, Progress(3)))


def test_run_that_starts_from_a_checkpoint_needs_no_file_of_pretrained_weights(tmp_path: Path) -> None:
    config = forecast.load_settings(["digits"], PRETRAINED)
    config.folder.mkdir(parents=True)
    (config.folder / "status.json").write_text('{"state": "failed", "step": 0, "reason": ""}')
    with pytest.raises(UserError, match=r"no file w\.pth"):  # it ended before its first checkpoint
        preflight.check_run(config, RankLayout(1, 1, "cpu"))
    save_checkpoint(tmp_path / "other")
    resumed = forecast.load_settings(["digits"], [*PRETRAINED, "run.name=x", f"run.resume={tmp_path / 'other'}"])
    preflight.check_run(resumed, RankLayout(1, 1, "cpu"))
    save_checkpoint(config.folder)
    preflight.check_run(config, RankLayout(1, 1, "cpu"))


def test_new_run_is_checked_also_after_one_that_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str | None] = []
    monkeypatch.setattr(preflight, "_check_network", lambda config, model, *rest: built.append(model.pretrained))
    Path("w.pth").touch()
    configs = [forecast.load_settings(["digits"], [*PRETRAINED, f"run.name={name}"]) for name in ("old", "new", "new2")]
    save_checkpoint(configs[0].folder)
    preflight.check_runs(configs, RankLayout(1, 1, "cpu"))
    assert built == [None, "w.pth"]


def random_settings(draw: random.Random) -> list[str]:
    """Settings of which some fit together."""
    model = draw.choice(["lenet", "tudui", "speedrun"])
    part = draw.choice(["conv1", "fc3", "model1.0", "groups.0", "head", "nope", "groups.0.norms.0.weight"])
    settings = [f"model.name={model}", f"data.image_size={draw.choice([32, 32, 32, 8, 5, 3, 2])}"]
    settings += [f"model.widths={[draw.choice([1, 4]) for _ in range(draw.randint(1, 4))]}"]
    settings += draw.choice(
        [[], [f"model.freeze=[{part}]"], [f"log.feature_maps=[{part}]"], [f"optim.lr_parts=[{part}=1]"]]
    )
    settings += draw.choice([[], ["optim.lr_head=0.5"], ["optim.lr_vectors=0.5"]])
    settings += draw.choice([[], [f"data.progressive_sizes=[{draw.choice([2, 5, 32])}]"]])
    return [*settings, f"data.global_batch_size={draw.choice([2, 3, 64, 716, 1432])}"]


@pytest.mark.parametrize("seed", range(60))
def test_verdict_on_the_meta_device_equals_that_on_the_cpu(seed: int) -> None:
    draw = random.Random(seed)
    settings = random_settings(draw)
    num_ranks = draw.randint(1, 2)
    try:
        config = forecast.load_settings(["digits"], settings)
    except UserError:
        return

    def verdict(device: str) -> str:
        try:
            preflight._build_network(config, config.model, num_ranks, device)
        except UserError as error:
            return str(error).partition("(")[0]  # kernels word the cause differently on each device
        return ""

    assert verdict("meta") == verdict("cpu")


def settings_of(name: str) -> RunConfig:
    """Settings of a network of torchvision, with images of the size that it was made for."""
    side = 299 if name == "inception_v3" else 224
    settings = [f"model.name=torchvision/{name}", f"data.image_size={side}", "data.channels=3"]
    return forecast.load_settings(["digits"], [*settings, "data.global_batch_size=8"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_network_of_torchvision_but_regnet_passes_on_the_meta_device() -> None:
    import torchvision

    refused = []
    for name in torchvision.models.list_models(module=torchvision.models):
        config = settings_of(name)
        try:
            preflight._build_network(config, config.model, 1, "meta")
        except (UserError, NotImplementedError):
            refused.append(name)
    assert refused and all(name.startswith("regnet_") for name in refused)


def test_network_that_the_meta_device_cannot_build_is_checked_on_the_cpu() -> None:
    layout = RankLayout(1, 1, "cpu")
    preflight.check_run(settings_of("regnet_x_400mf"), layout)
    wrong = dataclasses.replace(settings_of("regnet_x_400mf").model, freeze=["stemm"])
    with pytest.raises(UserError, match="the network has no 'stemm'"):
        preflight.check_run(dataclasses.replace(settings_of("regnet_x_400mf"), model=wrong), layout)
