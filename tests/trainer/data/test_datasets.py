"""The data sets CIFAR-10 (read through torchvision) and digits, and the counts of training images."""

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision

from trainer.config.schema import DataSettings, TrainSettings
from trainer.data import cifar10, digits
from trainer.data.image_counts import check_batch_size, count_training_images
from trainer.data.splits import load_splits
from trainer.distributed.world import World
from trainer.errors import DataError


class TestDigits:
    def test_split_is_balanced_by_class(self) -> None:
        data = digits.load(DataSettings(name="digits"))
        assert data.train.images.shape == (1433, 32, 32, 1) and data.test.images.shape == (364, 32, 32, 1)
        assert len(data.classes) == 10
        counts = np.bincount(data.test.labels)
        assert counts.min() >= 35 and counts.max() <= 37

    def test_pixels_equal_scikit_learns(self) -> None:
        data = digits.load(DataSettings(name="digits", image_size=8))
        from sklearn.datasets import load_digits

        pixels = np.concatenate([data.train.images, data.test.images]).astype(float)
        source = load_digits().images
        assert pixels.max() == 255 and pixels.mean() == pytest.approx(source.mean() * 255 / 16, rel=1e-3)

    def test_channels_3_gives_rgb(self) -> None:
        assert digits.load(DataSettings(name="digits", channels=3)).test.images.shape == (364, 32, 32, 3)

    def test_count_per_class_equals_loaded_images(self) -> None:
        settings = DataSettings(name="digits", image_size=8)
        assert digits.count_per_class(settings) == np.bincount(digits.load(settings).train.labels).tolist()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.33])
def test_count_training_images_equals_loaded_training_split(fraction: float) -> None:
    data = DataSettings(name="digits", validation_fraction=fraction)
    splits = load_splits(data, seed=0, world=World(TrainSettings(device="cpu")))
    assert count_training_images(data) == len(splits.train)


def test_training_set_without_images_is_refused_as_such() -> None:
    with pytest.raises(DataError, match="the training set has no images; add some"):
        check_batch_size(DataSettings(), 0)


def test_class_with_one_image_cannot_be_held_out(image_folder: Path) -> None:
    for path in sorted((image_folder / "train").rglob("*.png")):
        if path.name != "0.png":
            path.unlink()
    data = DataSettings(name="image_folder", root=str(image_folder), validation_fraction=0.1)
    with pytest.raises(DataError, match=r"too few to hold some out for validation; add some, or set data\."):
        count_training_images(data)


class TestCifar10:
    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A data.root in torchvision's layout, with few random images: the real archive is not available offline.
        torchvision checks MD5 sums of all files, so its list of sums is replaced by those of these files."""
        folder = tmp_path / "data" / torchvision.datasets.CIFAR10.base_folder
        folder.mkdir(parents=True)

        def write(name: str, content: object) -> list[str]:
            (folder / name).write_bytes(pickle.dumps(content))
            return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

        def batch(seed: int) -> dict[str, object]:
            pixels = np.random.default_rng(seed).integers(0, 256, (10, 3072), dtype=np.uint8)
            return {"data": pixels, "labels": list(range(10))}

        sums = [write(f"data_batch_{index}", batch(index)) for index in range(5)]
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", sums)
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [write("test_batch", batch(9))])
        name, md5 = write("batches.meta", {"label_names": list(cifar10.CLASSES)})
        meta = {"filename": name, "key": "label_names", "md5": md5}
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
        return tmp_path / "data"

    def test_files_on_disk_are_read(self, root: Path) -> None:
        data = cifar10.load(DataSettings(root=str(root), download=False))
        assert data.train.images.shape == (50, 32, 32, 3) and data.test.labels.tolist() == list(range(10))
        assert data.classes[3] == "cat"

    def test_image_size_and_channels_are_applied(self, root: Path) -> None:
        data = cifar10.load(DataSettings(root=str(root), image_size=16, channels=1))
        assert data.train.images.shape == (50, 16, 16, 1)

    def test_file_with_wrong_md5_sum_is_refused(self, root: Path) -> None:
        (root / torchvision.datasets.CIFAR10.base_folder / "data_batch_0").write_bytes(b"changed")
        with pytest.raises(DataError, match=r"no complete and unchanged CIFAR-10 in .*cifar-10-batches-py"):
            cifar10.load(DataSettings(root=str(root), download=False))

    def test_missing_files_without_download_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data\.download=false"):
            cifar10.load(DataSettings(root=str(tmp_path), download=False))

    def test_failed_download_error_names_alternatives(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*_: object, **__: object) -> None:
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr("urllib.request.urlopen", no_network)
        with pytest.raises(DataError) as raised:
            cifar10.load(DataSettings(root=str(tmp_path)))
        text = str(raised.value)
        assert all(word in text for word in ("could not be downloaded", "Name or service", "data.root", "image_folder"))
        assert "--config digits" in text and "\n" not in text
