"""CIFAR-10 through torchvision, which checks the MD5 sum of every file; downloaded when it is not there.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

import contextlib
import io
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.config.schema import DataSettings
from trainer.data.dataset import ArrayDataset, ArraySplit
from trainer.data.decode import fit_images
from trainer.errors import DataError

_CONNECT_TIMEOUT_SECONDS = 20.0


def load(data: DataSettings) -> ArrayDataset:
    """50,000 and 10,000 images of ten classes. Raises DataError where they are neither on disk nor to be had."""
    root = Path(data.root).expanduser()
    return ArrayDataset(_split(data, root, train=True), _split(data, root, train=False), _CLASSES)


def count_per_class(data: DataSettings) -> list[int]:
    """Training images of each class."""
    return [5000] * len(_CLASSES)


_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _split(data: DataSettings, root: Path, train: bool) -> ArraySplit:
    from torchvision.datasets import CIFAR10  # late: 2 s

    missing = (
        f"CIFAR-10 is not under data.root={data.root} (wanted {root / CIFAR10.base_folder}, whole and unchanged){{}}. "
        "Set data.root to the folder that holds it, or use its images as files with data.name=image_folder, "
        "or train on data that needs no download with --config digits"
    )
    try:
        source = CIFAR10(str(root), train=train, download=False)
    except RuntimeError:  # not there, or its sums do not match
        if not data.download:
            raise DataError(missing.format(", and data.download=false")) from None
        try:
            with _quiet_and_bounded():
                source = CIFAR10(str(root), train=train, download=True)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            reason = " ".join(str(error).split())
            raise DataError(missing.format(f", and it could not be downloaded ({reason})")) from None
    images = fit_images(source.data, data.side_pixels, 1 if data.channels == 1 else 3)
    return ArraySplit(images, np.asarray(source.targets, dtype=np.int64))


@contextlib.contextmanager
def _quiet_and_bounded() -> Iterator[None]:
    """torchvision waits without limit for a server that does not answer, and prints to stdout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)
