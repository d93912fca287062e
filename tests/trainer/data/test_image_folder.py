"""Image folders: images, labels and classes, the cache of decoded images, and errors."""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import write_image

from trainer.config.schema import DataSettings
from trainer.data import cache
from trainer.data import image_folder as image_module
from trainer.data.dataset import ArrayDataset
from trainer.errors import DataError


def load(root: Path, **settings: object) -> ArrayDataset:
    return image_module.load(DataSettings(name="image_folder", root=str(root), **settings))  # type: ignore[arg-type]


def test_load_returns_classes_images_and_labels(image_folder: Path) -> None:
    data = load(image_folder)
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (12, 32, 32, 3) and data.train.images.dtype == np.uint8
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(image_folder / "test" / "dog" / "1.png"))
    assert np.array_equal(data.test.images[4], expected)


def test_training_split_interleaves_classes(image_folder: Path) -> None:
    # In the folders' order an epoch without data.shuffle would be one class after the other.
    data = load(image_folder)
    assert data.train.labels.tolist() == [0, 1] * 6
    expected = np.asarray(Image.open(image_folder / "train" / "dog" / "2.png"))
    assert np.array_equal(data.train.images[5], expected)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".png", "RGB"), (".png", "L"), (".png", "P"), (".png", "RGBA"), (".png", "LA"), (".png", "1"),
     (".jpg", "RGB"), (".jpg", "L"), (".jpg", "CMYK"), (".JPEG", "RGB"), (".webp", "RGB"), (".bmp", "RGB"),
     (".gif", "P"), (".tif", "RGB")],
)  # fmt: skip
@pytest.mark.parametrize("size", [(32, 32), (50, 40), (9, 100)])
def test_every_format_mode_and_size_is_read(image_folder: Path, suffix: str, mode: str, size: tuple[int, int]) -> None:
    write_image(image_folder / "train" / "cat" / f"added{suffix}", seed=9, size=size, mode=mode)
    data = load(image_folder)
    assert data.train.images.shape == (13, 32, 32, 3)
    assert data.train.images[data.train.labels == 0][-1].std() > 5


def test_channels_1_gives_grey_images(image_folder: Path) -> None:
    assert load(image_folder, channels=1).train.images.shape == (12, 32, 32, 1)


def test_count_per_class_equals_loaded_images(image_folder: Path) -> None:
    write_image(image_folder / "train" / "dog" / "more" / "x.png", seed=4)
    settings = DataSettings(name="image_folder", root=str(image_folder))
    assert image_module.count_per_class(settings) == [6, 7]
    assert np.bincount(image_module.load(settings).train.labels).tolist() == [6, 7]


