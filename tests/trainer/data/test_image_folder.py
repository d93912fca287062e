"""Image folders: any picture becomes the same square of pixels, and what is wrong is named."""

import io
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.images import paint

from trainer.config.schema import DataSettings
from trainer.data import cache as pack
from trainer.data import decode, image_folder
from trainer.data.dataset import ArrayDataset
from trainer.data.decode import decode_plain_jpeg, fit_image
from trainer.errors import DataError


def load(root: Path, **settings: object) -> ArrayDataset:
    return image_folder.load(DataSettings(name="image_folder", root=str(root), **settings))  # type: ignore[arg-type]


def test_classes_images_and_labels(image_folder: Path) -> None:
    data = load(image_folder)
    assert data.classes == ("cat", "dog")
    assert data.train.images.shape == (12, 32, 32, 3) and data.train.images.dtype == np.uint8
    assert data.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = np.asarray(Image.open(image_folder / "test" / "dog" / "1.png"))
    assert np.array_equal(data.test.images[4], expected)


def test_the_training_order_is_mixed_by_class(image_folder: Path) -> None:
    # One class after the other is what the folders say, and what no network survives without data.shuffle.
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
def test_any_format_mode_and_size_is_read(image_folder: Path, suffix: str, mode: str, size: tuple[int, int]) -> None:
    paint(image_folder / "train" / "cat" / f"odd{suffix}", seed=9, size=size, mode=mode)
    data = load(image_folder)
    assert data.train.images.shape == (13, 32, 32, 3)
    assert data.train.images[data.train.labels == 0][-1].std() > 5


def test_grey_on_request(image_folder: Path) -> None:
    assert load(image_folder, channels=1).train.images.shape == (12, 32, 32, 1)


def test_a_picture_is_scaled_and_its_middle_cut_out() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert (fit_image(wide, 20, 3)[:, 1:-1] == (0, 0, 255)).all()


def test_transparent_pixels_are_laid_on_white() -> None:
    assert (fit_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8, 3) == 255).all()
    assert (fit_image(Image.new("RGBA", (8, 8), (10, 20, 30, 255)), 8, 3) == (10, 20, 30)).all()


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    deep = Image.fromarray(np.array([[0, 128 * 256], [64 * 256, 255 * 256]], dtype=np.uint16))
    assert fit_image(deep, 2, 1)[..., 0].tolist() == [[0, 128], [64, 255]]


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))
    exif = picture.getexif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "turned.jpg") as read:
        pixels = fit_image(read, 32, 3)
    assert pixels[4].mean() < 20 and pixels[-4].mean() > 235


def jpeg(mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    """Smooth shades with some noise, as JPEG."""
    draw = np.random.default_rng(5)
    shades = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(shades).resize(size)).astype(int) + draw.integers(-20, 20, (*size[::-1], 3))
    stored = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(stored, "JPEG", **options)
    return stored.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_a_plain_jpeg_has_pillows_pixels(channels: int, subsampling: int, progressive: bool, quality: int) -> None:
    mode = "L" if channels == 1 else "RGB"
    stored = jpeg(mode, subsampling=subsampling, progressive=progressive, quality=quality)
    out = np.zeros((32, 32, channels), np.uint8)
    assert decode_plain_jpeg(stored, out)
    assert np.array_equal(out, fit_image(Image.open(io.BytesIO(stored)), 32, channels))


def tall_chroma() -> bytes:
    """4:4:1, as 4:1:1 is once it was turned without decoding: the blocks of 4:2:0 said to lie in a column."""
    return jpeg(subsampling=2).replace(b"\x01\x22\x00", b"\x01\x14\x00", 1)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def several() -> bytes:
    """Two pictures in one file, as stereo cameras make them."""
    stored, picture = io.BytesIO(), Image.open(io.BytesIO(jpeg()))
    picture.save(stored, "MPO", save_all=True, append_images=[picture])
    return stored.getvalue()


@pytest.mark.parametrize(
    ("stored", "channels"),
    [(jpeg(size=(32, 31)), 3), (jpeg(size=(64, 64)), 3), (jpeg(), 1), (jpeg("L"), 3), (jpeg("CMYK"), 3),
     (jpeg(keep_rgb=True), 3), (tall_chroma(), 3), (turned(), 3), (several(), 3), (jpeg()[:-40], 3),
     (jpeg()[:100], 3), (b"nothing", 3)],
    ids=["size", "larger", "colours", "grey", "CMYK", "RGB", "4:4:1", "turned", "several", "cut off", "header", "text"],
)  # fmt: skip
def test_whatever_else_is_left_to_pillow(stored: bytes, channels: int) -> None:
    assert not decode_plain_jpeg(stored, np.zeros((32, 32, channels), np.uint8))


