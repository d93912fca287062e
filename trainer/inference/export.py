"""A run's network in, a file of another format out that is loaded again, and compared, before it is called done.

    onnx, torchscript, pt2   the whole program: uint8 images [batch, C, H, W] in, logits float32 [batch, classes] out;
                             any batch, normalization inside
    safetensors, torch       the weights alone; nothing in these files could be executed
    pickle                   the whole module as torch.save writes it: who loads it runs whatever it says

Each carries, as JSON under the name `samecurve`, the model's settings, classes, normalization, image size and channels.
"""

import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.errors import ExportError, suggest_choice
from trainer.inference.saved_model import METADATA_KEY, SavedModel, load_model
from trainer.run.files import DISK_ERRORS, error_reason

_BATCHES = (1, 6, 64)  # that both are asked for: a program may have learned one by heart
_TOLERANCE = 1e-4  # of the largest logit, at least 1
_OPSET = 18

Run = Callable[[Tensor], Tensor]


class Program(nn.Module):
    """Normalization and network: uint8 [B, C, H, W] in, logits float32 [B, num_classes] out."""

    def __init__(self, network: SavedModel) -> None:
        super().__init__()
        mean, std = (torch.tensor(values) for values in asdict(network.about.normalization).values())
        self.scale = nn.Buffer((1 / (255 * std)).view(1, -1, 1, 1))
        self.shift = nn.Buffer((-mean / std).view(1, -1, 1, 1))
        self.network = network.module.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.float() * self.scale + self.shift)
        return logits


@dataclass(frozen=True, slots=True)
class Exported:
    path: Path
    size_bytes: int
    largest_difference: float
    """of a logit, between the file that was loaded again and the run's own network"""


