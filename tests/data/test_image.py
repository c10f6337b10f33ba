"""Decoding of image files."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drcnn.data import load_image
from drcnn.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def save(tmp_path, array, mode=None, name="a.png", **options):
    path = tmp_path / name
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def test_rgb_is_exact_and_writable(tmp_path):
    image = load_image(save(tmp_path, PIXELS))
    assert image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, PIXELS)


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_other_modes_become_rgb(tmp_path, mode):
    image = load_image(save(tmp_path, PIXELS, mode))
    assert image.shape == (5, 7, 3)
    if mode == "RGBA":
        np.testing.assert_array_equal(image, PIXELS)
    if mode == "L":
        np.testing.assert_array_equal(
            image, np.array(Image.fromarray(PIXELS).convert("L"))[..., None].repeat(3, 2)
        )


def test_cmyk(tmp_path):
    flat = np.full((8, 8, 3), (200, 30, 90), dtype=np.uint8)
    image = load_image(save(tmp_path, flat, "CMYK", name="a.jpg", quality=95))
    assert np.abs(image.astype(int) - flat).max() < 6


def test_16_bit_grey_is_scaled_not_cut(tmp_path):
    image = load_image(save(tmp_path, np.array([[0, 257, 32896, 65535]], dtype=np.uint16)))
    assert image[0, :, 0].tolist() == [0, 1, 128, 255] and image.shape == (1, 4, 3)


def test_exif_rotation_is_applied_only_if_the_annotations_want_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path, PIXELS, exif=exif)
    np.testing.assert_array_equal(load_image(path), PIXELS)
    np.testing.assert_array_equal(load_image(path, size=(5, 7)), PIXELS)
    np.testing.assert_array_equal(load_image(path, size=(7, 5)), np.rot90(PIXELS, -1))
    np.testing.assert_array_equal(load_image(path, upright=True), np.rot90(PIXELS, -1))


def test_another_size_than_annotated(tmp_path):
    with pytest.raises(
        DataError, match=r"a.png is 7x5 pixels \(width x height\), but its annotations say 9x5"
    ):
        load_image(save(tmp_path, PIXELS), size=(5, 9))


def test_a_large_file_is_not_read_before_its_header(tmp_path, monkeypatch):
    path = tmp_path / "large.jpg"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("all of it is read"))
    with pytest.raises(DataError, match="not a known image format"):
        load_image(path)
    with pytest.raises(pytest.fail.Exception, match="all of it is read"):
        load_image(save(tmp_path, PIXELS))


def test_bad_files(tmp_path):
    path = save(tmp_path, np.zeros((64, 64, 3), np.uint8), name="b.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    (tmp_path / "text.jpg").write_text("no image")
    for name, message in (
        ("b.jpg", "cannot be decoded: (?i:.*truncated)"),
        ("text.jpg", "cannot be decoded: not a known image format"),
        ("nothing.jpg", "not found"),
        (".", "cannot be decoded: Is a directory"),
    ):
        with pytest.raises(DataError, match=message):
            load_image(tmp_path / name)


def png_header(width, height):
    """A PNG that states a size and ends where its pixels should begin."""

    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + header) + chunk(b"IDAT")


@pytest.mark.parametrize("size", [(20_000, 10_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_bomb_is_refused_before_it_is_decoded(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(DataError, match=rf"bomb.png is {size[0]}x{size[1]} .*178956970.*--data.max-pixels"):
        load_image(path)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_the_limit_of_pixels_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # what Pillow refuses, the limit may still allow
    path = save(tmp_path, PIXELS)
    np.testing.assert_array_equal(load_image(path, max_pixels=35), PIXELS)
    with pytest.raises(DataError, match=r"7x5 pixels .*more than the limit of 34"):
        load_image(path, max_pixels=34)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_an_image_of_another_size_is_not_decoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(3000, 2000))
    with pytest.raises(DataError, match=r"3000x2000 pixels .*annotations say 9x5"):
        load_image(path, size=(5, 9))


def test_a_format_that_runs_a_program_is_no_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="not a known image format"):
        load_image(path)
