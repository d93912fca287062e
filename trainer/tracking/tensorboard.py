"""Writes TensorBoard event files: scalars, images, histograms, curves, the network graph and hyperparameters."""

import errno
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.changes import MAY_CHANGE
from trainer.config.load import flatten
from trainer.config.schema import RunConfig
from trainer.models.inspect import eval_copy
from trainer.run.files import error_reason, finite_json
from trainer.text.escape import one_line
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker

# Free space that each write needs: TensorBoard's thread ends with a traceback when its disk is full.
_MIN_FREE_BYTES = 1 << 16
_MEDIA_BYTES = 4 << 20  # upper limit for the histograms and curves of one evaluation
# Errors that torch.jit.trace raises for networks that it cannot trace.
_TRACE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)
_SPLITS = ("train", "test", "validation")
# TensorBoard shows cards in the order of their tags, and opens on the first ones. So that loss and accuracy come first,
# the scalars that only give the position of a row in the training are left out (the row has its step and time), and the
# tags of pictures and histograms sort after "test/", "train/" and "validation/".
_NOT_SHOWN = {"epoch", "samples", "seconds"}
# Settings that are always on the HPARAMS page. The others are there if they differ from their default.
_MAIN_SETTINGS = (
    "model.name", "data.name", "data.global_batch_size", "optim.name", "optim.lr", "optim.momentum",
    "optim.weight_decay", "schedule.name", "run.seed",
)  # fmt: skip
_PATHS = {"run.name", "run.root", "run.resume", "data.root", "data.cache_dir", "data.download"}
_RESULTS = [f"{split}/{name}" for split in ("validation", "test") for name in ("accuracy", "tta_accuracy", "loss")]
# Charts of the CUSTOM SCALARS page.
_CUSTOM_SCALARS = {
    "samecurve": {
        "loss": ["Multiline", [f"{split}/loss" for split in _SPLITS]],
        "accuracy": ["Multiline", [*(f"{split}/accuracy" for split in _SPLITS), "test/tta_accuracy"]],
        "learning rate": ["Multiline", ["train/lr"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "images per second": ["Multiline", ["train/samples_per_second"]],
        "share of time spent waiting": ["Multiline", ["train/data_wait_share", "train/communication_share"]],
    }
}


class TensorBoardTracker(Tracker):
    """Writes the folder tensorboard/: a scalar `split/name` for each metric, and the media of each evaluation."""

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        """first_step: number of steps before this session. Later points from a killed session are purged."""
        self._folder, self._warn = folder, warn
        has_events = folder.is_dir() and any(folder.iterdir())
        self._writer: Any = None
        try:
            self._writer = self._open_writer(first_step + 1 if has_events else None)
        except OSError as error:
            self._warn_of_missing_points(error)

    def _open_writer(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # lazy import: 1 s

        self._folder.mkdir(exist_ok=True)  # not the run folder: somebody may have renamed it
        self._check_access()
        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def log(self, split: str, scalars: dict[str, float], step: int, wall_time: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # lazy import: 1 s

        # One event for the whole row: SummaryWriter.add_scalar writes one event for each value.
        values = [
            Summary.Value(tag=f"{split}/{name}", simple_value=value)
            for name, value in scalars.items()
            if name not in _NOT_SHOWN
        ]
        self._write(lambda writer: writer.file_writer.add_summary(Summary(value=values), step, wall_time))

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        """Writes the layout of CUSTOM SCALARS, the pictures and the graph. A network without a graph is no error."""

        def write(writer: Any) -> None:
            writer.add_custom_scalars(_CUSTOM_SCALARS)
            for name, picture in pictures.items():
                writer.add_image(_picture_tag(name), picture, 0, dataformats="HWC")

        self._write(write, _required_bytes(pictures))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # torch.jit.trace warns about values that become constants
                traced = torch.jit.trace(eval_copy(network), image, strict=False, check_trace=False)
                self._write(lambda writer: writer.add_graph(traced, image))
        except _TRACE_ERRORS as error:
            reason = one_line(error)
            self._warn(
                f"TensorBoard has no graph, because the network cannot be traced: {type(error).__name__}: {reason}"
            )

    def log_media(self, media: EvaluationMedia) -> None:
        """Writes figures, a precision-recall curve for each class, and histograms of weights and gradients."""

        def write(writer: Any) -> None:
            step, classes = media.step, media.evaluation.get("classes", [])
            for name, picture in media.pictures.items():
                writer.add_image(_picture_tag(name), picture, step, dataformats="HWC")
            class_probabilities = media.predictions.probabilities.unbind(1)
            for label, (row, probabilities) in enumerate(zip(classes, class_probabilities, strict=False)):
                writer.add_pr_curve(f"test/{row['name']}", media.labels == label, probabilities, step)
            for name, histogram in media.histograms.items():
                writer.add_histogram_raw(
                    _histogram_tag(name), min=histogram.edges[0], max=histogram.edges[-1], num=sum(histogram.counts),
                    sum=histogram.sum, sum_squares=histogram.sum_of_squares, bucket_limits=histogram.edges[1:],
                    bucket_counts=histogram.counts, global_step=step,
                )  # fmt: skip

        self._write(write, _required_bytes(media.pictures))

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """Writes one row of the HPARAMS page: the settings that matter, and the last values of the results' scalars."""
        from torch.utils.tensorboard.summary import hparams

        defaults = flatten(RunConfig())
        shown = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
            # TensorBoard keeps the first value of each hyperparameter, and a path is not one.
            if name not in MAY_CHANGE | _PATHS and (name in _MAIN_SETTINGS or value != defaults.get(name))
        }
        results = [tag for tag in _RESULTS if _result(summary, tag) is not None]

        def write(writer: Any) -> None:
            # SummaryWriter.add_hparams would write each result again, as a chart of one point.
            for part in hparams(shown, dict.fromkeys(results, 0.0)):
                writer.file_writer.add_summary(part, summary["steps"])

        self._write(write)

    def flush(self) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            self._drop_writer(error)

    def close(self, failed: bool = False) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._drop_writer(error)

    def _write(self, write: Callable[[Any], object], required_bytes: int = _MIN_FREE_BYTES) -> None:
        """Calls `write` with the SummaryWriter if the disk has required_bytes of free space, else warns."""
        try:
            if self._writer is None or not self._folder.is_dir():
                self._writer = self._open_writer(None)
            self._check_access()
            disk = os.statvfs(self._folder)
            if disk.f_bavail * disk.f_frsize < required_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self._writer)
        except OSError as error:
            self._drop_writer(error)

    def _check_access(self) -> None:
        """Raises PermissionError if no file can be created: TensorBoard's thread would end with a traceback."""
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def _drop_writer(self, error: OSError) -> None:
        """Drops the writer, whose thread has ended after this error. The next row opens a new writer."""
        if self._writer is not None:
            self._warn_of_missing_points(error)
        self._writer = None

    def _warn_of_missing_points(self, error: OSError) -> None:
        self._warn(f"{self._folder} cannot be written ({error_reason(error)}); points are missing until it can")


def _picture_tag(name: str) -> str:
    """Returns the tag of a picture. `test/confusion` stays apart from the charts of `test/`."""
    return "visual/first_batch" if name == "samples" else f"visual/{name.removeprefix('test/')}"


def _histogram_tag(name: str) -> str:
    """Returns the tag of a histogram. A gradient follows its weight: weights/fc.bias/gradient."""
    kind, _, parameter = name.partition("/")
    return f"weights/{parameter}/gradient" if kind == "gradients" else name


def _result(summary: Mapping[str, Any], tag: str) -> float | None:
    """Returns the result of a tag such as "test/loss" in summary.json; None if there is none that is finite."""
    split, _, name = tag.partition("/")
    value: float | None = finite_json((summary.get(split) or {}).get(name))
    return value


def _required_bytes(pictures: Mapping[str, Picture]) -> int:
    """Returns an upper limit for the size of the pictures with the histograms and curves of one evaluation."""
    return _MIN_FREE_BYTES + _MEDIA_BYTES + sum(picture.nbytes for picture in pictures.values())
