"""Image folders: images, labels and classes, the cache of decoded images, and errors."""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import write_image

from trainer.config.schema import DataSettings
from trainer.data import image_folder as image_module
from trainer.data.dataset import ArrayDataset
from trainer.data.images import cache, pool
from trainer.data.images.files import EXTENSIONS
from trainer.data.images.pack import release_packs
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
    monkeypatch.setattr(cache, "decode_files", lambda *_: pytest.fail("decoded again"))
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
    for cache_file in (image_folder / ".samecurve").iterdir():
        cache_file.write_bytes(cache_file.read_bytes()[:-100] if damage is None else damage)
    assert np.array_equal(load(image_folder).train.images, expected.train.images)


def test_cache_of_another_shape_is_replaced(image_folder: Path) -> None:
    expected = load(image_folder)
    for cache_file in (image_folder / ".samecurve").iterdir():
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
        if len(calls) <= 2:  # the packs of train and test
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


class TestDamagedFiles:
    def damage(self, root: Path, count: int) -> list[Path]:
        """Damages the first files of train/dog/ and one of test/, each in another way."""
        paths = [*sorted((root / "train" / "dog").iterdir())[: count - 1], root / "test" / "cat" / "0.png"]
        for index, path in enumerate(paths):
            path.write_bytes((b"", b"not an image", path.read_bytes()[:-60])[index % 3])
        return paths

    def test_all_of_both_splits_are_named_at_once(self, image_folder: Path) -> None:
        paths = self.damage(image_folder, 4)
        with pytest.raises(DataError) as raised:
            load(image_folder)
        text = str(raised.value)
        assert text.startswith(f"4 of 18 image files in {image_folder} cannot be decoded: ") and "\n" not in text
        assert all(path.relative_to(image_folder).as_posix() in text for path in paths)
        assert all(word in text for word in ("the file is empty", "unknown image format", "replace or remove"))

    def test_ten_are_named_and_the_others_counted(self, image_folder: Path) -> None:
        for index in range(15):
            (image_folder / "train" / "cat" / f"damaged_{index:02}.png").write_bytes(b"not an image")
        with pytest.raises(DataError, match=r"15 of 33 image files .*damaged_09\.png .*, and 5 more; ") as raised:
            load(image_folder)
        assert "damaged_10" not in str(raised.value)

    def test_sound_files_are_decoded_once(self, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        paths = self.damage(image_folder, 3)
        decoded: list[str] = []
        inodes: list[set[int]] = []
        decode_files = cache.decode_files

        def record(files: list[str], *arguments: Any) -> Any:
            decoded.extend(files)
            return decode_files(files, *arguments)

        monkeypatch.setattr(cache, "decode_files", record)
        for _ in range(2):
            with pytest.raises(DataError, match="3 of 18"):
                load(image_folder)
            inodes.append({path.stat().st_ino for path in (image_folder / ".samecurve").iterdir()})
        assert inodes[0] == inodes[1]  # no pack was written again
        assert sorted(decoded[18:]) == sorted(map(str, paths))  # at the second start
        decoded.clear()
        for index, path in enumerate(paths):
            write_image(path, seed=70 + index)
        data = load(image_folder)
        assert sorted(decoded) == sorted(map(str, paths))
        expected = load(image_folder, cache_dir=str(image_folder / "fresh"))
        assert np.array_equal(data.train.images, expected.train.images)
        assert np.array_equal(data.train.checksums, expected.train.checksums)  # type: ignore[arg-type]
        assert np.array_equal(data.test.images, expected.test.images)


def test_added_and_removed_files_leave_the_others_decoded(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(image_folder)
    write_image(image_folder / "train" / "cat" / "25.png", seed=8)
    (image_folder / "train" / "cat" / "1.png").unlink()
    (image_folder / "train" / "dog" / "1.png").rename(image_folder / "train" / "dog" / "9.png")
    decoded: list[str] = []
    decode_files = cache.decode_files
    monkeypatch.setattr(cache, "decode_files", lambda files, *rest: decoded.extend(files) or decode_files(files, *rest))
    data = load(image_folder)
    assert [Path(path).name for path in decoded] == ["25.png", "9.png"]
    expected = load(image_folder, cache_dir=str(image_folder / "fresh"))
    assert np.array_equal(data.train.images, expected.train.images)
    assert np.array_equal(data.train.checksums, expected.train.checksums)  # type: ignore[arg-type]


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
    monkeypatch.setattr(pool, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(pool, "_MIN_SECONDS_FOR_POOL", min_seconds_for_pool)
    monkeypatch.setattr(pool, "_FILES_PER_TASK", 5)
    monkeypatch.setattr(pool, "_FIRST_TASK_FILES", 2)
    monkeypatch.setattr(pool, "available_cores", lambda: 2)
    data = load(image_folder, cache_dir=str(image_folder / "two"))
    assert np.array_equal(expected.train.images, data.train.images)
    assert np.array_equal(expected.test.images, data.test.images)
    assert pools == [2] * num_pools  # for train: test has too few files


def test_killed_decoding_process_is_an_error_in_one_line(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool(ProcessPoolExecutor):
        def map(self, *arguments: Any, **options: Any) -> Any:
            results = super().map(*arguments, **options)
            os.kill(next(iter(self._processes)), signal.SIGKILL)
            return results

    for name, value in {"ProcessPoolExecutor": Pool, "_MIN_SECONDS_FOR_POOL": 0.0, "_FIRST_TASK_FILES": 2}.items():
        monkeypatch.setattr(pool, name, value)
    monkeypatch.setattr(pool, "_FILES_PER_TASK", 5)
    monkeypatch.setattr(pool, "available_cores", lambda: 2)
    with pytest.raises(DataError, match=r"a decoding process is gone \(probably out of memory\); "):
        load(image_folder)
    assert not list((image_folder / ".samecurve").glob(".*.partial"))


def test_endings_are_those_that_every_pillow_reads(image_folder: Path) -> None:
    Image.init()
    assert all(Image.registered_extensions()[ending] in Image.OPEN for ending in EXTENSIONS)
    (image_folder / "train" / "cat" / "new.avif").write_bytes(b"needs Pillow 11.3, and a build with AVIF")
    assert "skipped 1 file that is not an image (1 .avif)" in load(image_folder).notes[0]


def test_nested_folders_are_read_and_other_files_ignored(image_folder: Path) -> None:
    write_image(image_folder / "train" / "cat" / "more" / "x.png", seed=4)
    (image_folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (image_folder / "train" / "cat" / "._x.jpg").write_text("not an image")
    write_image(image_folder / "train" / "dog" / ".ipynb_checkpoints" / "x.png", seed=4)
    write_image(image_folder / "test" / "dog" / "@eaDir" / "x.png", seed=4)
    (image_folder / "train" / "README").write_text("not a class")
    data = load(image_folder)
    assert len(data.train) == 13 and len(data.test) == 6
    expected = "skipped 5 files that are not images (3 hidden, 1 .txt, 1 outside the class folders)"
    assert data.notes == (f"{expected} in {image_folder}",)
    assert load(image_folder).notes == data.notes  # from the packs, too


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.tiff", "a.ppm", "a.tga", "a.jp2", "a.dib"])
def test_other_endings_are_read(image_folder: Path, name: str) -> None:
    write_image(image_folder / "train" / "cat" / "source.png", seed=4)
    source = image_folder / "train" / "cat" / "source.png"
    format = {".jfif": "JPEG", ".jpe": "JPEG"}.get(Path(name).suffix.lower())
    Image.open(source).save(image_folder / "train" / "cat" / name, format)
    source.unlink()
    assert len(load(image_folder).train) == 13


def test_range_of_16_bit_grey_is_noted_at_every_start(image_folder: Path) -> None:
    for name, highest in (("8.png", 255), ("12.png", 4000), ("16.png", 50_000)):
        pixels = np.full((8, 8), highest, np.uint16)
        Image.fromarray(pixels).save(image_folder / "train" / "cat" / name)
    counts = "1 as 0 to 255, 1 as 0 to 4,095, 1 as 0 to 65,535"
    note = f"images of 16-bit grey are scaled by the values that each one uses: {counts}"
    assert load(image_folder).notes == load(image_folder).notes == (note,)
    write_image(image_folder / "train" / "cat" / "new.png", seed=1)
    data = load(image_folder)
    assert data.notes == (note,) and data.train.images.max(axis=(1, 2, 3)).min() > 190


def test_pipes_are_skipped(image_folder: Path) -> None:
    """Opening one would wait for ever."""
    os.mkfifo(image_folder / "train" / "cat" / "pipe.png")
    (image_folder / "train" / "cat" / "link.png").symlink_to("pipe.png")
    data = load(image_folder)
    assert len(data.train) == 12 and "2 .png" in data.notes[0]


class TestClasses:
    def rename(self, root: Path, new_names: dict[str, str], splits: tuple[str, ...] = ("train", "test")) -> None:
        for split in splits:
            for old, new in new_names.items():
                (root / split / old).rename(root / split / new)

    def test_order_is_alphabetical_or_natural(self, image_folder: Path) -> None:
        self.rename(image_folder, {"cat": "class10", "dog": "class2"})
        assert load(image_folder).classes == ("class10", "class2")
        assert load(image_folder, class_order="natural").classes == ("class2", "class10")
        assert load(image_folder, class_order="natural").test.labels.tolist() == [0, 0, 0, 1, 1, 1]

    def test_names_in_another_unicode_form_are_one_class(self, image_folder: Path) -> None:
        self.rename(image_folder, {"cat": "\u00e9"}, ("train",))
        self.rename(image_folder, {"cat": "e\u0301"}, ("test",))
        data = load(image_folder)
        assert data.classes == ("dog", "\u00e9") and len(data.train) == 12 and len(data.test) == 6

    def test_two_folders_with_one_name_in_form_nfc_are_refused(self, image_folder: Path) -> None:
        self.rename(image_folder, {"cat": "\u00e9", "dog": "e\u0301"})
        with pytest.raises(DataError, match="are one name, \u00e9, in two Unicode forms; rename one"):
            load(image_folder)


class TestPacks:
    def names(self, root: Path) -> list[str]:
        return sorted(path.name.rsplit("-", 1)[0] for path in (root / ".samecurve").iterdir())

    def test_four_packs_of_a_split_are_kept(self, image_folder: Path) -> None:
        for number, size in enumerate([8, 9, 10, 11]):
            load(image_folder, image_size=size)
            release_packs()  # as if that process had ended
            for path in (image_folder / ".samecurve").glob(f"*-{size}x3-*"):
                os.utime(path, (time.time() - 1000 + number,) * 2)
        for size in (8, 12):
            load(image_folder, image_size=size)
        sizes = [8, 10, 11, 12]  # 9 was used least recently
        assert self.names(image_folder) == sorted(f"{split}-{size}x3" for split in ("train", "test") for size in sizes)

    def test_changed_files_do_not_add_packs_for_ever(self, image_folder: Path) -> None:
        for seed in range(7):
            write_image(image_folder / "train" / "cat" / "0.png", seed=seed, size=(20 + seed, 20))
            load(image_folder)
            release_packs()
        assert len(self.names(image_folder)) == 4 + 1

    def test_pack_in_use_is_kept(self, image_folder: Path) -> None:
        program = (
            "import sys, time; from trainer.config.schema import DataSettings; from trainer.data import image_folder"
        )
        program += "; image_folder.load(DataSettings(name='image_folder', root=sys.argv[1], image_size=7))"
        program += "; print('loaded', flush=True); time.sleep(60)"
        with subprocess.Popen([sys.executable, "-c", program, str(image_folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"loaded\n"
            for path in (image_folder / ".samecurve").iterdir():
                os.utime(path, (1, 1))
            for size in range(8, 14):
                load(image_folder, image_size=size)
                release_packs()
            assert "train-7x3" in self.names(image_folder)
            process.kill()
        load(image_folder, image_size=20)
        assert "train-7x3" not in self.names(image_folder)

    def test_packs_of_older_versions_and_unused_ones_are_deleted(self, image_folder: Path) -> None:
        folder = image_folder / ".samecurve"
        folder.mkdir()
        for name in (f"{'0f' * 16}.npy", f"train-abc-9x3-{'0' * 32}.npy", "mine.npy", f"test-8x3-{'0' * 32}.npy"):
            (folder / name).write_bytes(b"")
        os.utime(folder / f"train-abc-9x3-{'0' * 32}.npy", (1, 1))
        os.utime(folder / "mine.npy", (1, 1))
        load(image_folder)
        assert self.names(image_folder) == ["mine.npy", "test-32x3", "test-8x3", "train-32x3"]

    def test_data_sets_in_one_cache_folder_have_packs_of_their_own(self, image_folder: Path, tmp_path: Path) -> None:
        for number in range(5):
            root = shutil.copytree(image_folder, tmp_path / str(number))
            write_image(root / "train" / "cat" / "0.png", seed=50 + number)
            write_image(root / "test" / "cat" / "0.png", seed=60 + number)
            load(root, cache_dir=str(tmp_path / "cache"))
            release_packs()
        assert len(list((tmp_path / "cache").iterdir())) == 10

    def test_read_only_pack_of_another_user_is_read(self, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        load(image_folder)

        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "utime", refuse)
        monkeypatch.setattr(cache, "decode_files", lambda *_: pytest.fail("decoded again"))
        assert len(load(image_folder).train) == 12


class TestLoadSplit:
    def load(self, root: Path, split: str = "test", classes: tuple[str, ...] = ("dog", "bird", "cat")) -> Any:
        settings = DataSettings(name="image_folder", root=str(root))
        return image_module.load_split(settings, split, classes)[0]

    def test_needs_the_folder_of_that_split_only(self, image_folder: Path) -> None:
        for split, other in (("test", "train"), ("train", "test")):
            root = image_folder.with_name(split)
            shutil.copytree(image_folder / split, root / split)
            assert not (root / other).exists() and len(self.load(root, split)) == {"train": 12, "test": 6}[split]

    def test_labels_are_those_of_the_network(self, image_folder: Path) -> None:
        assert self.load(image_folder).labels.tolist() == [0, 0, 0, 2, 2, 2]

    def test_unknown_class_is_refused(self, image_folder: Path) -> None:
        with pytest.raises(DataError, match="expected dog, bird; got cat, dog"):
            self.load(image_folder, classes=("dog", "bird"))

    def test_empty_class_folder_is_accepted_but_no_empty_split(self, image_folder: Path) -> None:
        shutil.rmtree(image_folder / "test" / "cat")
        (image_folder / "test" / "cat").mkdir()
        assert len(self.load(image_folder)) == 3
        shutil.rmtree(image_folder / "test" / "dog")
        with pytest.raises(DataError, match="no images in"):
            self.load(image_folder)


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
        self.assert_refused(image_folder, "1 of 18 image files", "train/dog/3.png", "replace or remove")
