"""Exports a trained network to a file, loads that file again and compares its logits before the file is kept.

    onnx, torchscript, pt2   the whole program, with normalization and for any batch size:
                             uint8 images [batch, C, H, W] to logits float32 [batch, num_classes]
    safetensors, torch       the weights alone; loading these files cannot execute code
    pickle                   the whole module as torch.save writes it; loading it can execute any code

Each file contains, as JSON under the key `samecurve`, the model's settings, classes, normalization, image size and
channels.
"""

import io
import json
import os
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.errors import ExportError, UserError, suggest_choice
from trainer.inference.saved_model import METADATA_KEY, SavedModel, load_model
from trainer.run.files import DISK_ERRORS, error_reason

_TESTED_BATCH_SIZES = (1, 6, 64)  # several: a traced program may have one batch size built in
_TOLERANCE = 1e-4  # relative to the largest logit, but at least to 1
_ONNX_OPSET = 18
_MAX_REASON_LENGTH = 200

Run = Callable[[Tensor], Tensor]
"""Runs an exported file: uint8 images [B, C, H, W] to logits float32 [B, num_classes]."""


class Program(nn.Module):
    """Normalization and network in one module: uint8 [B, C, H, W] to logits float32 [B, num_classes]."""

    def __init__(self, model: SavedModel) -> None:
        super().__init__()
        normalization = model.metadata.normalization
        mean, std = torch.tensor(normalization.mean), torch.tensor(normalization.std)
        self.scale = nn.Buffer((1 / (255 * std)).view(1, -1, 1, 1))
        self.shift = nn.Buffer((-mean / std).view(1, -1, 1, 1))
        self.network = model.module.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.float() * self.scale + self.shift)
        return logits


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A file that was written, loaded again and compared."""

    path: Path
    size_bytes: int
    largest_difference: float
    """between a logit of the loaded file and of the run's network, absolute"""


