"""Decodes one image of any format, size and mode to uint8 [image_size, image_size, channels]."""

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError, features

from trainer.errors import DataError
from trainer.text.escape import one_line

_PILLOW_HAS_TURBO = features.check("libjpeg_turbo")  # another JPEG library may round pixels differently
_MAX_MEGAPIXELS = 500
# Pillow refuses large images, because a small file can hold one that fills the memory. Its own limit is too low for
# maps, microscopes and scanners. The error replaces a warning, which would let an image of twice the limit through.
Image.MAX_IMAGE_PIXELS = _MAX_MEGAPIXELS * 10**6
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
_TRANSPOSE_OF_ORIENTATION = {
    # EXIF orientation 1 is upright.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and its value for 0 as white
# 16-bit files often hold fewer bits: 8 from a conversion, 12 from a camera, a microscope or an X-ray detector.
_GREY_BITS = (8, 12, 16)


class ImageError(Exception):
    """An image cannot be decoded. The text is the reason, in one line."""


@contextlib.contextmanager
def image_errors() -> Iterator[None]:
    """Turns what Pillow raises for an image that it cannot decode into ImageError."""
    try:
        yield
    except (MemoryError, ImageError):
        raise
    except UnidentifiedImageError:
        raise ImageError("unknown image format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {_MAX_MEGAPIXELS} megapixels; scale it down") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(one_line(error) or type(error).__name__) from None
    except Exception as error:  # each of Pillow's decoders has its own for damaged files
        raise ImageError(one_line(f"{type(error).__name__}: {error}")) from None


def decode_file(content: bytes, out: NDArray[np.uint8]) -> int:
    """Decodes the content of an image file into `out`, uint8 [image_size, image_size, channels].

    Returns the bits of the grey values, 8, 12 or 16, of a file that stores grey in more than 8 bits; else 0.
    Raises ImageError.
    """
    if not content:
        raise ImageError("the file is empty")
    if decode_plain_jpeg(content, out):
        return 0
    with image_errors(), Image.open(io.BytesIO(content)) as image:
        out[...], bits = _fit(image, *out.shape[1:])
    return bits


def fit_image(image: Image.Image, image_size: int, channels: int) -> NDArray[np.uint8]:
    """Returns the image upright, opaque, in grey or RGB: scales its shorter side to image_size and crops the center.

    Transparent pixels become white, because the colors stored under them are arbitrary. Grey values of more than 8 bits
    are scaled by the smallest of 8, 12 and 16 bits that holds the image's largest value. Returns uint8
    [image_size, image_size, channels]. Raises ValueError for pixels whose range is unknown.
    """
    return _fit(image, image_size, channels)[0]


def _fit(image: Image.Image, image_size: int, channels: int) -> tuple[NDArray[np.uint8], int]:
    """Returns the pixels, and the bits of the grey values as decode_file does."""
    if isinstance(image, ImageFile.ImageFile) and image.tile and ";16" in str(image.tile[0].args):
        _check_16_bits(image)
    if "exif" in image.info or image.format in ("PNG", "TIFF", "MPO"):  # parsing EXIF costs as much as a small JPEG
        image = _rotate_upright(image)
    image, bits = _reduce_grey(image)
    image, mode = _remove_transparency(image), "L" if channels == 1 else "RGB"
    if image.mode != mode:  # convert() copies the image even where the mode is right
        image = image.convert(mode)
    if image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(image_size, image_size, channels), bits


def fit_images(images: NDArray[np.uint8], image_size: int, channels: int) -> NDArray[np.uint8]:
    """Applies fit_image to each image of an array.

    Takes uint8 [N, H, W, C], returns uint8 [N, image_size, image_size, channels]. Raises DataError if they do not fit
    into the memory of this machine.
    """
    if images.shape[1:] == (image_size, image_size, channels):
        return images
    num_bytes, memory_bytes = len(images) * image_size**2 * channels, _memory_bytes()
    if num_bytes > memory_bytes:
        raise DataError(
            f"data.image_size={image_size}: {len(images):,} images need {num_bytes / 1e9:,.0f} GB, but this machine "
            f"has {memory_bytes / 1e9:,.0f} GB of memory; lower it"
        )
    pil_images = (Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images)
    return np.stack([fit_image(image, image_size, channels) for image in pil_images])


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def decode_plain_jpeg(content: bytes, out: NDArray[np.uint8]) -> bool:
    """Decodes a plain JPEG file of exactly the size of `out` into it. Returns False when the file is not plain.

    The pixels equal those of Pillow and fit_image, because both use libjpeg-turbo; at 32 pixels it takes a seventh of
    the time. The caller leaves everything else to Pillow: another size or format, colors that need conversion, several
    images in a file, an EXIF block that may rotate the image, and damaged files.

    out: uint8 [image_size, image_size, channels].
    """
    if not _PILLOW_HAS_TURBO or not content.startswith(b"\xff\xd8") or b"Exif\0\0" in content or b"MPF\0" in content:
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)
        required_colorspace, output_colorspace = ("Gray", "GRAY") if out.shape[2] == 1 else ("YCbCr", "RGB")
        if (height, width, colorspace) != (*out.shape[:2], required_colorspace):
            return False
        simplejpeg.decode_jpeg(content, output_colorspace, buffer=out)
    except (ValueError, KeyError):  # ValueError: damaged; KeyError: a chroma subsampling unknown to simplejpeg
        return False
    return True


def _rotate_upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation and ignores an unreadable EXIF block.

    Pillow's exif_transpose does not serve: it also writes the EXIF block again.
    """
    image.load()  # in a PNG file the EXIF block may follow the pixels
    try:
        transpose = _TRANSPOSE_OF_ORIENTATION.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (struct.error, SyntaxError, ValueError, TypeError, LookupError, OverflowError):
        transpose = None
    return image if transpose is None else image.transpose(transpose)


def _reduce_grey(image: Image.Image) -> tuple[Image.Image, int]:
    """Reduces grey values of more than 8 bits to 8. Returns the bits that hold the largest value, 0 for other images.

    Pillow's own conversion clips the values at 255. A file does not say how many of its 16 bits are in use.
    """
    if image.mode == "F":
        lowest, highest = image.getextrema()
        raise ValueError(
            f"its pixels are fractions from {lowest:g} to {highest:g}, of unknown range; convert it to 8 bits"
        )
    if not image.mode.startswith("I"):
        return image, 0
    values = np.asarray(image, dtype=np.int64)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < 0 or highest >= 1 << _GREY_BITS[-1]:
        raise ValueError(f"its grey values are {lowest} to {highest}, expected 0 to 65535; convert it to 8 or 16 bits")
    bits = next(bits for bits in _GREY_BITS if highest < 1 << bits)
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8)), bits


def _check_16_bits(image: ImageFile.ImageFile) -> None:
    """Raises ValueError for 16-bit values that Pillow does not read as they are meant.

    It reads the upper 8 bits of colors, which may be as good as empty, and does not invert grey that counts from white.
    """
    if image.mode.startswith("I"):
        if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise ValueError("its 16-bit grey counts from white to black; convert it to 8 bits")
        return
    extrema = image.getextrema()
    colors = extrema[:3] if isinstance(extrema[0], tuple) else (extrema,)
    if max(highest for _, highest in colors) < 16:  # of 255
        raise ValueError("its colors have 16 bits, but no value above 4095, so it would be black; convert it to 8 bits")


def _remove_transparency(image: Image.Image) -> Image.Image:
    """Lays transparent pixels on white."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)
