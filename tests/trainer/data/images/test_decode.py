"""Decoding of one image: any size, mode and orientation becomes a square of uint8 pixels."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from trainer.data.images import decode
from trainer.data.images.decode import ImageError, decode_file, decode_plain_jpeg, fit_image, fit_images
from trainer.errors import DataError


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


def png(pixels: NDArray[np.uint16]) -> bytes:
    """The content of a PNG file of 16 bits per value. Pillow writes grey only, so colors are written here."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(content: bytes, channels: int = 1, size: int = 2) -> tuple[NDArray[np.uint8], int]:
    out = np.zeros((size, size, channels), np.uint8)
    return out, decode_file(content, out)


class TestDeepImages:
    @pytest.mark.parametrize("seed", range(10))
    @pytest.mark.parametrize("write", ["png", "tiff I;16", "tiff I", "tiff I;16B", "pgm"])
    def test_grey_is_neither_black_nor_saturated(self, write: str, seed: int) -> None:
        rng = np.random.default_rng(seed)
        highest = int(rng.choice([200, 255, 256, 1000, 4095, 4096, 30_000, 65_535]))
        pixels = rng.integers(0, highest + 1, (16, 16), dtype=np.uint16)
        pixels[0, 0], pixels[0, 1] = 0, highest
        if write == "png":
            content = png(pixels[..., np.newaxis])
        elif write == "pgm":
            content = b"P5 16 16 65535\n" + pixels.astype(">u2").tobytes()
        elif write == "tiff I":
            content = saved(Image.fromarray(pixels.astype(np.int32)), "TIFF")
        else:
            image = Image.frombytes(write[5:], (16, 16), pixels.astype(">u2" if "B" in write else "<u2").tobytes())
            content = saved(image, "TIFF")
        out, bits = decoded(content, size=16)
        scale = (1 << bits) - 1
        assert bits == (8 if highest <= 255 else 12 if highest <= 4095 else 16)
        assert np.abs(out[..., 0].astype(float) - pixels * (255 / scale)).max() < 1.01

    def test_colors_keep_their_upper_bits(self) -> None:
        pixels = np.array([[[0, 128, 65_535]] * 2, [[4096, 30_000, 256]] * 2], np.uint16)
        out, bits = decoded(png(pixels), channels=3)
        assert np.array_equal(out, pixels >> 8) and bits == 0

    @pytest.mark.parametrize("channels", [2, 3, 4])
    @pytest.mark.parametrize("highest", [255, 4095])
    def test_colors_that_would_be_black_are_refused(self, channels: int, highest: int) -> None:
        pixels = np.full((2, 2, channels), highest, np.uint16)
        if channels in (2, 4):
            pixels[..., -1] = 65_535  # opaque
        with pytest.raises(ImageError, match="16 bits, but no value above 4095"):
            decoded(png(pixels), channels=3)

    @pytest.mark.parametrize("pixels", [[[-1, 5]], [[0, 65_536]]])
    def test_grey_outside_16_bits_is_refused(self, pixels: list[list[int]]) -> None:
        with pytest.raises(ImageError, match="expected 0 to 65535; convert it to 8 or 16 bits"):
            decoded(saved(Image.fromarray(np.array(pixels, np.int32)), "TIFF"))

    def test_grey_that_counts_from_white_is_refused(self) -> None:
        content = saved(Image.fromarray(np.full((2, 2), 300, np.uint16)), "TIFF", tiffinfo={262: 0})
        with pytest.raises(ImageError, match="counts from white to black; convert it to 8 bits"):
            decoded(content)

    @pytest.mark.parametrize("highest", [1.0, 255.0, 1e6])
    def test_fractions_are_refused(self, highest: float) -> None:
        content = saved(Image.fromarray(np.array([[0, highest]], np.float32)), "TIFF")
        with pytest.raises(ImageError, match=r"fractions from 0 to .*convert it to 8 bits"):
            decoded(content)


class TestModes:
    """Every way to store a red or a grey pixel becomes that pixel."""

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr"])
    @pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "BMP", "GIF", "JPEG", "TGA"])
    def test_red_stays_red(self, mode: str, format: str) -> None:
        image = Image.new("RGB", (8, 8), (250, 10, 20)).convert(mode, palette=Image.Palette.ADAPTIVE)
        if format == "GIF" and mode != "P":
            pytest.skip("GIF stores palettes only")
        try:
            content = saved(image, format)
        except (OSError, KeyError):
            pytest.skip(f"{format} cannot store {mode}")
        out, _ = decoded(content, channels=3, size=8)
        assert np.abs(out.astype(int) - [250, 10, 20]).max() < 12

    @pytest.mark.parametrize(("mode", "format"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("P", "GIF")])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_transparent_pixels_become_white(self, mode: str, format: str, channels: int) -> None:
        image = Image.new("RGBA", (8, 8), (30, 30, 30, 0)).convert("L" if mode == "P" else mode)
        options = {"transparency": 30} if mode == "P" else {}
        out, _ = decoded(saved(image, format, **options), channels=channels, size=8)
        assert (out == 255).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
    def test_every_orientation_is_turned_upright(self, orientation: int, format: str) -> None:
        image = Image.new("RGB", (32, 32), "black")
        image.paste("white", (0, 0, 16, 8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        content = saved(image, format, exif=exif, quality=100)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("L"))
        out, _ = decoded(content, size=32)
        assert np.abs(out[..., 0].astype(int) - expected).max() < 12


class TestLargeImages:
    @pytest.mark.slow
    def test_196_megapixels_are_decoded(self) -> None:
        content = saved(Image.new("1", (14_000, 14_000), 1), "PNG")
        assert (decoded(content)[0] == 255).all()

    @pytest.mark.parametrize("side", [23_000, 100_000])
    def test_more_than_500_megapixels_are_refused(self, side: int) -> None:
        content = b"P5 %d %d 255\n" % (side, side)
        with pytest.raises(ImageError, match="more than 500 megapixels; scale it down"):
            decoded(content)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_raise_image_error_or_decode(seed: int) -> None:
    """Whatever bytes are changed or cut off, no other exception escapes, and the reason is one line."""
    rng = np.random.default_rng(seed)
    format = ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "PPM", "TGA", "ICO", "JPEG2000")[seed % 10]
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    content = bytearray(saved(image, format))
    for _ in range(int(rng.integers(1, 30))):
        content[rng.integers(len(content))] = rng.integers(256)
    content = content[: rng.integers(1, len(content) + 1)] if seed % 3 else content
    try:
        decoded(bytes(content), channels=3, size=16)
    except ImageError as error:
        assert str(error) and "\n" not in str(error)


def test_images_that_memory_cannot_hold_are_refused_before_they_are_scaled() -> None:
    images = np.zeros((100_000, 1, 1, 1), np.uint8)
    with pytest.raises(DataError, match=r"data\.image_size=8192: 100,000 images need 20,133 GB, but this machine has"):
        fit_images(images, 8192, 3)
