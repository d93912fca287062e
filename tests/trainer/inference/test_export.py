"""Exported files give the run's logits for any batch size in their own runtimes; pickles need --allow-pickle."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.processes import Samecurve, finished_run
from torch import Tensor, nn

from trainer.config.plugins import MODELS
from trainer.config.schema import DataSettings, ModelSettings
from trainer.data import digits
from trainer.data.normalization import Normalization
from trainer.errors import ExportError, FolderError
from trainer.inference.export import FORMATS, Format, export_model, read_metadata
from trainer.inference.predict import load_predictor
from trainer.inference.saved_model import METADATA_KEY, ModelMetadata, load_model
from trainer.models.lookup import build_model

PROGRAMS = ["torchscript", "pt2", "onnx"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "train.epochs=2")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [1000, 1, H, W]"""
    pixels = digits.load(DataSettings(name="digits")).train.images[:1000]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def run_with_onnxruntime(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    return torch.from_numpy(np.asarray(logits))


RUNTIMES: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "torchscript": lambda path, images: torch.jit.load(path)(images),
    "pt2": lambda path, images: torch.export.load(path).module()(images),
    "onnx": run_with_onnxruntime,
}


@pytest.mark.parametrize("to", PROGRAMS)
@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_exported_program_gives_logits_of_the_run_and_has_its_metadata(
    run: Path, images: Tensor, to: str, samecurve: Samecurve
) -> None:
    out, _ = samecurve("export", str(run), "--to", to)
    path = run / "export" / f"x{FORMATS[to].suffix}"
    assert out.startswith(f"{path}: ") and not list(path.parent.glob(".*"))
    model = load_model(run)
    with torch.no_grad():
        for batch in (images, images[:1], images[:7]):
            assert torch.allclose(RUNTIMES[to](path, batch), model.logits(batch), rtol=0, atol=1e-4)
    assert read_metadata(path) == json.loads(model.metadata.to_file_metadata()[METADATA_KEY])
    with pytest.raises(FolderError, match="is an exported program"):
        load_model(path)


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_exported_weights_give_equal_logits(run: Path, images: Tensor, to: str, tmp_path: Path) -> None:
    exported = export_model(run, to, tmp_path / f"exported{FORMATS[to].suffix}")
    assert exported.largest_difference == 0 and exported.path.parent == tmp_path
    assert torch.equal(load_model(exported.path).logits(images), load_model(run).logits(images))


def test_file_name_has_the_chosen_weights(run: Path) -> None:
    assert export_model(run, "safetensors", weights="latest").path == run / "export" / "x-latest.safetensors"


def test_pickle_export_warns_and_loads_only_with_allow_pickle(
    run: Path, images: Tensor, tmp_path: Path, samecurve: Samecurve
) -> None:
    path = tmp_path / "whole.pt"
    _, err = samecurve("export", str(run), "--to", "pickle", "--out", str(path))
    assert "warning" in err and "any code" in err
    image = str(tmp_path / "digit.png")
    Image.fromarray(images[0, 0].numpy()).save(image)
    _, err = samecurve("predict", str(path), image, code=2)
    assert "any code" in err and "--allow-pickle" in err and err.count("\n") == 1
    out, _ = samecurve("predict", str(path), image, "--allow-pickle")
    expected, _ = samecurve("predict", str(run), image)
    assert out == expected


class FolderMaker:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self._folder,)


def test_loading_a_malicious_pickle_executes_nothing(tmp_path: Path) -> None:
    torch.save({"state_dict": FolderMaker(tmp_path / "executed"), "samecurve": "{}"}, tmp_path / "malicious.pt")
    with pytest.raises(FolderError, match="any code"):
        load_predictor(tmp_path / "malicious.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["tudui", "speedrun", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_every_program_format_supports_model(name: str, tmp_path: Path) -> None:
    settings = ModelSettings(name=name, widths=[8, 16, 16])
    torch.manual_seed(0)
    module = build_model(settings, 10, 3, 32)
    metadata = ModelMetadata(settings, tuple("abcdefghij"), Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.3)), 32, 3)
    save_file(module.state_dict(), tmp_path / "weights.safetensors", metadata.to_file_metadata())
    for to in PROGRAMS:
        assert export_model(tmp_path / "weights.safetensors", to).largest_difference < 1e-4


