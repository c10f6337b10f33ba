"""Writing the synthetic data set to disk in COCO format."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drcnn.data.synthetic.shapes import SHAPES, Drawn, draw_image
from drcnn.errors import ConfigError, DataError

_MARKER = "synthetic.json"
_FORMAT = 2  # raise when the same settings give other data, so that old folders are made anew


@dataclass(frozen=True)
class SyntheticConfig:
    """A synthetic data set; equal settings give equal annotations, byte for byte.

    It has the splits train, val and test: ``images/SPLIT`` and ``annotations/instances_SPLIT.json``.

    Raises:
        ConfigError: if a value cannot be used.
    """

    images: int = 400
    """Number of training images."""
    val_images: int = 100
    """Number of validation images."""
    test_images: int = 0
    """Number of held-out test images."""
    size: tuple[int, int] = (160, 256)
    """Least and greatest height and width of the images in pixels; each side is drawn by itself."""
    classes: tuple[str, ...] = ("circle", "square", "triangle", "star")
    """Shapes to draw, out of circle, square, triangle, star, ring, cross and hexagon."""
    objects: tuple[int, int] = (1, 6)
    """Least and greatest number of objects in an image."""
    hue_spread: float = 30.0
    """Each class has a hue; objects differ from it by up to so many degrees. 180: colour says nothing."""
    format: str = "jpg"
    """File format of the images: jpg or png."""
    seed: int = 0
    """Seed of the whole data set."""

    def __post_init__(self) -> None:
        """Checks the values."""
        unknown = [name for name in self.classes if name not in SHAPES]
        if unknown or not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(
                f"synthetic.classes must be different names out of {', '.join(SHAPES)}; got {self.classes}"
            )
        if self.format not in ("jpg", "png"):
            raise ConfigError(f"synthetic.format must be jpg or png, got {self.format!r}")
        for name, (low, high), least in (("size", self.size, 32), ("objects", self.objects, 0)):
            if not least <= low <= high:
                raise ConfigError(f"synthetic.{name} must be a range from at least {least}, got {low} {high}")
        if not 0 <= self.hue_spread <= 180:
            raise ConfigError(f"synthetic.hue_spread is between 0 and 180 degrees, got {self.hue_spread}")
        for name in ("images", "val_images", "test_images", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"synthetic.{name} must not be negative, got {getattr(self, name)}")


def make_synthetic(root: str | Path, config: SyntheticConfig) -> bool:
    """Makes the data set in ``root`` unless it is there already with the same settings.

    The folder appears at once when it is complete. A synthetic data set with other settings is
    replaced; a folder with anything else in it is refused.

    Args:
        root (str | Path): folder to make.
        config (SyntheticConfig): what to draw.

    Returns:
        bool: True if it was made, False if it was there.

    Raises:
        DataError: if ``root`` holds something else or cannot be written.
    """
    root = Path(root)
    wanted = json.dumps({"format_version": _FORMAT, **asdict(config)}, indent=1, sort_keys=True)
    if _marker(root) == wanted:
        return False
    if root.exists() and _marker(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"{root} holds other files, so no synthetic data are made in it; choose another folder"
        )
    building = root.parent / f".{root.name}.{os.getpid()}"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        counts = {"train": config.images, "val": config.val_images, "test": config.test_images}
        for number, (split, count) in enumerate(counts.items()):
            if count:
                _write_split(building, split, number, count, config)
        (building / _MARKER).write_text(wanted)
        return _install(building, root, wanted)
    except OSError as error:
        raise DataError(f"synthetic data cannot be written to {root}: {error.strerror}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _marker(root: Path) -> str | None:
    try:
        return (root / _MARKER).read_text()
    except OSError:
        return None


def _install(building: Path, root: Path, wanted: str) -> bool:
    """Moves the finished folder to its place; another process may have been faster."""
    old = building.with_name(building.name + ".old")
    if _marker(root) not in (None, wanted):
        with contextlib.suppress(FileNotFoundError):
            os.rename(root, old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        os.rename(building, root)
    except OSError:
        if _marker(root) == wanted:
            return False
        raise
    return True


def _write_split(root: Path, split: str, number: int, count: int, config: SyntheticConfig) -> None:
    folder = root / "images" / split
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        generator = np.random.default_rng([config.seed, number, i])
        height, width = (int(n) for n in generator.integers(config.size[0], config.size[1] + 1, 2))
        wanted = int(generator.integers(config.objects[0], config.objects[1] + 1))
        picture, objects = draw_image(height, width, config.classes, wanted, config.hue_spread, generator)
        name = f"{i + 1:06d}.{config.format}"
        Image.fromarray(picture).save(folder / name, **({"quality": 92} if config.format == "jpg" else {}))
        images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
        annotations += [_annotation(o, len(annotations) + k + 1, i + 1) for k, o in enumerate(objects)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(config.classes)]
    content = {
        "info": {"description": "drcnn synthetic shapes", "seed": config.seed, "split": split},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    (root / "annotations").mkdir(exist_ok=True)
    text = json.dumps(content, separators=(",", ":"))
    (root / "annotations" / f"instances_{split}.json").write_text(text)


def _annotation(drawn: Drawn, annotation_id: int, image_id: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(drawn.mask.any(axis=1)), np.flatnonzero(drawn.mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": drawn.label + 1,
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(drawn.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(drawn.mask.shape), "counts": run_lengths(drawn.mask)},
    }


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encodes a mask as COCO's uncompressed run lengths.

    Args:
        mask (np.ndarray[H, W]): bool.

    Returns:
        list[int]: lengths of the runs of zeros and ones in turn, column by column, zeros first.
    """
    flat = mask.ravel(order="F").astype(np.int8)
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs
