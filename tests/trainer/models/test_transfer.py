"""Transfer learning: frozen modules, learning rates of parts, and preprocessing for pretrained weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from support.processes import SMALL, Ranks
from torch import Tensor

from launch import forecast, preflight
from launch.forecast import RankLayout
from launch.verify.compare import compare_runs
from trainer import main
from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.inference import evaluate
from trainer.inference.predict import load_predictor
from trainer.inference.saved_model import load_model
from trainer.models.torchvision import pretrained_preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate")

NAME = "torchvision/mobilenet_v3_small"
BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of torchvision's weights: random weights, and BatchNorm statistics of one random batch."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(5)
    net = torchvision.models.mobilenet_v3_small()
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))
    torch.save(net.state_dict(), path)
    return path


def settings(weights: Path) -> list[str]:
    transfer = ["data.channels=3", f"model.name={NAME}", f"model.pretrained={weights}", "optim.weight_decay=0.1"]
    return [*SMALL, *transfer, "train.threads_per_rank=1", "run.root=runs", "log.every_steps=1", "log.report=false"]


def final_weights(name: str = "digits") -> dict[str, Tensor]:
    return load_file(Path("runs") / name / "model.safetensors")


def changed_names(weights: Path, name: str = "digits") -> set[str]:
    """The names of all weights and buffers that a run has changed, without the new head."""
    before, after = torch.load(weights, weights_only=True), final_weights(name)
    return {key for key in after if not key.startswith("classifier.3.") and not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_frozen_weights_and_buffers_keep_their_bits(
    weights: Path, optimizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = ["model.freeze=[features,classifier.0.bias]", f"optim.name={optimizer}", "optim.lr=0.001"]
    # An epoch has 23 steps. After its evaluation, frozen BatchNorm layers must stay in evaluation mode.
    assert main.main([*settings(weights), *frozen, "train.max_steps=25", "schedule.warmup_epochs=0"]) == 0
    assert changed_names(weights) == {"classifier.0.weight"}
    assert "1,528,106 weights, 600,074 of them trained; digits" in capfd.readouterr().out
    state = load_file(Path("runs/digits/checkpoints/step-00000025/optimizer.safetensors"))
    moments = [tensor for tensor in state.values() if tensor.numel() > 1]
    assert sum(map(torch.numel, moments)) == 600_074 * (2 if optimizer == "adamw" else 1)


def test_frozen_batch_norm_keeps_its_statistics_and_a_trained_one_updates_them(weights: Path) -> None:
    assert main.main([*settings(weights), "model.freeze=[features.0,features.12.1]", "train.max_steps=3"]) == 0
    changed = changed_names(weights)
    assert not any(name.startswith(("features.0.", "features.12.1.")) for name in changed)
    assert {f"features.1.block.0.1.{buffer}" for buffer in BATCH_NORM_BUFFERS} <= changed
    assert "features.12.0.weight" in changed


def test_frozen_dropout_is_inactive(ranks: Ranks) -> None:
    """The tiny network's dropout is its layer 4. Both runs have the same seed: only freezing it can change the loss."""
    losses = []
    for name, frozen in (("active", "[0,1]"), ("frozen", "[0,1,4]")):
        ranks.run(1, *SMALL, f"model.freeze={frozen}", "optim.lr=1e-20", "train.max_steps=1", f"run.name={name}")
        rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        losses.append(rows[0]["loss"])
    assert losses[0] != losses[1]