def test_second_load_reads_the_cache(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = load(image_folder)
    monkeypatch.setattr(cache, "_decode_all", lambda *_: pytest.fail("decoded again"))
    cached = load(image_folder)
    assert np.array_equal(decoded.train.images, cached.train.images)
    assert np.array_equal(decoded.test.labels, cached.test.labels)


def test_changed_file_of_the_same_size_is_decoded_again(image_folder: Path) -> None:
    path = image_folder / "train" / "cat" / "0.bmp"  # not compressed, so that its size does not change
    write_image(path, seed=76)
    before, size_bytes = load(image_folder), path.stat().st_size
    write_image(path, seed=77)
    os.utime(path, ns=(1, 1))
    after = load(image_folder)
    assert path.stat().st_size == size_bytes
    assert not np.array_equal(before.train.images[0], after.train.images[0])


def test_changed_image_size_is_decoded_again(image_folder: Path) -> None:
    load(image_folder)
    assert load(image_folder, image_size=16).train.images.shape == (12, 16, 16, 3)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY garbage", None])
def test_damaged_cache_is_replaced(image_folder: Path, damage: bytes | None) -> None:
    expected = load(image_folder)
    (cache_file,) = (image_folder / ".samecurve").iterdir()
    cache_file.write_bytes(cache_file.read_bytes()[:-100] if damage is None else damage)
    assert np.array_equal(load(image_folder).train.images, expected.train.images)


def test_cache_of_another_shape_is_replaced(image_folder: Path) -> None:
    expected = load(image_folder)
    (cache_file,) = (image_folder / ".samecurve").iterdir()
    np.save(cache_file, np.zeros((18, 16, 16, 3), dtype=np.uint8))
    assert np.array_equal(load(image_folder).train.images, expected.train.images)


def test_unwritable_cache_folder_gives_a_note(image_folder: Path) -> None:
    file = image_folder / "file"
    file.write_text("")
    data = load(image_folder, cache_dir=str(file / "cache"))
    assert len(data.train) == 12 and "set data.cache_dir" in data.notes[0]


def test_full_disk_is_reported_before_decoding(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posix_fallocate, calls = os.posix_fallocate, []

    def fail_first_call(*arguments: int) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        posix_fallocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", fail_first_call)
    data = load(image_folder)
    assert "No space left" in data.notes[0] and not list((image_folder / ".samecurve").iterdir())
    assert np.array_equal(load(image_folder).train.images, data.train.images)


def test_partial_file_of_a_killed_process_is_deleted_after_a_day(image_folder: Path) -> None:
    cache_folder = image_folder / ".samecurve"
    cache_folder.mkdir()
    for name, age_seconds in ((".old.partial", 2 * 86400), (".new.partial", 60)):
        (cache_folder / name).write_bytes(b"half")
        os.utime(cache_folder / name, (time.time() - age_seconds,) * 2)
    load(image_folder)
    assert {path.name for path in cache_folder.glob(".*")} == {".new.partial"}


def test_corrupt_file_leaves_no_partial_cache(image_folder: Path) -> None:
    (image_folder / "train" / "dog" / "3.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="unknown image format"):
        load(image_folder)
    assert not list((image_folder / ".samecurve").iterdir())


@pytest.mark.parametrize(("min_seconds_for_pool", "num_pools"), [(0.0, 1), (60.0, 0)])
def test_slow_decoding_uses_all_cores(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, min_seconds_for_pool: float, num_pools: int
) -> None:
    pools: list[int] = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, workers: int, **options: Any) -> None:
            pools.append(workers)
            super().__init__(workers, **options)

    expected = load(image_folder, cache_dir=str(image_folder / "one"))
    monkeypatch.setattr(cache, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(cache, "_MIN_SECONDS_FOR_POOL", min_seconds_for_pool)
    monkeypatch.setattr(cache, "_FILES_PER_TASK", 5)
    monkeypatch.setattr(cache, "_FIRST_TASK_FILES", 2)
    monkeypatch.setattr(cache, "available_cores", lambda: 2)
    data = load(image_folder, cache_dir=str(image_folder / "two"))
    assert np.array_equal(expected.train.images, data.train.images)
    assert np.array_equal(expected.test.images, data.test.images)
    assert pools == [2] * num_pools


def test_nested_folders_are_read_and_other_files_ignored(image_folder: Path) -> None:
    write_image(image_folder / "train" / "cat" / "more" / "x.png", seed=4)
    (image_folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (image_folder / "train" / "cat" / ".hidden.png").write_text("not an image")
    (image_folder / "train" / "README").write_text("not a class")
    assert len(load(image_folder).train) == 13


def test_link_to_an_image_is_read(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "again.png").symlink_to(image_folder / "test" / "cat" / "0.png")
    assert len(load(image_folder).train) == 13


class TestErrors:
    def assert_refused(self, root: Path, *words: str) -> None:
        with pytest.raises(DataError) as raised:
            load(root)
        text = str(raised.value)
        assert all(word in text for word in words) and "\n" not in text

    def test_missing_root_is_refused(self, tmp_path: Path) -> None:
        self.assert_refused(tmp_path / "nowhere", "no folder", "nowhere", "Set data.root")

    def test_root_without_class_folders_is_refused(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            (tmp_path / "empty" / split).mkdir(parents=True)
        self.assert_refused(tmp_path / "empty", "no class folders")

    def test_class_missing_from_test_is_refused(self, image_folder: Path) -> None:
        write_image(image_folder / "train" / "bird" / "0.png", seed=1)
        self.assert_refused(image_folder, "class bird", "missing from", "test")

    def test_class_missing_from_train_is_refused(self, image_folder: Path) -> None:
        write_image(image_folder / "test" / "bird" / "0.png", seed=1)
        self.assert_refused(image_folder, "class bird", "missing from", "train")

    def test_empty_class_folder_is_refused(self, image_folder: Path) -> None:
        for split in ("train", "test"):
            (image_folder / split / "bird").mkdir()
        self.assert_refused(image_folder, "train/bird is empty", "expected image files")

    @pytest.mark.parametrize("target", ["nowhere.png", "."])
    def test_dangling_or_circular_link_is_refused(self, image_folder: Path, target: str) -> None:
        (image_folder / "train" / "cat" / "link.png").symlink_to(target)
        self.assert_refused(image_folder, "cannot read", "link.png")

    def test_class_name_that_is_not_utf8_is_refused(self, image_folder: Path) -> None:
        for split in ("train", "test"):
            write_image(image_folder / split / "\udcff" / "0.png", seed=1)
        self.assert_refused(image_folder, "'\\udcff'", "not readable UTF-8")

    @pytest.mark.parametrize("content", [b"", b"not an image", None])
    def test_corrupt_file_is_refused(self, image_folder: Path, content: bytes | None) -> None:
        path = image_folder / "train" / "dog" / "3.png"
        path.write_bytes(path.read_bytes()[:-40] if content is None else content)
        self.assert_refused(image_folder, "corrupt image", "train/dog/3.png", "replace or remove")
