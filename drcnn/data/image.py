"""Decoding of image files to RGB."""

import io
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from drcnn.data.remote import RemoteFile
from drcnn.errors import DataError

MAX_PIXELS = 178_956_970
"""Default limit of an image's pixels, the one at which Pillow refuses too: 0.5 GiB of RGB."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")
"""Formats of pixels alone: Pillow knows others that it hands to programs such as Ghostscript."""

_AT_ONCE = 64 << 20
"""Most bytes of a file that is read before its header is looked at."""

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_pillow_limit = threading.Lock()


def load_image(
    path: str | os.PathLike[str] | RemoteFile,
    *,
    size: tuple[int, int] | None = None,
    upright: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decodes an image file to 8-bit RGB.

    Grey, palette, CMYK and 16-bit files are converted; 16-bit values are divided by 257. An alpha
    channel is dropped. The pixels are taken as stored: the boxes of a data set refer to them, and
    COCO's tools ignore EXIF orientation too. Only where ``size`` fits the rotated picture but not the
    stored one is the rotation applied. Of an animation the first picture is taken.

    Args:
        path (str | PathLike | RemoteFile): the file, or the content of an address.
        size (tuple[int, int] | None): height and width in pixels that the image must have.
        upright (bool): apply the EXIF orientation always, for photographs without annotations.
        max_pixels (int): most pixels that are decoded: a file of a few bytes can state any size.

    Returns:
        np.ndarray[H, W, 3]: uint8 RGB.

    Raises:
        DataError: if the file is missing, cannot be decoded, has more than ``max_pixels`` pixels, or has
            another size than ``size``.
    """
    with _opened(path, at_once=True) as image:
        _check_size(image, path, size, max_pixels)
        image.load()
        return _to_rgb(_oriented(image, size, upright), path, size)


def read_size(path: str | os.PathLike[str], *, upright: bool = False) -> tuple[int, int]:
    """Reads the size of an image from its file's header, without decoding it.

    Args:
        path (str | PathLike): the file.
        upright (bool): the size after the EXIF orientation is applied, as ``load_image(upright=True)``
            gives it, not that of the stored pixels.

    Returns:
        tuple[int, int]: height and width in pixels.

    Raises:
        DataError: if the file is missing or its header cannot be read.
    """
    with _opened(path) as image:
        width, height = image.size
        # A PNG without an EXIF block before its pixels would be decoded to look behind them.
        if upright and not (image.format == "PNG" and "exif" not in image.info):
            if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
                width, height = height, width
        return height, width


@contextmanager
def _opened(path: str | os.PathLike[str] | RemoteFile, at_once: bool = False) -> Iterator[Image.Image]:
    """Opens a file and reads its header, or all ``at_once``; whatever goes wrong with it is one DataError."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of much that it then reads, or refuses with an error.
            warnings.simplefilter("ignore")
            with _open(_content(path) if at_once else path) as image:
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"image {path} not found") from None
    except UnidentifiedImageError:
        raise DataError(f"image {path} cannot be decoded: not a known image format") from None
    except Exception as error:  # what a damaged file makes its decoder raise has no bounds
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"image {path} cannot be decoded: {said}") from None


def _content(path: str | os.PathLike[str] | RemoteFile) -> str | os.PathLike[str] | io.BytesIO:
    """All of a file, unless it is large: decoding takes an eighth longer when it reads piece by piece."""
    if isinstance(path, RemoteFile) or os.stat(path).st_size > _AT_ONCE or not Path(path).is_file():
        return path
    return io.BytesIO(Path(path).read_bytes())


def _open(path: str | os.PathLike[str] | io.BytesIO) -> Image.Image:
    try:
        return Image.open(path, formats=_FORMATS)
    except Image.DecompressionBombError:
        # Ours is the limit that counts, as it can be set and its error names the size.
        with _pillow_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(path, formats=_FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit


def _check_size(
    image: Image.Image, path: str | os.PathLike[str], size: tuple[int, int] | None, max_pixels: int
) -> None:
    """Refuses, before anything is decoded, an image without pixels, of too many, or not of ``size``."""
    width, height = image.size
    if not width * height:
        raise DataError(f"image {path} has no pixels: it is {width}x{height}")
    if width * height > max_pixels:
        raise DataError(
            f"image {path} is {width}x{height} pixels (width x height), more than the limit of {max_pixels}; "
            "make it smaller, or raise --data.max-pixels (drcnn predict: --max-pixels) if you trust the file"
        )
    if size is not None and size not in ((height, width), (width, height)):
        raise _another_size(image, path, size)


def _another_size(image: Image.Image, path: str | os.PathLike[str], size: tuple[int, int]) -> DataError:
    return DataError(
        f"image {path} is {image.width}x{image.height} pixels (width x height), but its annotations "
        f"say {size[1]}x{size[0]}; correct the annotations or the file"
    )


def _oriented(image: Image.Image, size: tuple[int, int] | None, upright: bool) -> Image.Image:
    if not upright:
        if size is None or (image.height, image.width) == size:
            return image
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation not in _SIDEWAYS or (image.width, image.height) != size:
            return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, path: str | os.PathLike[str], size: tuple[int, int] | None) -> np.ndarray:
    if size is not None and (image.height, image.width) != size:
        raise _another_size(image, path, size)
    if image.mode == "F":
        raise DataError(f"image {path} holds floating-point pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        grey = (np.clip(wide, 0, 65535) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