def export_model(
    run: Path, to: str, out: Path | None = None, which: str = "auto", allow_pickle: bool = False
) -> Exported:
    """Writes the file; `out` by default RUN/export/NAME.SUFFIX. which, allow_pickle: as trained.load has them.

    Raises FolderError for a run without such weights, ExportError when a package is missing, the network cannot be
    written in this format, the file cannot be written, or it gives other logits.
    """
    if to not in FORMATS:
        raise ExportError(f"--to {to}: {suggest_choice(to, FORMATS)}")
    network = load_model(run, which, torch.device("cpu"), allow_pickle)
    made = FORMATS[to]
    if out is None:
        folder = run if run.is_dir() else run.parent
        name = folder.resolve().name if run.is_dir() else run.stem
        out = folder / "export" / f"{name}{'' if which == 'auto' else f'-{which}'}{made.suffix}"
    wanted = Path(f"x{made.suffix}").suffix
    if out.suffix != wanted:  # by which readers know it, ours too
        raise ExportError(f"--out {out}: wanted a name that ends in {wanted}, as files of {to} do")
    partial = out.with_name(f".{out.stem}.{os.getpid()}.partial{made.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            made.write(network, partial)
            difference = _difference(network, made.read(partial))
            partial.chmod(mode)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except DISK_ERRORS as error:
        raise ExportError(f"{out} cannot be written ({error_reason(error)}); give another place by --out") from None
    except RuntimeError as error:  # how PyTorch's exporters refuse, each its own way
        problem = " ".join(str(error).split())[:200]
        raise ExportError(f"{network.about.model.name} cannot be written as {to} ({problem})") from None
    return Exported(out, out.stat().st_size, difference)


def _difference(network: SavedModel, again: Run) -> float:
    """The largest of any logit, over random images in several batches. Raises ExportError when it is too large."""
    about, generator = network.about, torch.Generator().manual_seed(0)
    largest = 0.0
    for batch in _BATCHES:
        shape = (batch, about.channels, about.image_size, about.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        wanted, got = network.logits(images), again(images)
        if got.shape != wanted.shape:
            raise ExportError(f"the exported file gives {tuple(got.shape)} for a batch of {batch}; nothing was kept")
        difference = float((got - wanted).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise ExportError(f"the exported file gives other logits, by {difference:.2g}; nothing was kept")
        largest = max(largest, difference)
    return largest


def _example(network: SavedModel) -> Tensor:
    """Two images: a batch of one would be taken for the only one there is."""
    about = network.about
    return torch.zeros(2, about.channels, about.image_size, about.image_size, dtype=torch.uint8)


def _write_safetensors(network: SavedModel, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in network.module.state_dict().items()}
    save_file(weights, path, network.about.metadata())


def _write_torch(network: SavedModel, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in network.module.state_dict().items()}
    _save({"state_dict": weights, **network.about.metadata()}, path)


def _write_pickle(network: SavedModel, path: Path) -> None:
    _save({"module": network.module, **network.about.metadata()}, path)


def _save(content: dict[str, Any], path: Path) -> None:
    """By way of memory: PyTorch's writer of files aborts the process when a disk is full."""
    into = io.BytesIO()
    torch.save(content, into)
    path.write_bytes(into.getvalue())


def _read_own(path: Path) -> Run:
    return load_model(path, device=torch.device("cpu"), allow_pickle=True).logits


def _write_torchscript(network: SavedModel, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are the network's own, and that the format is an old one
        script = torch.jit.trace(Program(network).eval(), _example(network))
        into = io.BytesIO()
        torch.jit.save(script, into, _extra_files=network.about.metadata())
    path.write_bytes(into.getvalue())


def _read_torchscript(path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run: Run = torch.jit.load(path)
    return torch.no_grad()(run)


def _exported_program(network: SavedModel) -> Any:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(Program(network).eval(), (_example(network),), dynamic_shapes=shapes)


def _write_pt2(network: SavedModel, path: Path) -> None:
    into = io.BytesIO()
    torch.export.save(_exported_program(network), into, extra_files=network.about.metadata())
    path.write_bytes(into.getvalue())


def _read_pt2(path: Path) -> Run:
    return torch.no_grad()(torch.export.load(path).module())


def _write_onnx(network: SavedModel, path: Path) -> None:
    onnx = _package("onnx")
    _package("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            _exported_program(network), (), input_names=["images"], output_names=["logits"], dynamo=True,
            opset_version=_OPSET, verbose=False,
        )  # fmt: skip
    model = made.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(model, network.about.metadata())
    path.write_bytes(model.SerializeToString())


def _read_onnx(path: Path) -> Run:
    session = _package("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _package(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ExportError(
            f"--to onnx needs the package {name}, which is not installed; pip install -c constraints.txt -e '.[export]'"
        ) from None


@dataclass(frozen=True, slots=True)
class Format:
    suffix: str
    write: Callable[[SavedModel, Path], None]
    read: Callable[[Path], Run]


# To add a format, write how it is written and read above, and list it here.
FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _read_own),
    "torch": Format(".pt", _write_torch, _read_own),
    "pickle": Format(".pickle.pt", _write_pickle, _read_own),
    "torchscript": Format(".torchscript.pt", _write_torchscript, _read_torchscript),
    "pt2": Format(".pt2", _write_pt2, _read_pt2),
    "onnx": Format(".onnx", _write_onnx, _read_onnx),
}


def read_description(path: Path) -> dict[str, Any]:
    """What an ONNX, TorchScript or pt2 file says of its network: model, classes, normalization, size of images."""
    if path.suffix == ".onnx":
        props = _package("onnx").load(str(path), load_external_data=False).metadata_props
        text = next(prop.value for prop in props if prop.key == METADATA_KEY)
    else:
        extra = {METADATA_KEY: ""}
        if path.suffix == ".pt2":
            torch.export.load(path, extra_files=extra)
        else:
            torch.jit.load(path, _extra_files=extra)
        text = extra[METADATA_KEY]
    found: dict[str, Any] = json.loads(text)
    return found
