"""Decoding of one image: any size, mode and orientation becomes a square of uint8 pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from trainer.data import decode
from trainer.data.decode import decode_plain_jpeg, fit_image


def test_fit_image_scales_and_crops_the_center() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    assert (fit_image(wide, 20, 3)[:, 1:-1] == (0, 0, 255)).all()


def test_fit_image_makes_transparent_pixels_white() -> None:
    assert (fit_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8, 3) == 255).all()
    assert (fit_image(Image.new("RGBA", (8, 8), (10, 20, 30, 255)), 8, 3) == (10, 20, 30)).all()


def test_fit_image_reduces_16_bit_grey_to_8_bits() -> None:
    image = Image.fromarray(np.array([[0, 128 * 256], [64 * 256, 255 * 256]], dtype=np.uint16))
    assert fit_image(image, 2, 1)[..., 0].tolist() == [[0, 128], [64, 255]]


def test_fit_image_applies_exif_orientation(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 3  # upside down
    image.save(tmp_path / "rotated.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "rotated.jpg") as rotated:
        pixels = fit_image(rotated, 32, 3)
    assert pixels[4].mean() < 20 and pixels[-4].mean() > 235


def jpeg(mode: str = "RGB", size: tuple[int, int] = (32, 32), **options: object) -> bytes:
    """The content of a JPEG file: a smooth image with some noise."""
    generator = np.random.default_rng(5)
    coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    noise = generator.integers(-20, 20, (*size[::-1], 3))
    pixels = np.asarray(Image.fromarray(coarse).resize(size)).astype(int) + noise
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_plain_jpeg_has_the_pixels_that_pillow_decodes(
    channels: int, subsampling: int, progressive: bool, quality: int
) -> None:
    mode = "L" if channels == 1 else "RGB"
    content = jpeg(mode, subsampling=subsampling, progressive=progressive, quality=quality)
    out = np.zeros((32, 32, channels), np.uint8)
    assert decode_plain_jpeg(content, out)
    assert np.array_equal(out, fit_image(Image.open(io.BytesIO(content)), 32, channels))


def jpeg_4_4_1() -> bytes:
    """A JPEG with 4:4:1 subsampling, as a lossless rotation of 4:1:1 gives: a 4:2:0 file with a changed header."""
    return jpeg(subsampling=2).replace(b"\x01\x22\x00", b"\x01\x14\x00", 1)


def jpeg_with_orientation() -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return jpeg(exif=exif)


def jpeg_of_two_images() -> bytes:
    """Two images in one file, as stereo cameras write them."""
    file, image = io.BytesIO(), Image.open(io.BytesIO(jpeg()))
    image.save(file, "MPO", save_all=True, append_images=[image])
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "channels"),
    [(jpeg(size=(32, 31)), 3), (jpeg(size=(64, 64)), 3), (jpeg(), 1), (jpeg("L"), 3), (jpeg("CMYK"), 3),
     (jpeg(keep_rgb=True), 3), (jpeg_4_4_1(), 3), (jpeg_with_orientation(), 3), (jpeg_of_two_images(), 3),
     (jpeg()[:-40], 3), (jpeg()[:100], 3), (b"nothing", 3)],
    ids=["size", "larger", "color", "grey", "CMYK", "RGB", "4:4:1", "rotated", "two", "truncated", "header", "text"],
)  # fmt: skip
def test_decode_plain_jpeg_leaves_other_files_to_pillow(content: bytes, channels: int) -> None:
    assert not decode_plain_jpeg(content, np.zeros((32, 32, channels), np.uint8))


def test_decode_plain_jpeg_leaves_all_files_to_a_pillow_without_libjpeg_turbo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions decode with Pillow, so that training must see the same pixels."""
    monkeypatch.setattr(decode, "_PILLOW_HAS_TURBO", False)
    assert not decode_plain_jpeg(jpeg(), np.zeros((32, 32, 3), np.uint8))


def test_fit_image_refuses_floating_point_pixels() -> None:
    with pytest.raises(ValueError, match="expected integer pixels"):
        fit_image(Image.fromarray(np.ones((8, 8), np.float32)), 8, 3)