def attention(model: ModelSettings, num_classes: int, channels: int, image_size: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(image_size, 2, 16, batch_first=True)
    return nn.Sequential(nn.Flatten(1, 2), layer, nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))


def test_network_with_attention_is_exported_as_torchscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two traces of PyTorch's attention give different graphs, with equal logits."""
    monkeypatch.setitem(MODELS, "attention", f"{__name__}:attention")
    settings = ModelSettings(name="attention")
    module = build_model(settings, 10, 1, 8)
    metadata = ModelMetadata(settings, tuple("abcdefghij"), Normalization((0.5,), (0.2,)), 8, 1)
    save_file(module.state_dict(), tmp_path / "weights.safetensors", metadata.to_file_metadata())
    assert export_model(tmp_path / "weights.safetensors", "torchscript").largest_difference < 1e-4


class TestRefusals:
    def test_file_with_other_logits_is_deleted(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        good = FORMATS["torch"]
        shifted = Format(good.suffix, good.write, lambda path: lambda images: good.load(path)(images) + 1)
        monkeypatch.setitem(FORMATS, "torch", shifted)
        with pytest.raises(ExportError, match="differ from the network's by 1"):
            export_model(run, "torch", run / "wrong.pt")
        fixed_batch = Format(good.suffix, good.write, lambda path: lambda images: good.load(path)(images[:1]))
        monkeypatch.setitem(FORMATS, "torch", fixed_batch)
        with pytest.raises(ExportError, match="for a batch of 6"):
            export_model(run, "torch", run / "wrong.pt")
        assert not list(run.glob("*wrong*"))

    @pytest.mark.parametrize("to", ["torch", "torchscript", "pt2", "onnx"])
    def test_full_disk_is_reported_in_one_line_and_leaves_no_file(
        self, run: Path, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raise_disk_full(path: Path, content: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", raise_disk_full)
        with pytest.raises(ExportError, match="No space left"):
            export_model(run, to, tmp_path / f"x{FORMATS[to].suffix}")
        assert not list(tmp_path.glob("*x*"))

    def test_any_error_of_an_exporter_is_one_line(
        self, run: Path, samecurve: Samecurve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise torch.jit.TracingCheckError("graph " * 999, "\nx" * 999)

        monkeypatch.setitem(FORMATS, "torchscript", Format(".torchscript.pt", fail, FORMATS["torchscript"].load))
        _, err = samecurve("export", str(run), "--to", "torchscript", code=2)
        assert (
            err.count("\n") == 1
            and "lenet cannot be written as torchscript (Tracing failed sanity checks! ERROR: Graphs" in err
            and len(err) < 400
        )
        assert not [path for path in (run / "export").iterdir() if path.name.startswith(".")]

    def test_out_with_another_suffix(self, run: Path) -> None:
        with pytest.raises(ExportError, match=r"ends in \.onnx"):
            export_model(run, "onnx", Path("x.bin"))

    def test_out_below_a_file(self, run: Path, tmp_path: Path, samecurve: Samecurve) -> None:
        (tmp_path / "file").write_text("")
        _, err = samecurve("export", str(run), "--to", "torch", "--out", str(tmp_path / "file" / "x.pt"), code=2)
        assert "cannot be written" in err and "--out" in err

    def test_missing_package(self, run: Path, monkeypatch: pytest.MonkeyPatch, samecurve: Samecurve) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        _, err = samecurve("export", str(run), "--to", "onnx", code=2)
        assert "needs the package onnx" in err and "pip install onnx" in err

    def test_unknown_format(self, run: Path) -> None:
        with pytest.raises(ExportError, match="did you mean 'onnx'"):
            export_model(run, "onxx")
