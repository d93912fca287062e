"""Transfer: what is frozen stays to the last bit, parts have their own rates, images come as the weights want them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from support.processes import SMALL, Ranks
from torch import Tensor

from launch import forecast
from launch.verify.compare import compare
from trainer import main
from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.inference import evaluate
from trainer.inference.predict import load_predictor
from trainer.inference.saved_model import load_model
from trainer.models.torchvision import preprocessing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:accelerate")

NAME = "torchvision/mobilenet_v3_small"
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as torchvision's own are, drawn; their BatchNorm has seen something."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(5)
    net = torchvision.models.mobilenet_v3_small()
    with torch.no_grad():
        net(torch.randn(8, 3, 32, 32))
    torch.save(net.state_dict(), path)
    return path


def settings(weights: Path) -> list[str]:
    shown = ["data.channels=3", f"model.name={NAME}", f"model.pretrained={weights}", "optim.weight_decay=0.1"]
    return [*SMALL, *shown, "train.threads_per_rank=1", "run.root=runs", "log.every_steps=1", "log.report=false"]


def final(name: str = "digits") -> dict[str, Tensor]:
    return load_file(Path("runs") / name / "model.safetensors")


def changed(weights: Path, name: str = "digits") -> set[str]:
    """What a run has changed of the weights and buffers that it was given, but for the new head."""
    before, after = torch.load(weights, weights_only=True), final(name)
    return {key for key in after if not key.startswith("classifier.3.") and not torch.equal(before[key], after[key])}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_what_is_frozen_is_the_same_to_the_last_bit(
    weights: Path, optimizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    frozen = ["model.freeze=[features,classifier.0.bias]", f"optim.name={optimizer}", "optim.lr=0.001"]
    # 23 steps are an epoch: evaluation comes between, after which BatchNorm must not wake up.
    assert main.main([*settings(weights), *frozen, "train.max_steps=25", "schedule.warmup_epochs=0"]) == 0
    assert changed(weights) == {"classifier.0.weight"}
    assert "1,528,106 weights, 600,074 of them trained; digits" in capfd.readouterr().out
    state = load_file(Path("runs/digits/checkpoints/step-00000025/optimizer.safetensors"))
    kept = [tensor for name, tensor in state.items() if tensor.numel() > 1]
    assert sum(map(torch.numel, kept)) == 600_074 * (2 if optimizer == "adamw" else 1)


def test_a_frozen_norm_stays_and_one_that_is_trained_moves(weights: Path) -> None:
    assert main.main([*settings(weights), "model.freeze=[features.0,features.12.1]", "train.max_steps=3"]) == 0
    after = changed(weights)
    assert not any(name.startswith(("features.0.", "features.12.1.")) for name in after)
    assert {f"features.1.block.0.1.{one}" for one in STATISTICS} <= after and "features.12.0.weight" in after


def test_a_frozen_dropout_drops_nothing(ranks: Ranks) -> None:
    """The tiny network's dropout is its layer 4: what is drawn, and so the seed of the step, is then all the same."""
    losses = []
    for name, frozen in (("drops", "[0,1]"), ("still", "[0,1,4]")):
        ranks.run(1, *SMALL, f"model.freeze={frozen}", "optim.lr=1e-20", "train.max_steps=1", f"run.name={name}")
        rows = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        losses.append(rows[0]["loss"])
    assert losses[0] != losses[1]


def test_frozen_parts_are_the_same_bits_on_any_number_of_ranks(ranks: Ranks, weights: Path) -> None:
    parts = ["model.freeze=[features.0,features.3,classifier.0]", "optim.lr_parts=[features=0.001,features.12=0.01]"]
    exact = [*settings(weights), *parts, "train.virtual_ranks=2", "train.max_steps=4", "data.global_batch_size=20"]
    for size in (1, 2):
        ranks.run(size, *exact, f"run.name=on-{size}", plant="")
    assert not compare(Path("runs/on-1"), Path("runs/on-2"))
    assert Path("runs/on-1/model.safetensors").read_bytes() == Path("runs/on-2/model.safetensors").read_bytes()
    assert not any(
        name.startswith(("features.0.", "features.3.", "classifier.0.")) for name in changed(weights, "on-1")
    )
    assert "features.12.1.running_mean" in changed(weights, "on-1")


