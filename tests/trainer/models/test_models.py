"""Networks: sizes, shapes, heads, pretrained weights and frozen modules."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.config.plugins import TORCHVISION_NAMES
from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.models.lookup import build_model, fit_to_data, freeze
from trainer.models.torchvision import pretrained_preprocessing


def build(name: str, channels: int = 3, image_size: int = 32, num_classes: int = 7, **settings: str) -> nn.Module:
    return build_model(ModelSettings(name=name, **settings), num_classes, channels, image_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "channels", "num_weights"),
    # Sizes of the tutorials' definitions with ten classes, computed by hand as sums of (inputs + 1) * outputs.
    [("lenet", 3, 62_006), ("lenet", 1, 61_706), ("tudui", 3, 145_578), ("resnet18", 3, 11_173_962)],
)
def test_network_has_the_published_number_of_weights(name: str, channels: int, num_weights: int) -> None:
    net = build(name, channels, num_classes=10)
    assert sum(parameter.numel() for parameter in net.parameters()) == num_weights
    assert net(torch.zeros(2, channels, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_lenet_has_the_logits_and_gradients_of_the_tutorial(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    lenet = build_model(ModelSettings("lenet"), 10, 3, 32).to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(16, 3, 32, 32)
    images[:4] = 0.0  # ties in every pooling window: the gradient must go to the same pixel
    images = images.to(memory_format=layout)

    def tutorial_forward(x: Tensor) -> Tensor:
        x = lenet.pool(F.relu(lenet.conv1(x)))
        x = lenet.pool(F.relu(lenet.conv2(x))).flatten(1)
        logits: Tensor = lenet.fc3(F.relu(lenet.fc2(F.relu(lenet.fc1(x)))))
        return logits

    results = []
    for forward in (lenet, tutorial_forward):
        lenet.zero_grad()
        logits = forward(images)
        logits.square().sum().backward()
        results.append([logits.detach(), *(weight.grad.clone() for weight in lenet.parameters())])
    assert all(map(torch.equal, *results))


def test_resnet18_does_not_downsample_before_its_first_stage() -> None:
    net = build("resnet18")
    assert net.get_submodule("layer1")(net.get_submodule("conv1")(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("name", ["lenet", "tudui"])
def test_small_network_refuses_images_that_are_not_32_pixels(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size=28; set it to 32"):
        build(name, image_size=28)


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "mobilenet_v3_small", "googlenet", "shufflenet_v2_x0_5", "densenet121"]
)
def test_torchvision_classifier_has_the_number_of_classes_of_the_data_set(name: str) -> None:
    net = build(f"torchvision/{name}", image_size=64).eval()
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_unknown_torchvision_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        build("torchvision/resnet5O")


def test_image_size_that_the_network_cannot_take_is_refused() -> None:
    for name in ("inception_v3", "alexnet", "vit_b_32"):  # two raise RuntimeError, the last one AssertionError
        with pytest.raises(ConfigError, match=r"cannot take data\.image_size=40"):
            build(f"torchvision/{name}", image_size=40)


def test_vision_transformer_is_built_for_the_image_size(tmp_path: Path) -> None:
    net = build("torchvision/vit_b_32", image_size=64)
    assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 7)
    torch.save(torchvision.models.vit_b_32(image_size=96).state_dict(), tmp_path / "larger.pth")
    build("torchvision/vit_b_32", pretrained=str(tmp_path / "larger.pth"), image_size=96)
    with pytest.raises(ConfigError, match=r"pos_embedding.*set data\.image_size=auto"):
        build("torchvision/vit_b_32", pretrained=str(tmp_path / "larger.pth"), image_size=64)


def test_torchvision_classifier_with_one_channel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.channels=3"):
        build("torchvision/resnet18", channels=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the format of torchvision's weights. The weights are random: real ones are not available offline."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.manual_seed(5)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path)
    return path


def test_head_replace_keeps_other_pretrained_weights(weights: Path) -> None:
    net = build("torchvision/mobilenet_v3_small", pretrained=str(weights))
    state = torch.load(weights, weights_only=True)
    assert torch.equal(net.state_dict()["features.0.0.weight"], state["features.0.0.weight"])
    assert net.get_submodule("classifier.3").out_features == 7  # type: ignore[union-attr]


def test_head_append_keeps_all_pretrained_weights(weights: Path) -> None:
    net = build("torchvision/mobilenet_v3_small", pretrained=str(weights), head="append")
    assert torch.equal(
        net.state_dict()["classifier.3.weight"], torch.load(weights, weights_only=True)["classifier.3.weight"]
    )
    added = net.get_submodule("classifier.add_linear")
    assert (added.in_features, added.out_features) == (1000, 7)


def test_head_append_to_a_single_layer_makes_a_sequence() -> None:
    net = build("torchvision/resnet18", head="append")
    assert [module.out_features for module in net.get_submodule("fc")] == [1000, 7]  # type: ignore[union-attr,misc]


def test_weights_are_loaded_from_safetensors_and_the_hub_folder(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = torch.load(weights, weights_only=True)
    save_file(state, tmp_path / "weights.safetensors")
    build("torchvision/mobilenet_v3_small", pretrained=str(tmp_path / "weights.safetensors"))
    hub = tmp_path / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"no file .*mobilenet_v3_small-047dcff4\.pth"):
        build("torchvision/mobilenet_v3_small", pretrained="hub")
    torch.save(state, hub / "mobilenet_v3_small-047dcff4.pth")
    build("torchvision/mobilenet_v3_small", pretrained="hub")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"not weights", b"", b"PK\x03\x04 truncated", b"\x80\x02}q\x00.", b"\xff" * 64, None]
)
def test_corrupt_file_of_weights_is_refused(tmp_path: Path, weights: Path, suffix: str, content: bytes | None) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(weights.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(ConfigError, match="does not contain weights of mobilenet_v3_small") as raised:
        build("torchvision/mobilenet_v3_small", pretrained=str(path))
    assert "\n" not in str(raised.value)


class _MakesFolderWhenLoaded:
    """Pickles to a call of os.mkdir, which an unrestricted loader makes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._folder),)


