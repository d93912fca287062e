"""The identity of a data set: every change is named, and the same data in another place are the same."""

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest
from support.images import write_image

from trainer.config.schema import DataSettings
from trainer.data import digits, image_folder
from trainer.data.dataset import ArrayDataset, ArraySplit
from trainer.data.identity import DATA_FILE, DataIdentity, check_same_data, identify_split, read_identity
from trainer.errors import DataError, FolderError
from trainer.text.escape import escape

CLASSES = ("class10", "class2", "été")
NAMES = (
    "a.png",
    "two words.jpg",
    "line\nbreak.png",
    "émigré.bmp",
    "汉字🐈.png",
    "b\udcff.png",
    "x'\"\\.ppm",
    "sub/1.png",
)
SEEDS = range(3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image folder with odd names."""
    root = tmp_path / "photos"
    for split in ("train", "test"):
        for label, class_name in enumerate(CLASSES):
            for index, name in enumerate(NAMES if split == "train" else NAMES[:4]):
                path = root / split / class_name / name
                write_image(path, seed=100 * label + index + 50 * (split == "test"), size=(8, 8))
    return root


def settings(root: Path, **values: object) -> DataSettings:
    return DataSettings(name="image_folder", root=str(root), **{"image_size": 8} | values)  # type: ignore[arg-type]


def identify(dataset: ArrayDataset) -> DataIdentity:
    splits = {name: identify_split(getattr(dataset, name), len(dataset.classes)) for name in ("train", "test")}
    return DataIdentity(dataset.classes, splits)


def load(root: Path, **values: object) -> DataIdentity:
    return identify(image_folder.load(settings(root, **values)))


def store(identity: DataIdentity, run: Path, with_lists: bool = True) -> DataIdentity:
    """Returns the identity as a later session reads it."""
    run.mkdir(exist_ok=True)
    if with_lists:
        identity.write(run)
    return read_identity(json.loads(json.dumps(identity.to_json())), run / DATA_FILE, run)


def refusal(before: DataIdentity, now: DataIdentity, accept: bool = False) -> str:
    with pytest.raises(DataError) as raised:
        check_same_data(before, now, accept, "checkpoint x")
    text = str(raised.value)
    assert text.isprintable() and "Restore it, or choose another run.name" in text
    return text


def pick(root: Path, rng: random.Random, split: str = "train") -> Path:
    files = sorted(path for path in (root / split).rglob("*") if path.is_file())
    return rng.choice(files)


def name_of(path: Path, root: Path) -> str:
    """The name of an image file as a message shows it."""
    return escape(normalize("NFC", path.relative_to(root).as_posix()))


Change = Callable[[Path, random.Random], list[str]]


def rename_class(root: Path, rng: random.Random) -> list[str]:
    old = rng.choice(CLASSES)
    for split in ("train", "test"):
        (root / split / old).rename(root / split / f"{old}x")
    return [f"class {old} is now {old}x", f"train/{old}/a.png is now train/{old}x/a.png, and 7 more"]


def add_class(root: Path, rng: random.Random) -> list[str]:
    for split in ("train", "test"):
        write_image(root / split / "new" / "0.png", seed=rng.randrange(1000))
    return ["class new is new", "train has 25 images instead of 24", "train/new/0.png is new"]


def remove_class(root: Path, rng: random.Random) -> list[str]:
    name = rng.choice(CLASSES)
    for split in ("train", "test"):
        shutil.rmtree(root / split / name)
    return [f"class {name} is missing", "train has 16 images instead of 24", "test has 8 images instead of 12"]


def add_image(root: Path, rng: random.Random) -> list[str]:
    name = rng.choice(CLASSES)
    write_image(root / "train" / name / "added.png", seed=rng.randrange(1000))
    return [f"train has 25 images instead of 24 ({name} 9 instead of 8)", f"train/{name}/added.png is new"]


def remove_image(root: Path, rng: random.Random) -> list[str]:
    path = pick(root, rng)
    path.unlink()
    return ["train has 23 images instead of 24", f"{name_of(path, root)} is missing"]


def replace_image(root: Path, rng: random.Random) -> list[str]:
    path = pick(root, rng)
    write_image(path, seed=rng.randrange(1000, 2000), size=(9, 7))
    return [f"{name_of(path, root)} has other content ("]


def change_a_pixel(root: Path, rng: random.Random) -> list[str]:
    path = root / "train" / rng.choice(CLASSES) / "émigré.bmp"  # not compressed, so that its size does not change
    content = bytearray(path.read_bytes())
    content[-1 - rng.randrange(64)] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return [f"{name_of(path, root)} has other content (of the same 246 bytes)"]


def swap_labels(root: Path, rng: random.Random) -> list[str]:
    first, second = (root / "train" / name / "émigré.bmp" for name in rng.sample(CLASSES, 2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return ["train/", "has other content (of the same 246 bytes), and 1 more"]


def move_to_another_class(root: Path, rng: random.Random) -> list[str]:
    old, new = rng.sample(CLASSES, 2)
    (root / "train" / old / "a.png").rename(root / "train" / new / "moved.png")
    return [f"{old} 7 instead of 8", f"train/{old}/a.png is now train/{new}/moved.png"]


def rename_image(root: Path, rng: random.Random) -> list[str]:
    """Changes the sample ids: files are sorted by name."""
    path = pick(root, rng)
    path.rename(path.with_name(f"zzz{path.suffix}"))
    return [f"{name_of(path, root)} is now ", "zzz"]


def change_test_image(root: Path, rng: random.Random) -> list[str]:
    path = pick(root, rng, "test")
    write_image(path, seed=rng.randrange(1000, 2000), size=(9, 7))
    return [f"{name_of(path, root)} has other content ("]


def add_test_image(root: Path, rng: random.Random) -> list[str]:
    name = rng.choice(CLASSES)
    write_image(root / "test" / name / "added.png", seed=rng.randrange(1000))
    return [f"({name} 5 instead of 4)", f"test/{name}/added.png is new", "set data.accept_added_test_images=true"]


def exchange_data_set(root: Path, rng: random.Random) -> list[str]:
    shutil.rmtree(root)
    for split in ("train", "test"):
        for name in ("cat", "dog", "emu"):
            write_image(root / split / name / "0.png", seed=rng.randrange(1000))
    return [
        "classes class10, class2, été are missing and classes cat, dog, emu are new",
        "train has 3 images instead of",
    ]


CHANGES = (
    rename_class, add_class, remove_class, add_image, remove_image, replace_image, change_a_pixel, swap_labels,
    move_to_another_class, rename_image, change_test_image, add_test_image, exchange_data_set,
)  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_data_are_refused_with_the_difference(root: Path, tmp_path: Path, change: Change, seed: int) -> None:
    before = load(root)
    words = change(root, random.Random(seed))
    now = load(root)
    text = refusal(store(before, tmp_path / "run"), now)
    assert all(word in text for word in words), text
    assert ("accept_added_test_images" in text) == (change is add_test_image)
    assert refusal(store(before, tmp_path / "alone", with_lists=False), now)  # only the checkpoint is left


def test_class_order_is_part_of_the_identity(root: Path, tmp_path: Path) -> None:
    before = store(load(root), tmp_path / "run")
    natural = load(root, class_order="natural")
    assert natural.classes == ("class2", "class10", "été")
    assert "the classes are in another order: class 0 was class10, now class2" in refusal(before, natural)


def test_without_lists_the_counts_and_classes_are_compared(root: Path, tmp_path: Path) -> None:
    before = store(load(root), tmp_path / "run", with_lists=False)
    change_a_pixel(root, random.Random(0))
    assert "train has as many images of each class, but other ones" in refusal(before, load(root))


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda _: gzip.compress(b"{}"), lambda _: b""])
def test_damaged_list_is_not_used(root: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    identity = load(root)
    store(identity, tmp_path / "run")
    for path in (tmp_path / "run" / "data").iterdir():
        path.write_bytes(damage(path.read_bytes()))
    assert all(split.samples_json is None for split in store(identity, tmp_path / "run", False).splits.values())


def copy_elsewhere(root: Path, tmp_path: Path) -> DataIdentity:
    return load(shutil.copytree(root, tmp_path / "elsewhere" / "moved"))


def touch_all(root: Path, tmp_path: Path) -> DataIdentity:
    for path in root.rglob("*"):
        os.utime(path, (1, 1))
    return load(root)


def use_another_cache(root: Path, tmp_path: Path) -> DataIdentity:
    return load(root, cache_dir=str(tmp_path / "cache"))


def use_another_image_size(root: Path, tmp_path: Path) -> DataIdentity:
    return load(root, image_size=16, channels=1)


def decompose_names(root: Path, tmp_path: Path) -> DataIdentity:
    """Stores all names as macOS does."""
    for path in sorted(root.rglob("*"), key=lambda path: -len(path.parts)):
        path.rename(path.with_name(normalize("NFD", path.name)))
    assert not (root / "train" / "été").exists()
    return load(root)


def link_to_a_pool(root: Path, tmp_path: Path) -> DataIdentity:
    pool = tmp_path / "pool"
    pool.mkdir()
    for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        path.rename(pool / str(number))
        path.symlink_to(pool / str(number))
    return load(root)


def add_other_files(root: Path, tmp_path: Path) -> DataIdentity:
    for name in ("notes.txt", "._a.png", ".DS_Store", "Thumbs.db"):
        (root / "train" / "class2" / name).write_text("not an image")
    write_image(root / "train" / "class2" / ".ipynb_checkpoints" / "a.png", seed=1)
    write_image(root / "train" / ".hidden" / "a.png", seed=1)
    return load(root)


MOVES = (
    copy_elsewhere, touch_all, use_another_cache, use_another_image_size, decompose_names, link_to_a_pool,
    add_other_files,
)  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("with_lists", [True, False])
def test_the_same_data_elsewhere_are_accepted(
    root: Path, tmp_path: Path, move: Callable[[Path, Path], DataIdentity], with_lists: bool
) -> None:
    before = store(load(root), tmp_path / "run", with_lists)
    assert check_same_data(before, move(root, tmp_path), False, "checkpoint x") == ""


class TestAddedTestImages:
    def test_are_accepted_with_the_setting_and_noted(self, root: Path, tmp_path: Path) -> None:
        before = store(load(root), tmp_path / "run")
        add_test_image(root, random.Random(0))
        assert "added.png is new" in check_same_data(before, load(root), True, "checkpoint x")

    @pytest.mark.parametrize(
        "change", [change for change in CHANGES if change is not add_test_image], ids=lambda change: change.__name__
    )
    def test_setting_accepts_no_other_change(self, root: Path, tmp_path: Path, change: Change) -> None:
        before = store(load(root), tmp_path / "run")
        add_test_image(root, random.Random(0))
        change(root, random.Random(1))
        refusal(before, load(root), accept=True)

    def test_without_the_list_they_are_refused(self, root: Path, tmp_path: Path) -> None:
        before = store(load(root), tmp_path / "run", with_lists=False)
        add_test_image(root, random.Random(0))
        refusal(before, load(root), accept=True)


class TestListedFiles:
    """The launcher compares names and sizes only: it decodes nothing."""

    def test_same_files_are_accepted(self, root: Path, tmp_path: Path) -> None:
        identity = load(root)
        listed = image_folder.identify_files(settings(root))
        for with_lists in (True, False):
            before = store(identity, tmp_path / str(with_lists), with_lists)
            assert check_same_data(before, listed, False, "checkpoint x") == ""

    @pytest.mark.parametrize("change", set(CHANGES) - {change_a_pixel, swap_labels}, ids=lambda change: change.__name__)
    def test_changed_names_and_sizes_are_refused(self, root: Path, tmp_path: Path, change: Change) -> None:
        before = store(load(root), tmp_path / "run")
        change(root, random.Random(2))
        refusal(before, image_folder.identify_files(settings(root)))

    def test_added_test_images_are_accepted_with_the_setting(self, root: Path, tmp_path: Path) -> None:
        before = store(load(root), tmp_path / "run")
        add_test_image(root, random.Random(0))
        assert check_same_data(before, image_folder.identify_files(settings(root)), True, "checkpoint x")


class TestImagesWithoutFiles:
    def load(self, **values: Any) -> ArrayDataset:
        return digits.load(DataSettings(name="digits", **values))

    def test_do_not_depend_on_image_size_or_channels(self, tmp_path: Path) -> None:
        before = store(identify(self.load()), tmp_path / "run")
        assert check_same_data(before, identify(self.load(image_size=8, channels=3)), False, "checkpoint x") == ""

    def test_changed_label_and_pixel_are_named(self, tmp_path: Path) -> None:
        before = store(identify(self.load()), tmp_path / "run")
        dataset = self.load()
        dataset.test.labels[17] = 9 - dataset.test.labels[17]
        assert "image 17 of test (counted from 0) has label" in refusal(before, identify(dataset))
        dataset = self.load()
        assert dataset.train.checksums is not None
        dataset.train.checksums[5] ^= 1
        assert "image 5 of train (counted from 0) has other pixels" in refusal(before, identify(dataset))

    def test_without_checksums_the_pixels_in_memory_count(self) -> None:
        train = replace(self.load().train, checksums=None)
        before = identify_split(train, 10).sha256
        assert identify_split(train, 10).sha256 == before
        train.images[0, 0, 0] ^= 1
        assert identify_split(train, 10).sha256 != before


def test_list_takes_less_than_25_bytes_per_image() -> None:
    num_images, rng = 20_000, np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 1000, num_images))
    split = ArraySplit(
        np.zeros((num_images, 1, 1, 3), np.uint8),
        labels,
        rng.integers(0, 2**32, num_images, dtype=np.uint32),
        tuple(f"train/n{label:08}/n{label:08}_{index}.JPEG" for index, label in enumerate(labels)),
        tuple(rng.integers(20_000, 300_000, num_images).tolist()),
    )
    samples_json = identify_split(split, 1000).samples_json
    assert samples_json is not None and len(gzip.compress(samples_json, 1)) < 25 * num_images


def test_damaged_description_is_refused_with_its_file(root: Path, tmp_path: Path) -> None:
    """Replaces one part, which is chosen by chance, by a value of another kind."""
    sound = json.dumps(load(root).to_json())
    for seed in range(100):
        rng = random.Random(seed)
        content = json.loads(sound)
        split = content["splits"][rng.choice(("train", "test"))]
        owner, key = rng.choice(
            [
                *((content, "classes"), (content, "splits"), (content["splits"], "test"), (content["splits"], "train")),
                *((split, "counts"), (split, "sha256"), (content["classes"], 0), (split["counts"], 0)),
            ]
        )
        owner[key] = rng.choice([None, 5, -1, 0.5, True, [], [[]], {}, {"": 1}, "\0"])
        if isinstance(owner, list):  # another value may be sound in the list, but not in a shorter one
            owner.pop()
        words = r"progress\.json cannot be read as a file of a run \(expected .*repair it"
        with pytest.raises(FolderError, match=words):
            read_identity(content, tmp_path / "progress.json", tmp_path)