def test_what_is_frozen_stays_on_plain_ranks_one_of_which_is_idle(ranks: Ranks, weights: Path) -> None:
    # 1,433 = 8 * 179 + 1: the epoch's last batch leaves a rank without a sample. A BatchNorm that is trained could not
    # normalize that one sample; a frozen one can.
    frozen = [*settings(weights), "model.freeze=[features]", "data.global_batch_size=179", "train.max_steps=11"]
    ranks.run(2, *frozen, plant="")
    assert changed(weights) == {"classifier.0.weight", "classifier.0.bias"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_a_run_with_frozen_parts_goes_on_bit_for_bit_without_the_file(
    ranks: Ranks, weights: Path, optimizer: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.pth"
    own.write_bytes(weights.read_bytes())
    parts = ["model.freeze=[features.0,features.12]", "optim.lr_parts=[classifier.3.weight=0.01,features=0.001]"]
    short = [*settings(own), *parts, f"optim.name={optimizer}", "train.max_steps=6", "data.global_batch_size=16"]
    ranks.run(1, *short, "run.name=whole", plant="")
    ranks.run(1, *short, "run.name=broken", plant="", code=75, SLURM_JOB_END_TIME="1")  # long over
    assert 0 < json.loads(Path("runs/broken/status.json").read_text())["step"] < 6
    own.unlink()
    ranks.run(1, *short, "run.name=broken", plant="")
    assert not compare(Path("runs/whole"), Path("runs/broken"))


def test_what_a_step_changes_goes_with_the_rate_of_its_part(weights: Path) -> None:
    parts = "optim.lr_parts=[features.12=0.02,classifier=0.03,classifier.0.bias=0.04]"
    plain = [*settings(weights), "train.max_steps=1", "schedule.warmup_epochs=0", "optim.momentum=0", "optim.lr=0.01"]
    for name, more in (("plain", []), ("parts", [parts])):
        assert main.main([*plain, *more, f"run.name={name}"]) == 0
    before, one, other = torch.load(weights, weights_only=True), final("plain"), final("parts")
    for key, times in (
        ("features.0.0.weight", 1.0),
        ("features.12.0.weight", 2.0),
        ("classifier.0.weight", 3.0),
        ("classifier.0.bias", 4.0),
    ):
        torch.testing.assert_close(other[key] - before[key], times * (one[key] - before[key]), rtol=0.02, atol=1e-6)
    courses = dict(forecast.facts(forecast.load_settings(["digits"], [parts]), forecast.RankLayout(1, 1, "cpu")))
    assert courses["learning rate"].endswith("features.12 0.4 times that, classifier 0.6 times that, "
                                             "classifier.0.bias 0.8 times that")  # fmt: skip


def test_images_come_as_the_weights_want_them(
    weights: Path, image_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["data.name=image_folder", f"data.root={image_folder}", "data.global_batch_size=4", "model.freeze=[features]"]
    own += ["data.image_size=auto", "data.normalize=weights", "train.max_steps=2", "data.augment=[flip]"]
    assert main.main([*settings(weights), *own]) == 0
    assert "12 images of 224 pixels" in capfd.readouterr().out
    run = Path("runs/digits")
    network = load_model(run)
    assert network.about.image_size == 224 and network.about.model.freeze == []
    assert network.about.normalization.mean == (0.485, 0.456, 0.406)
    assert network.about.normalization.std == (0.229, 0.224, 0.225)
    (found,) = load_predictor(run).predict(image_folder / "test" / "cat" / "0.png")
    assert sum(guess.probability for guess in found.top) == pytest.approx(1)
    assert evaluate.main([str(run), "--config", str(run / "config.yaml"), "--json"]) == 0
    again = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert again["confusion"] == json.loads((run / "summary.json").read_text())["test"]["confusion"]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_weights_that_were_tensorflows_see_what_torchvision_shows_them(name: str) -> None:
    """torchvision's networks turn ImageNet's normalization into their own; ours begin with that."""
    options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    theirs = torchvision.models.get_model(name, weights=None, **options)
    (shown,) = (known.transforms() for known in torchvision.models.get_model_weights(name))
    wanted = preprocessing(ModelSettings(name=f"torchvision/{name}", pretrained="hub"))
    pixels = torch.rand(2, 3, 8, 8)

    def normalized(mean: Sequence[float], std: Sequence[float]) -> Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    seen = theirs._transform_input(normalized(shown.mean, shown.std))
    torch.testing.assert_close(normalized(wanted.normalization.mean, wanted.normalization.std), seen)


class TestBadInput:
    def refused(self, capfd: pytest.CaptureFixture[str], *words: str) -> str:
        capfd.readouterr()
        assert main.main([*SMALL, "train.max_steps=1", *words]) == 2
        (line,) = capfd.readouterr().err.strip().splitlines()
        return line

    def test_what_cannot_be_frozen(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "the network has no 'conv3'; did you mean" in self.refused(capfd, "model.freeze=[conv3]")
        everything = "model.freeze=[conv1,conv2,fc1,fc2,fc3]"
        assert "leaves nothing to train; leave out" in self.refused(capfd, everything)

    def test_parts_without_a_rate(self, capfd: pytest.CaptureFixture[str]) -> None:
        line = self.refused(capfd, "optim.lr_parts=[fc1.wight=0.1]")
        assert "has no 'fc1.wight'; did you mean 'fc1.weight'? choose from fc1.bias, fc1.weight" in line
        line = self.refused(capfd, "optim.lr_parts=[fc1=0.1]", "model.freeze=[fc1]")
        assert "no weight that is trained has the rate of 'fc1'; leave it out" in line

    def test_a_size_that_other_settings_cannot_have(self, capfd: pytest.CaptureFixture[str], weights: Path) -> None:
        own = [*settings(weights), "data.image_size=auto", "data.progressive_sizes=[300]"]
        assert "progressive_sizes=[300]: wanted 1 to data.image_size=224" in self.refused(capfd, *own)

    def test_weights_that_are_not_there_are_told_before_images_are_read(
        self, capfd: pytest.CaptureFixture[str], image_folder: Path
    ) -> None:
        (image_folder / "train" / "cat" / "0.png").write_bytes(b"broken")
        own = [f"model.name={NAME}", "data.name=image_folder", f"data.root={image_folder}", "data.global_batch_size=2"]
        for source in ("nowhere.pth", "hub"):
            line = self.refused(capfd, *own, f"model.pretrained={source}")
            assert f"model.pretrained={source}: no file" in line and "fetch them with torchvision on a machine" in line
        config = forecast.load_settings(["digits"], [*own, "model.pretrained=nowhere.pth"])
        with pytest.raises(ConfigError, match=r"no file nowhere\.pth"):
            forecast.check(config, 1)
