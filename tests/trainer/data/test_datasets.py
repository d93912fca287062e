"""CIFAR-10 through torchvision, and the embedded digits."""

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision

from trainer.config.schema import DataSettings
from trainer.data import cifar10, digits
from trainer.errors import DataError


class TestDigits:
    def test_it_is_scikit_learns_split_by_class(self) -> None:
        data = digits.load(DataSettings(name="digits"))
        assert data.train.images.shape == (1433, 32, 32, 1) and data.test.images.shape == (364, 32, 32, 1)
        assert len(data.classes) == 10
        counts = np.bincount(data.test.labels)
        assert counts.min() >= 35 and counts.max() <= 37

    def test_the_pixels_are_the_sources(self) -> None:
        data = digits.load(DataSettings(name="digits", image_size=8))
        from sklearn.datasets import load_digits

        pixels = np.concatenate([data.train.images, data.test.images]).astype(float)
        source = load_digits().images
        assert pixels.max() == 255 and pixels.mean() == pytest.approx(source.mean() * 255 / 16, rel=1e-3)

    def test_three_channels_on_request(self) -> None:
        assert digits.load(DataSettings(name="digits", channels=3)).test.images.shape == (364, 32, 32, 3)


class TestCifar10:
    @pytest.fixture
    def on_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder as torchvision lays it out, with few images: the real archive cannot be had offline, so the
        list of file sums, which torchvision checks, is that of these files."""
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
        name, total = write("batches.meta", {"label_names": list(cifar10._CLASSES)})
        meta = {"filename": name, "key": "label_names", "md5": total}
        monkeypatch.setattr(torchvision.datasets.CIFAR10, "meta", meta)
        return tmp_path / "data"

    def test_it_is_read(self, on_disk: Path) -> None:
        data = cifar10.load(DataSettings(root=str(on_disk), download=False))
        assert data.train.images.shape == (50, 32, 32, 3) and data.test.labels.tolist() == list(range(10))
        assert data.classes[3] == "cat"

    def test_another_size_and_grey(self, on_disk: Path) -> None:
        data = cifar10.load(DataSettings(root=str(on_disk), image_size=16, channels=1))
        assert data.train.images.shape == (50, 16, 16, 1)

    def test_a_changed_file_is_not_read(self, on_disk: Path) -> None:
        (on_disk / torchvision.datasets.CIFAR10.base_folder / "data_batch_0").write_bytes(b"changed")
        with pytest.raises(DataError, match="whole and unchanged"):
            cifar10.load(DataSettings(root=str(on_disk), download=False))

    def test_absent_and_not_to_be_downloaded(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"data\.download=false"):
            cifar10.load(DataSettings(root=str(tmp_path), download=False))

    def test_without_a_network_the_ways_out_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*_: object, **__: object) -> None:
            raise urllib.error.URLError("Name or service not known")

        monkeypatch.setattr("urllib.request.urlopen", no_network)
        with pytest.raises(DataError) as caught:
            cifar10.load(DataSettings(root=str(tmp_path)))
        text = str(caught.value)
        assert all(part in text for part in ("could not be downloaded", "Name or service", "data.root", "image_folder"))
        assert "--config digits" in text and "\n" not in text