def export_model(
    run: Path, to: str, out: Path | None = None, weights: str = "auto", allow_pickle: bool = False
) -> ExportedFile:
    """Exports the network of a run folder, a checkpoint folder or a file of weights.

    to: a key of FORMATS; out: by default RUN/export/NAME.SUFFIX; weights, allow_pickle: as load_model takes them.
    Raises FolderError if there are no such weights. Raises ExportError if a package is missing, the network cannot be
    written in this format, the file cannot be written, or its logits differ from the network's.
    """
    if to not in FORMATS:
        raise ExportError(f"--to {to}: {suggest_choice(to, FORMATS)}")
    model = load_model(run, weights, torch.device("cpu"), allow_pickle)
    file_format = FORMATS[to]
    out = out or _default_path(run, weights, file_format.suffix)
    required_suffix = Path(f"x{file_format.suffix}").suffix
    if out.suffix != required_suffix:  # readers choose the format by the suffix, and so does load_model
        raise ExportError(f"--out {out}: expected a name that ends in {required_suffix} for --to {to}; rename the file")
    partial = out.with_name(f".{out.stem}.{os.getpid()}.partial{file_format.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.touch()
            mode = partial.stat().st_mode
            file_format.write(model, partial)
            difference = _largest_difference(model, file_format.load(partial))
            partial.chmod(mode)  # some writers create the file anew with other permissions
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    except DISK_ERRORS as error:
        raise ExportError(f"{out} cannot be written ({error_reason(error)}); choose another path with --out") from None
    except UserError:
        raise
    except Exception as error:  # every error: what an exporter raises for a network it does not support has no limits
        reason = textwrap.shorten(str(error) or type(error).__name__, _MAX_REASON_LENGTH, placeholder=" ...")
        raise ExportError(
            f"{model.metadata.model.name} cannot be written as {to} ({reason}); choose another format with --to"
        ) from None
    return ExportedFile(out, out.stat().st_size, difference)


def _default_path(run: Path, weights: str, suffix: str) -> Path:
    folder = run if run.is_dir() else run.parent
    name = folder.resolve().name if run.is_dir() else run.stem
    return folder / "export" / f"{name}{'' if weights == 'auto' else f'-{weights}'}{suffix}"


def _largest_difference(model: SavedModel, run_exported: Run) -> float:
    """Returns the largest absolute difference of a logit over random images in batches of several sizes.

    Raises ExportError if a difference is above the tolerance.
    """
    metadata, generator = model.metadata, torch.Generator().manual_seed(0)
    largest = 0.0
    for batch_size in _TESTED_BATCH_SIZES:
        shape = (batch_size, metadata.channels, metadata.image_size, metadata.image_size)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        expected, actual = model.logits(images), run_exported(images)
        if actual.shape != expected.shape:
            raise ExportError(
                f"the exported file returns logits of shape {tuple(actual.shape)} instead of {tuple(expected.shape)} "
                f"for a batch of {batch_size}, so it was deleted; choose another format with --to"
            )
        difference = float((actual - expected).abs().max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise ExportError(
                f"the logits of the exported file differ from the network's by {difference:.2g}, so it was deleted; "
                "choose another format with --to"
            )
        largest = max(largest, difference)
    return largest


def _example_images(model: SavedModel) -> Tensor:
    """Returns two images: exporters take a batch of one for a constant batch size."""
    metadata = model.metadata
    return torch.zeros(2, metadata.channels, metadata.image_size, metadata.image_size, dtype=torch.uint8)


def _state_dict(model: SavedModel) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.module.state_dict().items()}


def _write_safetensors(model: SavedModel, path: Path) -> None:
    save_file(_state_dict(model), path, model.metadata.to_file_metadata())


def _write_torch(model: SavedModel, path: Path) -> None:
    _torch_save({"state_dict": _state_dict(model), **model.metadata.to_file_metadata()}, path)


def _write_pickle(model: SavedModel, path: Path) -> None:
    _torch_save({"module": model.module, **model.metadata.to_file_metadata()}, path)


def _torch_save(content: dict[str, Any], path: Path) -> None:
    """Saves through memory: PyTorch's file writer aborts the process when a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def _load_weights(path: Path) -> Run:
    return load_model(path, device=torch.device("cpu"), allow_pickle=True).logits


def _write_torchscript(model: SavedModel, path: Path) -> None:
    with warnings.catch_warnings():
        # Tracing warns of shapes that are constants of the network, and that TorchScript is deprecated.
        warnings.simplefilter("ignore")
        # export_model compares logits. PyTorch's own check compares graphs, which may differ from trace to trace.
        script = torch.jit.trace(Program(model).eval(), _example_images(model), check_trace=False)
        buffer = io.BytesIO()
        torch.jit.save(script, buffer, _extra_files=model.metadata.to_file_metadata())
    path.write_bytes(buffer.getvalue())


def _load_torchscript(path: Path) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        run: Run = torch.jit.load(path)
    return torch.no_grad()(run)


def _export_program(model: SavedModel) -> Any:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    return torch.export.export(Program(model).eval(), (_example_images(model),), dynamic_shapes=shapes)


def _write_pt2(model: SavedModel, path: Path) -> None:
    buffer = io.BytesIO()
    torch.export.save(_export_program(model), buffer, extra_files=model.metadata.to_file_metadata())
    path.write_bytes(buffer.getvalue())


def _load_pt2(path: Path) -> Run:
    return torch.no_grad()(torch.export.load(path).module())


def _write_onnx(model: SavedModel, path: Path) -> None:
    onnx = _import_for_onnx("onnx")
    _import_for_onnx("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _export_program(model), (), input_names=["images"], output_names=["logits"], dynamo=True,
            opset_version=_ONNX_OPSET, verbose=False,
        )  # fmt: skip
    onnx_model = program.model_proto  # type: ignore[union-attr]
    onnx.helper.set_model_props(onnx_model, model.metadata.to_file_metadata())
    path.write_bytes(onnx_model.SerializeToString())


def _load_onnx(path: Path) -> Run:
    session = _import_for_onnx("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _import_for_onnx(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise ExportError(
            f"--to onnx needs the package {package}, which is not installed; install it with pip install {package}"
        ) from None


@dataclass(frozen=True, slots=True)
class Format:
    """How a file format is written and loaded."""

    suffix: str
    write: Callable[[SavedModel, Path], None]
    load: Callable[[Path], Run]


# To add a format, write its two functions above, and list it here and in launch/commands/export.py.
FORMATS = {
    "safetensors": Format(".safetensors", _write_safetensors, _load_weights),
    "torch": Format(".pt", _write_torch, _load_weights),
    "pickle": Format(".pickle.pt", _write_pickle, _load_weights),
    "torchscript": Format(".torchscript.pt", _write_torchscript, _load_torchscript),
    "pt2": Format(".pt2", _write_pt2, _load_pt2),
    "onnx": Format(".onnx", _write_onnx, _load_onnx),
}


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns the metadata in an ONNX, TorchScript or pt2 file: model, classes, normalization, image_size, channels."""
    if path.suffix == ".onnx":
        properties = _import_for_onnx("onnx").load(str(path), load_external_data=False).metadata_props
        text = next(prop.value for prop in properties if prop.key == METADATA_KEY)
    else:
        extra_files = {METADATA_KEY: ""}
        if path.suffix == ".pt2":
            torch.export.load(path, extra_files=extra_files)
        else:
            torch.jit.load(path, _extra_files=extra_files)
        text = extra_files[METADATA_KEY]
    metadata: dict[str, Any] = json.loads(text)
    return metadata
