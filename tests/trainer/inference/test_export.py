"""Exporting: each format is loaded by its own reader and gives the run's logits, for any batch; pickles are refused."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.processes import Samecurve, finished_run
from torch import Tensor

from trainer.config.schema import DataSettings, ModelSettings
from trainer.data import digits
from trainer.data.augment import Normalization
from trainer.errors import ExportError, FolderError
from trainer.inference.export import FORMATS, Format, export_model, read_description
from trainer.inference.predict import load_predictor
from trainer.inference.saved_model import METADATA_KEY, ModelMetadata, load_model
from trainer.models.lookup import build_model

PROGRAMS = ["torchscript", "pt2", "onnx"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=2")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """1,000 of them."""
    return (
        torch.from_numpy(digits.load(DataSettings(name="digits")).train.images[:1000]).permute(0, 3, 1, 2).contiguous()
    )


def by_onnxruntime(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(np.asarray(logits))


READERS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "torchscript": lambda path, images: torch.jit.load(path)(images),
    "pt2": lambda path, images: torch.export.load(path).module()(images),
    "onnx": by_onnxruntime,
}


@pytest.mark.parametrize("to", PROGRAMS)
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_a_whole_program_gives_the_runs_logits_and_says_what_it_is(
    run: Path, images: Tensor, to: str, samecurve: Samecurve
) -> None:
    out, _ = samecurve("export", str(run), "--to", to)
    path = run / "export" / f"x{FORMATS[to].suffix}"
    assert out.startswith(f"{path}: ") and not list(path.parent.glob(".*"))
    network = load_model(run)
    with torch.no_grad():
        for some in (images, images[:1], images[:7]):
            assert torch.allclose(READERS[to](path, some), network.logits(some), rtol=0, atol=1e-4)
    assert read_description(path) == json.loads(network.about.metadata()[METADATA_KEY])
    with pytest.raises(FolderError, match="is a whole program"):
        load_model(path)


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_weights_alone_predict_as_the_run_does(run: Path, images: Tensor, to: str, tmp_path: Path) -> None:
    made = export_model(run, to, tmp_path / f"given{FORMATS[to].suffix}")
    assert made.largest_difference == 0 and made.path.parent == tmp_path
    assert torch.equal(load_model(made.path).logits(images), load_model(run).logits(images))


def test_a_pickle_is_warned_of_and_refused_unless_asked_for(
    run: Path, images: Tensor, tmp_path: Path, samecurve: Samecurve
) -> None:
    path = tmp_path / "whole.pt"
    _, err = samecurve("export", str(run), "--to", "pickle", "--out", str(path))
    assert "warning" in err and "any code" in err
    picture = str(tmp_path / "digit.png")
    from PIL import Image

    Image.fromarray(images[0, 0].numpy()).save(picture)
    _, err = samecurve("predict", str(path), picture, code=2)
    assert "any code" in err and "--allow-pickle" in err and err.count("\n") == 1
    out, _ = samecurve("predict", str(path), picture, "--allow-pickle")
    again, _ = samecurve("predict", str(run), picture)
    assert out == again


class Trap:
    def __init__(self, place: Path) -> None:
        self._place = str(place)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._place,)


def test_a_file_that_would_run_code_runs_none(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "trapped"), "samecurve": "{}"}, tmp_path / "trap.pt")
    with pytest.raises(FolderError, match="any code"):
        load_predictor(tmp_path / "trap.pt")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["tudui", "speedrun", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_other_networks(name: str, tmp_path: Path) -> None:
    model = ModelSettings(name=name, widths=[8, 16, 16])
    torch.manual_seed(0)
    module = build_model(model, 10, 3, 32)
    about = ModelMetadata(model, tuple("abcdefghij"), Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)), 32, 3)
    save_file(module.state_dict(), tmp_path / "given.safetensors", about.metadata())
    for to in PROGRAMS:
        assert export_model(tmp_path / "given.safetensors", to).largest_difference < 1e-4


class TestRefusals:
    def test_what_gives_other_logits_is_not_kept(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        good = FORMATS["torch"]
        wrong = Format(good.suffix, good.write, lambda path: lambda images: good.read(path)(images) + 1)
        monkeypatch.setitem(FORMATS, "torch", wrong)
        with pytest.raises(ExportError, match="gives other logits, by 1"):
            export_model(run, "torch", run / "wrong.pt")
        learned = Format(good.suffix, good.write, lambda path: lambda images: good.read(path)(images[:1]))
        monkeypatch.setitem(FORMATS, "torch", learned)
        with pytest.raises(ExportError, match="for a batch of 6"):
            export_model(run, "torch", run / "wrong.pt")
        assert not list(run.glob("*wrong*"))

    @pytest.mark.parametrize("to", ["torch", "torchscript", "pt2", "onnx"])
    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, run: Path, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, content: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(ExportError, match="No space left"):
            export_model(run, to, tmp_path / f"x{FORMATS[to].suffix}")
        assert not list(tmp_path.glob("*x*"))

    def test_a_name_that_its_readers_would_not_know(self, run: Path) -> None:
        with pytest.raises(ExportError, match=r"ends in \.onnx"):
            export_model(run, "onnx", Path("x.bin"))

    def test_a_missing_package_a_place_that_cannot_be_and_an_unknown_format(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samecurve: Samecurve
    ) -> None:
        (tmp_path / "file").write_text("")
        _, err = samecurve("export", str(run), "--to", "torch", "--out", str(tmp_path / "file" / "x.pt"), code=2)
        assert "cannot be written" in err and "--out" in err
        monkeypatch.setitem(sys.modules, "onnx", None)
        _, err = samecurve("export", str(run), "--to", "onnx", code=2)
        assert "needs the package onnx" in err and "[export]" in err
        with pytest.raises(ExportError, match="did you mean 'onnx'"):
            export_model(run, "onxx")
