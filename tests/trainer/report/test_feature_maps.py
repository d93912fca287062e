"""Feature maps are the outputs of named layers in evaluation mode."""

import sys
from collections.abc import Callable

import pytest
import torch
from support.processes import MAIN, CommandResult
from torch import Tensor, nn

from trainer.config.schema import ModelSettings
from trainer.errors import ConfigError
from trainer.models.inspect import check_feature_maps
from trainer.models.lookup import build_model
from trainer.report.feature_maps import compute_feature_maps


def test_feature_maps_equal_layer_outputs_and_leave_the_module_unchanged() -> None:
    module = build_model(ModelSettings(name="lenet"), 10, 3, 32)
    module.train()
    image = torch.randn(1, 3, 32, 32)
    maps = compute_feature_maps(module, image, ["conv1", "fc1"])
    with torch.no_grad():
        assert torch.equal(maps["conv1"], module.get_submodule("conv1")(image)[0])
    assert maps["fc1"].shape == (120, 1, 1)
    assert module.training and not module.get_submodule("conv1")._forward_hooks


def test_feature_maps_are_copied_before_an_in_place_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
    maps = compute_feature_maps(network, torch.randn(1, 1, 8, 8), ["0", "1"])
    assert maps["0"].min() < 0 <= maps["1"].min()


def test_output_with_a_vector_per_position_is_one_map() -> None:
    maps = compute_feature_maps(nn.Sequential(nn.Flatten(2), nn.Linear(64, 5)), torch.randn(1, 3, 8, 8), ["1"])
    assert maps["1"].shape == (1, 3, 5)


def test_layer_that_returns_no_tensor_or_does_not_run_is_left_out() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.unused = nn.LSTM(8, 4), nn.Linear(2, 2)

        def forward(self, image: Tensor) -> Tensor:
            sequence: Tensor = self.lstm(image[0])[0]  # an LSTM returns a tuple
            return sequence

    assert compute_feature_maps(Network(), torch.randn(1, 1, 8, 8), ["lstm", "unused"]) == {}


def test_unknown_layer_is_refused_before_training(launch: Callable[..., CommandResult]) -> None:
    result = launch([sys.executable, MAIN, "--config", "digits", "log.feature_maps=[conv9]", "log.wandb=off"])
    assert result.code == 2 and result.err.count("\n") == 1
    assert "log.feature_maps=['conv9']: the network has no 'conv9'; did you mean 'conv2'?" in result.err


def test_weight_in_place_of_a_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a weight"):
        check_feature_maps(nn.Sequential(nn.Linear(1, 1)), ["0.weight"])
