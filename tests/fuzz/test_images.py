"""Damaged and odd image files: each is decoded to 8-bit RGB, or refused in one line."""

from random import Random

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from drcnn.data import load_image, resize_for_test
from drcnn.data.image import read_size
from drcnn.errors import DataError

HEIGHT, WIDTH = 20, 28
BIG = (
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\xff\xd9",
    b"\xff\xd8",
    b"IEND",
    b"\xff\xc4",
    b"\0" * 64,
)


def files(folder) -> list[bytes]:
    """One file of each kind that users have."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    smooth = np.linspace(0, 255, WIDTH, dtype=np.uint8)[None, :, None].repeat(HEIGHT, 0).repeat(3, 2)
    picture, plain = Image.fromarray(pixels), Image.fromarray(smooth)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    kinds = [
        (plain, "jpg", {"quality": 90}),
        (plain, "jpg", {"progressive": True, "exif": exif}),
        (plain.convert("L"), "jpg", {"icc_profile": profile}),
        (plain.convert("CMYK"), "jpg", {}),
        (picture, "png", {"exif": exif}),
        (picture.convert("RGBA"), "png", {}),
        (picture.convert("P"), "png", {"transparency": 3}),
        (picture.convert("1"), "png", {}),
        (picture.convert("LA"), "png", {}),
        (Image.fromarray(random.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)), "png", {}),
        (picture, "png", {"save_all": True, "append_images": [plain, picture]}),
        (picture, "bmp", {}),
        (picture.convert("P"), "bmp", {}),
        (picture, "gif", {"save_all": True, "append_images": [plain, picture], "loop": 0}),
        (picture, "tiff", {"compression": "tiff_lzw"}),
        (picture.convert("F"), "tiff", {}),
        (picture.convert("LAB"), "tiff", {}),
        (picture, "webp", {"save_all": True, "append_images": [plain]}),
        (plain, "webp", {"quality": 80, "exif": exif}),
        (picture, "ppm", {}),
        (picture, "tga", {}),
    ]
    made = []
    for i, (image, ending, options) in enumerate(kinds):
        path = folder / f"{i}.{ending}"
        image.save(path, **options)
        made.append(path.read_bytes())
    return made


@pytest.mark.parametrize("part", range(2))
def test_images(fuzz, damage, tmp_path, part):
    originals = files(tmp_path)
    read = 0

    def case(random: Random) -> None:
        nonlocal read
        data = random.choice(originals)
        if random.random() < 0.9:
            data = damage(random).bytes(data, (*BIG, b"\0", b"\xff"))
        path = tmp_path / f"x.{random.choice(('jpg', 'png', 'bmp', 'gif', 'tif', 'webp', 'txt', 'eps'))}"
        path.write_bytes(data)
        size = random.choice((None, None, (HEIGHT, WIDTH), (WIDTH, HEIGHT)))
        upright = random.random() < 0.5
        try:
            image = load_image(path, size=size, upright=upright, max_pixels=1_000_000)
        finally:
            path.unlink()
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
        assert size is None or image.shape[:2] == size
        assert resize_for_test(image, 16, 32).shape[0] == 3
        read += 1

    fuzz(f"image{part}", 500, case)
    assert read > 100


def test_sizes_from_headers(fuzz, damage, tmp_path):
    originals = files(tmp_path)

    def case(random: Random) -> None:
        path = tmp_path / "x.jpg"
        path.write_bytes(damage(random).bytes(random.choice(originals), (*BIG, b"\0", b"\xff")))
        assert all(length >= 0 for length in read_size(path, upright=random.random() < 0.5))

    fuzz("size", 300, case)


def test_undamaged_files_are_read(tmp_path):
    """What the fuzzers start from, so that they test more than refusals."""
    refused = 0
    for i, data in enumerate(files(tmp_path)):
        path = tmp_path / f"whole{i}"
        path.write_bytes(data)
        try:
            assert load_image(path).shape == (HEIGHT, WIDTH, 3)
        except DataError as error:
            assert "floating-point" in str(error) or "LAB" in str(error)
            refused += 1
    assert refused <= 2