def test_run_with_frozen_modules_is_the_same_on_1_and_2_ranks(ranks: Ranks, weights: Path) -> None:
    parts = ["model.freeze=[features.0,features.3,classifier.0]", "optim.lr_parts=[features=0.001,features.12=0.01]"]
    arguments = [*settings(weights), *parts, "train.virtual_ranks=2", "train.max_steps=4", "data.global_batch_size=20"]
    for world_size in (1, 2):
        ranks.run(world_size, *arguments, f"run.name=on-{world_size}", fault="")
    assert not compare_runs(Path("runs/on-1"), Path("runs/on-2"))
    assert Path("runs/on-1/model.safetensors").read_bytes() == Path("runs/on-2/model.safetensors").read_bytes()
    assert not any(
        name.startswith(("features.0.", "features.3.", "classifier.0.")) for name in changed_names(weights, "on-1")
    )
    assert "features.12.1.running_mean" in changed_names(weights, "on-1")


def test_frozen_weights_stay_under_ddp_with_an_idle_rank(ranks: Ranks, weights: Path) -> None:
    # 1,433 = 8 * 179 + 1: the last batch of an epoch has one sample, so that one rank has none. Only a frozen BatchNorm
    # can normalize a single sample.
    arguments = [*settings(weights), "model.freeze=[features]", "data.global_batch_size=179", "train.max_steps=11"]
    ranks.run(2, *arguments, fault="")
    assert changed_names(weights) == {"classifier.0.weight", "classifier.0.bias"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_resume_with_frozen_modules_is_exact_and_needs_no_file_of_weights(
    ranks: Ranks, weights: Path, optimizer: str, tmp_path: Path
) -> None:
    weights_copy = tmp_path / "copy.pth"
    weights_copy.write_bytes(weights.read_bytes())
    parts = ["model.freeze=[features.0,features.12]", "optim.lr_parts=[classifier.3.weight=0.01,features=0.001]"]
    arguments = [
        *settings(weights_copy),
        *parts,
        f"optim.name={optimizer}",
        "train.max_steps=6",
        "data.global_batch_size=16",
    ]
    ranks.run(1, *arguments, "run.name=uninterrupted", fault="")
    ranks.run(1, *arguments, "run.name=resumed", "train.time_limit=1s", fault="", code=75)  # stops after a step
    assert 0 < json.loads(Path("runs/resumed/status.json").read_text())["step"] < 6
    weights_copy.unlink()
    ranks.run(1, *arguments, "run.name=resumed", fault="")
    assert not compare_runs(Path("runs/uninterrupted"), Path("runs/resumed"))


def test_weight_update_is_proportional_to_the_learning_rate_of_its_part(weights: Path) -> None:
    parts = "optim.lr_parts=[features.12=0.02,classifier=0.03,classifier.0.bias=0.04]"
    arguments = [
        *settings(weights),
        "train.max_steps=1",
        "schedule.warmup_epochs=0",
        "optim.momentum=0",
        "optim.lr=0.01",
    ]
    for name, more_arguments in (("one-rate", []), ("parts", [parts])):
        assert main.main([*arguments, *more_arguments, f"run.name={name}"]) == 0
    before = torch.load(weights, weights_only=True)
    with_one_rate, with_parts = final_weights("one-rate"), final_weights("parts")
    for key, factor in (
        ("features.0.0.weight", 1.0),
        ("features.12.0.weight", 2.0),
        ("classifier.0.weight", 3.0),
        ("classifier.0.bias", 4.0),
    ):
        expected = factor * (with_one_rate[key] - before[key])
        torch.testing.assert_close(with_parts[key] - before[key], expected, rtol=0.02, atol=1e-6)
    config = forecast.load_settings(["digits"], [parts])
    facts = dict(forecast.describe_run(config, forecast.RankLayout(1, 1, "cpu")))
    assert facts["learning rate"].endswith("features.12 0.4 times that, classifier 0.6 times that, "
                                             "classifier.0.bias 0.8 times that")  # fmt: skip


def test_auto_image_size_and_weights_normalization_are_those_of_the_pretrained_weights(
    weights: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "data.name=image_folder",
        f"data.root={image_folder}",
        "data.global_batch_size=4",
        "model.freeze=[features]",
    ]
    arguments += ["data.image_size=auto", "data.normalize=weights", "train.max_steps=2", "data.augment=[flip]"]
    assert main.main([*settings(weights), *arguments]) == 0
    assert "12 images of 224 pixels" in capfd.readouterr().out
    run = Path("runs/digits")
    metadata = load_model(run).metadata
    assert metadata.image_size == 224 and metadata.model.freeze == []
    assert metadata.normalization.mean == (0.485, 0.456, 0.406)
    assert metadata.normalization.std == (0.229, 0.224, 0.225)
    (prediction,) = load_predictor(run).predict(image_folder / "test" / "cat" / "0.png")
    assert sum(entry.probability for entry in prediction.top) == pytest.approx(1)
    assert evaluate.main([str(run), "--config", str(run / "config.yaml"), "--json"]) == 0
    evaluation = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert evaluation["confusion"] == json.loads((run / "summary.json").read_text())["test"]["confusion"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_preprocessing_of_tensorflow_weights_equals_torchvisions(name: str) -> None:
    """torchvision converts ImageNet's normalization inside these networks. Here the loader does it."""
    options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    network = torchvision.models.get_model(name, weights=None, **options)
    (transforms,) = (known.transforms() for known in torchvision.models.get_model_weights(name))
    normalization = pretrained_preprocessing(ModelSettings(name=f"torchvision/{name}", pretrained="hub")).normalization
    pixels = torch.rand(2, 3, 8, 8)

    def normalize(mean: Sequence[float], std: Sequence[float]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    expected = network._transform_input(normalize(transforms.mean, transforms.std))
    torch.testing.assert_close(normalize(normalization.mean, normalization.std), expected)


class TestErrors:
    def error_line(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
        capfd.readouterr()
        assert main.main([*SMALL, "train.max_steps=1", *arguments]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    def test_freeze_of_unknown_name_or_of_everything_is_refused(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "the network has no 'conv3'; did you mean" in self.error_line(capfd, "model.freeze=[conv3]")
        everything = "model.freeze=[conv1,conv2,fc1,fc2,fc3]"
        assert "leaves nothing to train; leave out at least one" in self.error_line(capfd, everything)

    def test_lr_parts_without_trainable_weights_are_refused(self, capfd: pytest.CaptureFixture[str]) -> None:
        line = self.error_line(capfd, "optim.lr_parts=[fc1.wight=0.1]")
        assert "has no 'fc1.wight'; did you mean 'fc1.weight'? choose from fc1.bias, fc1.weight" in line
        line = self.error_line(capfd, "optim.lr_parts=[fc1=0.1]", "model.freeze=[fc1]")
        assert "the rate of 'fc1' applies to no trainable weight; remove it" in line

    def test_progressive_size_above_auto_image_size_is_refused(
        self, capfd: pytest.CaptureFixture[str], weights: Path
    ) -> None:
        arguments = [*settings(weights), "data.image_size=auto", "data.progressive_sizes=[300]"]
        assert "progressive_sizes=[300]: expected sizes from 1 to data.image_size=224" in self.error_line(
            capfd, *arguments
        )

    def test_missing_file_of_weights_is_refused_before_images_are_read(
        self, capfd: pytest.CaptureFixture[str], image_folder: Path
    ) -> None:
        (image_folder / "train" / "cat" / "0.png").write_bytes(b"broken")
        arguments = [
            f"model.name={NAME}",
            "data.name=image_folder",
            f"data.root={image_folder}",
            "data.global_batch_size=2",
        ]
        for source in ("nowhere.pth", "hub"):
            line = self.error_line(capfd, *arguments, f"model.pretrained={source}")
            assert f"model.pretrained={source}: no file" in line and "download it with torchvision on a machine" in line
        config = forecast.load_settings(["digits"], [*arguments, "model.pretrained=nowhere.pth"])
        with pytest.raises(ConfigError, match=r"no file nowhere\.pth"):
            preflight.check_run(config, RankLayout(1, 1, "cpu"))