def test_pickle_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    path, folder = tmp_path / "malicious.pth", tmp_path / "made-by-the-file"
    torch.save({"features.0.0.weight": _MakesFolderWhenLoaded(folder)}, path)
    with pytest.raises(ConfigError, match="does not contain weights"):
        build("torchvision/mobilenet_v3_small", pretrained=str(path))
    assert not folder.exists()


def test_weights_of_another_network_are_refused(weights: Path) -> None:
    with pytest.raises(ConfigError, match="does not contain weights of resnet18"):
        build("torchvision/resnet18", pretrained=str(weights))


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("vgg16", "hub", (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("vgg16", "a/vgg16_features-amdegroot-88682ab5.pth", (224, (0.48235, 0.45882, 0.40784), (1 / 255,) * 3)),
        ("torchvision/vit_b_16", "mine.pth", (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("torchvision/vit_b_16", "vit_b_16_swag-9ac1b537.pth", (384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
    ],
)
def test_preprocessing_is_that_of_the_weights_file(name: str, file: str, expected: tuple[object, ...]) -> None:
    preprocessing = pretrained_preprocessing(ModelSettings(name=name, pretrained=file))
    normalization = preprocessing.normalization
    assert (preprocessing.image_size, normalization.mean, normalization.std) == expected


def test_preprocessing_of_unknown_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'resnet50'"):
        pretrained_preprocessing(ModelSettings(name="torchvision/resnet5O", pretrained="hub"))


def test_freeze_of_a_module_freezes_its_weights_and_stops_its_training_mode() -> None:
    net = build("resnet18")
    freeze(net, ["layer1", "layer2.0.bn1.weight"])
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in net.named_parameters() if name.startswith("layer1.")} | {
        "layer2.0.bn1.weight"
    }
    in_evaluation_mode = {name for name, module in net.named_modules() if not module.training}
    assert in_evaluation_mode == {name for name, _ in net.named_modules() if f"{name}.".startswith("layer1.")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer5", r"has no 'layer5'; did you mean 'layer\d'\? choose from avgpool, bn1, conv1, fc, layer1"),
        ("layer1.2", r"did you mean 'layer1\.\d'\? choose from layer1\.0, layer1\.1$"),
        ("fc.weight.data", r"did you mean 'fc\.weight'\? choose from fc\.bias, fc\.weight$"),
        ("", "has no ''; choose from"),
    ],
)
def test_freeze_of_unknown_name_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(build("resnet18"), [name])


@pytest.mark.slow
@pytest.mark.parametrize(("head", "last"), [("replace", "classifier.6"), ("append", "classifier.add_linear")])
def test_vgg16_has_replaced_and_appended_head(head: str, last: str) -> None:
    net = build("vgg16", head=head).eval()
    assert net.get_submodule(last).out_features == 7  # type: ignore[union-attr]
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_speedrun_whitening_gives_uncorrelated_patches() -> None:
    torch.manual_seed(0)
    net = build("speedrun", widths=[8, 8, 8])  # type: ignore[arg-type]
    images = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    images[:, 1] = images[:, 0] // 2 + images[:, 1] // 8  # correlated channels of different variance
    mean, std = images.float().mean((0, 2, 3)) / 255, images.float().std((0, 2, 3)) / 255
    fit_to_data(net, images, std.tolist())
    normalized = (images.float() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    whitened = net.get_submodule("whitening")(normalized)
    assert torch.equal(whitened[:, :12], -whitened[:, 12:])
    covariance = whitened[:, :12].transpose(0, 1).flatten(1).cov()
    variances = covariance.diag()
    torch.testing.assert_close(covariance - variances.diag(), torch.zeros(12, 12), atol=0.02, rtol=0)
    assert float(variances.max()) < 1.03 and float(variances.min()) > 0.9


def test_speedrun_convolutions_start_as_identity() -> None:
    net = build("speedrun", depth=3, widths=[32, 48]).eval()  # type: ignore[arg-type]
    first = net.get_submodule("groups.0.convs.0")
    x = torch.randn(2, 24, 9, 9)
    torch.testing.assert_close(first(x)[:, :24], x)


def test_speedrun_takes_any_image_size_from_the_smallest_one() -> None:
    net = build("speedrun", depth=3, widths=[32, 48]).eval()  # type: ignore[arg-type]
    for size in (5, 20, 32, 40):
        assert net(torch.randn(2, 3, size, size)).shape == (2, 7)
    with pytest.raises(ConfigError, match="takes images of at least 5 pixels, got 4"):
        build("speedrun", image_size=4, widths=[8, 8])  # type: ignore[arg-type]


def test_fit_to_data_calls_every_module_that_has_the_method() -> None:
    class Fitted(nn.Module):
        def fit_to_data(self, images: Tensor, std: list[float]) -> None:
            self.arguments = (images, std)

    fitted, images = [Fitted(), Fitted()], torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    fit_to_data(nn.Sequential(fitted[0], nn.Linear(1, 1), nn.Sequential(fitted[1])), images, [1.0, 2.0, 3.0])
    assert all(module.arguments == (images, [1.0, 2.0, 3.0]) for module in fitted)


def test_speedrun_whitening_is_the_same_for_any_number_of_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    weights = []
    for pixels in (1 << 18, 7 * 16 * 16):
        monkeypatch.setattr("trainer.models.speedrun._PIXELS_PER_PASS", pixels)
        net = build("speedrun", widths=[8])  # type: ignore[arg-type]
        fit_to_data(net, images, [0.25] * 3)
        weights.append(net.get_parameter("whitening.weight"))
    assert torch.equal(*weights)


def test_torchvision_networks_that_hints_name_exist() -> None:
    assert set(TORCHVISION_NAMES) <= set(torchvision.models.list_models(module=torchvision.models))
