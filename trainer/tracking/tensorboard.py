"""What a run tells in, TensorBoard's event files out."""

import errno
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.changes import MAY_CHANGE
from trainer.models.inspect import eval_copy
from trainer.run.files import disk_errors_as_user_errors, error_reason, finite_json
from trainer.tracking.tracker import EvaluationMedia, Picture, Tracker

_LEAST_BYTES = 1 << 16  # free for TensorBoard, whose thread ends with a traceback when its disk is full
# What a network's code raises when it does not like to be traced, each its own way.
_UNTRACEABLE = (RuntimeError, TypeError, ValueError, AttributeError, AssertionError, LookupError)
_SPLITS = ("train", "test", "validation")
# What the page CUSTOM SCALARS draws into one chart each.
_LAYOUT = {
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
    """tensorboard/: a scalar `split/name` for each metric, and what there is to see beside them."""

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        self._folder, self._warn = folder, warn
        # A run that begins again, be it from its first step, takes back what its killed forerunner wrote beyond that.
        begun_before = folder.is_dir() and any(folder.iterdir())
        self._writer = self._open(first_step + 1 if begun_before else None)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # late: 1 s

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def log(self, split: str, scalars: dict[str, float], step: int, at: float | None = None) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # late, as above

        # One event for the row: SummaryWriter's add_scalar writes one for each value.
        values = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in scalars.items()]
        self._write(lambda writer: writer.file_writer.add_summary(Summary(value=values), step, at))

    def on_start(self, network: nn.Module, image: Tensor, pictures: Mapping[str, Picture]) -> None:
        def write(writer: Any) -> None:
            writer.add_custom_scalars(_LAYOUT)
            for name, picture in pictures.items():
                writer.add_image(name, picture, 0, dataformats="HWC")

        self._write(write, _bytes(pictures))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # of values that a trace keeps as they are
                traced = torch.jit.trace(eval_copy(network), image, strict=False, check_trace=False)
                self._write(lambda writer: writer.add_graph(traced, image))
        except _UNTRACEABLE as error:
            self._warn(f"TensorBoard's graph is left out: {type(error).__name__}: {' '.join(str(error).split())[:160]}")

    def log_media(self, media: EvaluationMedia) -> None:
        def write(writer: Any) -> None:
            step, classes = media.step, media.told.evaluation.get("classes", [])
            for name, picture in media.pictures.items():
                writer.add_image(name, picture, step, dataformats="HWC")
            for label, (row, of_class) in enumerate(zip(classes, media.found.probabilities.unbind(1), strict=False)):
                writer.add_pr_curve(f"test/{row['name']}", media.labels == label, of_class, step)
            for name, found in media.histograms.items():
                writer.add_histogram_raw(
                    name, min=found.edges[0], max=found.edges[-1], num=sum(found.counts), sum=found.sum,
                    sum_squares=found.sum_of_squares, bucket_limits=found.edges[1:], bucket_counts=found.counts,
                    global_step=step,
                )  # fmt: skip

        self._write(write, _bytes(media.pictures))

    def log_summary(self, settings: Mapping[str, Any], summary: Mapping[str, Any], weights: Path) -> None:
        """One row of HPARAMS: the settings that make the experiment, and what they led to."""
        test = summary["test"]
        results = {f"hparam/test_{name}": test[name] for name in ("accuracy", "loss", "tta_accuracy")}
        results |= {"hparam/seconds": summary["seconds"]}
        results = {name: value for name, value in finite_json(results).items() if value is not None}
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()
            if name not in MAY_CHANGE  # TensorBoard keeps the first that it is told
        }
        self._write(lambda writer: writer.add_hparams(plain, results, run_name=".", global_step=summary["steps"]))

    def flush(self) -> None:
        try:
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            self._lose_writer(error)

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            with disk_errors_as_user_errors(str(self._folder)):
                self._writer.close()

    def _write(self, what: Callable[[Any], object], most_bytes: int = _LEAST_BYTES) -> None:
        """most_bytes: that it may write."""
        try:
            if self._writer is None or not self._folder.is_dir():
                self._writer = self._open(None)
            room = os.statvfs(self._folder)
            if room.f_bavail * room.f_frsize < most_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            what(self._writer)
        except OSError as error:
            self._lose_writer(error)

    def _lose_writer(self, error: OSError) -> None:
        """Its own thread is at its end then; at the next row a new one begins."""
        if self._writer is not None:
            self._warn(f"{self._folder} cannot be written ({error_reason(error)}); points are missing until it can")
        self._writer = None


def _bytes(pictures: Mapping[str, Picture]) -> int:
    """What they and as many histograms and curves take at most."""
    return _LEAST_BYTES + (4 << 20) + sum(picture.nbytes for picture in pictures.values())
