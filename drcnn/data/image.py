"""Decoding of image files to RGB."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from drcnn.errors import DataError

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, OverflowError)
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def load_image(
    path: str | os.PathLike[str], *, size: tuple[int, int] | None = None, upright: bool = False
) -> np.ndarray:
    """Decodes an image file to 8-bit RGB.

    Grey, palette, CMYK and 16-bit files are converted; 16-bit values are divided by 257. An alpha
    channel is dropped. The pixels are taken as stored: the boxes of a data set refer to them, and
    COCO's tools ignore EXIF orientation too. Only where ``size`` fits the rotated picture but not the
    stored one is the rotation applied.

    Args:
        path (str | PathLike): the file.
        size (tuple[int, int] | None): height and width in pixels that the image must have.
        upright (bool): apply the EXIF orientation always, for photographs without annotations.

    Returns:
        np.ndarray[H, W, 3]: uint8 RGB.

    Raises:
        DataError: if the file is missing, cannot be decoded, or has another size than ``size``.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(_oriented(image, size, upright), path, size)
    except FileNotFoundError:
        raise DataError(f"image {path} not found") from None
    except UnidentifiedImageError:
        raise DataError(f"image {path} cannot be decoded: not a known image format") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"image {path} has too many pixels to be decoded safely; make it smaller") from None
    except _DECODE_ERRORS as error:
        said = getattr(error, "strerror", None) or str(error) or type(error).__name__
        cause = " ".join(said.split())
        raise DataError(f"image {path} cannot be decoded: {cause}") from None


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
                # A PNG without an EXIF block before its pixels would be decoded to look behind them.
                if upright and not (image.format == "PNG" and "exif" not in image.info):
                    if image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS:
                        width, height = height, width
                return height, width
    except FileNotFoundError:
        raise DataError(f"image {path} not found") from None
    except UnidentifiedImageError:
        raise DataError(f"image {path} cannot be decoded: not a known image format") from None
    except (Image.DecompressionBombError, *_DECODE_ERRORS) as error:
        cause = " ".join(str(error).split())
        raise DataError(f"image {path} cannot be decoded: {cause}") from None


def _oriented(image: Image.Image, size: tuple[int, int] | None, upright: bool) -> Image.Image:
    if not upright:
        if size is None or (image.height, image.width) == size:
            return image
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        if orientation not in _SIDEWAYS or (image.width, image.height) != size:
            return image
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, path: Path, size: tuple[int, int] | None) -> np.ndarray:
    if size is not None and (image.height, image.width) != size:
        raise DataError(
            f"image {path} is {image.width}x{image.height} pixels (width x height), but its annotations "
            f"say {size[1]}x{size[0]}; correct the annotations or the file"
        )
    if image.mode == "F":
        raise DataError(f"image {path} holds floating-point pixels; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64)
        grey = (np.clip(wide, 0, 65535) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