def test_a_pillow_with_another_jpeg_library_reads_all_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions are made from its pixels too."""
    monkeypatch.setattr(decode, "_PILLOW_HAS_TURBO", False)
    assert not decode_plain_jpeg(jpeg(), np.zeros((32, 32, 3), np.uint8))


def test_the_second_start_reads_the_pack(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(image_folder)
    monkeypatch.setattr("trainer.data.cache._decode_all", lambda *_: pytest.fail("decoded again"))
    again = load(image_folder)
    assert np.array_equal(first.train.images, again.train.images) and np.array_equal(
        first.test.labels, again.test.labels
    )


def test_a_changed_file_is_seen(image_folder: Path) -> None:
    before = load(image_folder)
    path = image_folder / "train" / "cat" / "0.png"
    paint(path, seed=77)
    os.utime(path, ns=(1, 1))
    after = load(image_folder)
    assert not np.array_equal(before.train.images[0], after.train.images[0])


def test_another_size_has_its_own_pack(image_folder: Path) -> None:
    load(image_folder)
    assert load(image_folder, image_size=16).train.images.shape == (12, 16, 16, 3)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY garbage", None])
def test_a_damaged_pack_is_made_anew(image_folder: Path, damage: bytes | None) -> None:
    good = load(image_folder)
    (pack,) = (image_folder / ".samecurve").iterdir()
    pack.write_bytes(pack.read_bytes()[:-100] if damage is None else damage)
    assert np.array_equal(load(image_folder).train.images, good.train.images)


def test_without_a_place_for_the_pack_it_goes_on(image_folder: Path) -> None:
    occupied = image_folder / "file"
    occupied.write_text("")
    data = load(image_folder, cache_dir=str(occupied / "cache"))
    assert len(data.train) == 12 and "set data.cache_dir" in data.notes[0]


def test_a_full_disk_is_seen_before_decoding(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve, asked = os.posix_fallocate, []

    def full_at_first(*place: int) -> None:
        asked.append(place)
        if len(asked) == 1:
            raise OSError(28, "No space left on device")
        reserve(*place)

    monkeypatch.setattr(os, "posix_fallocate", full_at_first)
    data = load(image_folder)
    assert "No space left" in data.notes[0] and not list((image_folder / ".samecurve").iterdir())
    assert np.array_equal(load(image_folder).train.images, data.train.images)


def test_what_a_killed_process_has_left_goes_after_a_day(image_folder: Path) -> None:
    cache = image_folder / ".samecurve"
    cache.mkdir()
    for name, age in ((".old.partial", 2 * 86400), (".new.partial", 60)):
        (cache / name).write_bytes(b"half")
        os.utime(cache / name, (time.time() - age,) * 2)
    load(image_folder)
    assert {path.name for path in cache.glob(".*")} == {".new.partial"}


def test_what_was_decoded_before_a_broken_file_is_not_left_behind(image_folder: Path) -> None:
    (image_folder / "train" / "dog" / "3.png").write_bytes(b"nothing like an image")
    with pytest.raises(DataError, match="no kind of image"):
        load(image_folder)
    assert not list((image_folder / ".samecurve").iterdir())


@pytest.mark.parametrize(("seconds_worth_a_pool", "num_pools"), [(0.0, 1), (60.0, 0)])
def test_what_takes_long_is_decoded_by_all_cores(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds_worth_a_pool: float, num_pools: int
) -> None:
    pools: list[int] = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, workers: int, **options: Any) -> None:
            pools.append(workers)
            super().__init__(workers, **options)

    alone = load(image_folder, cache_dir=str(image_folder / "one"))
    monkeypatch.setattr(pack, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(pack, "_SECONDS_WORTH_A_POOL", seconds_worth_a_pool)
    monkeypatch.setattr(pack, "_FILES_PER_TASK", 5)
    monkeypatch.setattr(pack, "_FIRST_FILES", 2)
    monkeypatch.setattr("trainer.data.cache.available_cores", lambda: 2)
    together = load(image_folder, cache_dir=str(image_folder / "two"))
    assert np.array_equal(alone.train.images, together.train.images) and pools == [2] * num_pools


def test_nested_folders_and_strangers(image_folder: Path) -> None:
    paint(image_folder / "train" / "cat" / "more" / "x.png", seed=4)
    (image_folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (image_folder / "train" / "cat" / ".hidden.png").write_text("not an image")
    (image_folder / "train" / "README").write_text("not a class")
    assert len(load(image_folder).train) == 13


def test_a_link_is_what_it_points_to(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "again.png").symlink_to(image_folder / "test" / "cat" / "0.png")
    assert len(load(image_folder).train) == 13


class TestWhatIsWrongIsNamed:
    def check(self, root: Path, *words: str) -> None:
        with pytest.raises(DataError) as caught:
            load(root)
        text = str(caught.value)
        assert all(word in text for word in words) and "\n" not in text

    def test_no_folder(self, tmp_path: Path) -> None:
        self.check(tmp_path / "nowhere", "no folder", "nowhere", "Set data.root")

    def test_no_classes(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            (tmp_path / "empty" / split).mkdir(parents=True)
        self.check(tmp_path / "empty", "no class folders")

    def test_a_class_missing_from_test(self, image_folder: Path) -> None:
        paint(image_folder / "train" / "bird" / "0.png", seed=1)
        self.check(image_folder, "class bird", "missing from", "test")

    def test_a_class_missing_from_train(self, image_folder: Path) -> None:
        paint(image_folder / "test" / "bird" / "0.png", seed=1)
        self.check(image_folder, "class bird", "missing from", "train")

    def test_an_empty_class(self, image_folder: Path) -> None:
        for split in ("train", "test"):
            (image_folder / split / "bird").mkdir()
        self.check(image_folder, "train/bird is empty", "wanted image files")

    @pytest.mark.parametrize("target", ["nowhere.png", "."])
    def test_a_link_to_nothing_or_in_a_circle(self, image_folder: Path, target: str) -> None:
        (image_folder / "train" / "cat" / "link.png").symlink_to(target)
        self.check(image_folder, "link.png", "cannot be read")

    def test_a_class_without_a_readable_name(self, image_folder: Path) -> None:
        for split in ("train", "test"):
            paint(image_folder / split / "\udcff" / "0.png", seed=1)
        self.check(image_folder, "'\\udcff'", "no readable text")

    @pytest.mark.parametrize("content", [b"", b"nothing like an image", None])
    def test_a_corrupt_file(self, image_folder: Path, content: bytes | None) -> None:
        path = image_folder / "train" / "dog" / "3.png"
        path.write_bytes(path.read_bytes()[:-40] if content is None else content)
        self.check(image_folder, "corrupt image", "train/dog/3.png", "replace or remove")
