"""Loads CIFAR-10 through torchvision, which checks the MD5 sum of every file, and downloads it when it is missing.

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
from trainer.data import cifar10_files
from trainer.data.dataset import ArrayDataset, ArraySplit, checksum_images
from trainer.data.images.decode import fit_images
from trainer.errors import DataError
from trainer.text.escape import one_line

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANNELS = 3
_CONNECT_TIMEOUT_SECONDS = 20.0


def load(data: DataSettings) -> ArrayDataset:
    """Returns the 50,000 training and 10,000 test images of ten classes.

    Raises DataError when the files are not on disk and cannot be downloaded.
    """
    root = Path(data.root).expanduser()
    return ArrayDataset(_load_split(data, root, train=True), _load_split(data, root, train=False), CLASSES)


def count_per_class(data: DataSettings) -> list[int]:
    """Returns the number of training images of each class."""
    return [5000] * len(CLASSES)


def check_files(data: DataSettings) -> None:
    """Raises DataError if a file is missing and cannot be downloaded. Reads none of them."""
    if not cifar10_files.are_present(Path(data.root).expanduser()):
        if not data.download:
            raise _missing_error(data, "data.download=false")
        if problem := cifar10_files.download_problem():
            raise _missing_error(data, f"it cannot be downloaded ({problem})")


def _load_split(data: DataSettings, root: Path, train: bool) -> ArraySplit:
    from torchvision.datasets import CIFAR10  # lazy import: 2 s

    try:
        source = CIFAR10(str(root), train=train, download=False)
    except RuntimeError:  # a file is missing, or its MD5 sum does not match
        if not data.download:
            raise _missing_error(data, "data.download=false") from None
        try:
            with _silent_with_connect_timeout():
                source = CIFAR10(str(root), train=train, download=True)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise _missing_error(data, f"it could not be downloaded ({one_line(error, None)})") from None
    images = fit_images(source.data, data.side_pixels, 1 if data.channels == 1 else 3)
    return ArraySplit(images, np.asarray(source.targets, dtype=np.int64), checksum_images(source.data))


def _missing_error(data: DataSettings, reason: str) -> DataError:
    folder = Path(data.root).expanduser() / cifar10_files.FOLDER
    return DataError(
        f"no complete and unchanged CIFAR-10 in {folder} (data.root={data.root}), and {reason}. "
        "Set data.root to the folder that contains it, or use its images as files with data.name=image_folder, "
        "or train on data that needs no download with --config digits"
    )


@contextlib.contextmanager
def _silent_with_connect_timeout() -> Iterator[None]:
    """Bounds the wait for a server and hides stdout: torchvision waits without limit and prints its progress."""
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_CONNECT_TIMEOUT_SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(timeout_before)
