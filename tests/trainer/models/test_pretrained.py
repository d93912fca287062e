"""Files of weights in the forms that other trainers save: accepted when the tensors fit, else refused in a sentence."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.models.pretrained import UnusableWeightsError, load_pretrained

State = dict[str, Tensor]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


@pytest.fixture
def state() -> State:
    torch.manual_seed(7)
    return {name: torch.rand_like(value.float()).to(value.dtype) for name, value in network().state_dict().items()}


def prefixed(prefix: str) -> Callable[[State], Any]:
    return lambda state: {f"{prefix}{name}": value for name, value in state.items()}


FORMS: dict[str, Callable[[State], Any]] = {
    "bare": lambda state: state,
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "DDP of compiled": prefixed("module._orig_mod."),
    "compiled part": lambda state: {name.replace("1.", "1._orig_mod.", 1): value for name, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": prefixed("model.")(state) | {"loss.weight": torch.ones(3)}, "epoch": 3,
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}],
    },
    "timm": lambda state: {"epoch": 1, "arch": "x", "state_dict": state, "state_dict_ema": state, "metric": 0.5},
    "torchvision": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
    "averaged": lambda state: prefixed("module.")(state) | {"n_averaged": torch.tensor(5)},
    "nested": lambda state: {"checkpoint": {"net": {"weights": state}}},
    "backbone": prefixed("net.backbone."),
    "old": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "auxiliary": lambda state: state | {"AuxLogits.conv.weight": torch.ones(1), "aux1.weight": torch.ones(1)},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_accepted_in_every_usual_form(form: str, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "weights.pth")
    loaded = network()
    load_pretrained(tmp_path / "weights.pth", loaded)
    for name, value in loaded.state_dict().items():
        if form != "old" or "num_batches" not in name:
            assert torch.equal(value, state[name]), name


def refusal(content: Any, path: Path) -> str:
    torch.save(content, path)
    with pytest.raises(UnusableWeightsError) as raised:
        load_pretrained(path, network())
    text = str(raised.value)
    assert text.isprintable() and len(text) < 400
    return text


def test_refusal_names_the_first_missing_and_unexpected_weight(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    del state["0.bias"]
    assert refusal(state, path) == "1 of its 9 weights are missing, the first is 0.bias"
    state["evil\x1b[2J\u202e\n"] = torch.ones(1)
    text = refusal(state, path)
    assert "the first is 0.bias and 1 weights are not of this network, the first is evil\\x1b[2J\\u202e" in text
    assert refusal({"epoch": 3}, path) == "it has no tensors with names"
    assert "expected" not in refusal([1, 2], path)


def test_refusal_names_the_shapes(state: State, tmp_path: Path) -> None:
    state["2.weight"] = torch.ones(10, 4)
    assert refusal(state, tmp_path / "x.pth") == "2.weight has the shape [10, 4], and the network's is [3, 4]"


def test_pickle_with_other_objects_is_refused_with_advice(state: State, tmp_path: Path) -> None:
    text = refusal({"state_dict": state, "args": argparse.Namespace(name="\x1b[2J")}, tmp_path / "x.pth")
    assert "other objects could run code; save the network's state_dict() to a new file" in text


def test_damaged_files_give_one_printable_line(state: State, tmp_path: Path) -> None:
    """Random damage at 100 places: the file loads, or is refused in one line."""
    path, generator = tmp_path / "weights.pth", random.Random(0)
    torch.save(state, path)
    intact, refused = path.read_bytes(), 0
    for _ in range(100):
        damaged = bytearray(intact)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(bytes(damaged[: generator.choice((len(damaged), generator.randrange(len(damaged))))]))
        try:
            load_pretrained(path, network())
        except UnusableWeightsError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) < 400
    assert refused > 20
