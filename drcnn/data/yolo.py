"""Reading YOLO's format: a ``data.yaml`` and, for each image, a text file with a row for each object.

A row is ``class cx cy w h`` or, for segmentation, ``class x1 y1 x2 y2 x3 y3 ...``, in fractions of the
image's width and height. The labels of ``.../images/.../NAME.jpg`` lie in ``.../labels/.../NAME.txt``; an
image without such a file has no objects. The tools of this format turn images upright by their EXIF
orientation before they label them, so sizes and pixels are upright here too.
"""

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from drcnn.data.coco import CocoDataset, read_source
from drcnn.data.problems import Problems, SkipKind
from drcnn.data.records import is_text
from drcnn.data.source import Content, Source, common_folder, read_sizes, tracked
from drcnn.errors import DataError, shown

_IMAGE_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_yolo(
    data_yaml: str | Path,
    split: str,
    *,
    base: str | Path | None = None,
    skip: Collection[SkipKind] = (),
    filter_empty: bool = False,
    hint: str = "check the path",
) -> CocoDataset:
    """Reads and checks a data set in YOLO's format; see :func:`yolo_source` for the arguments."""
    source = yolo_source(Path(data_yaml), split, None if base is None else Path(base), skip, hint)
    return read_source(source, filter_empty=filter_empty, hint=hint)


def yolo_source(
    data_yaml: Path, split: str, base: Path | None, skip: Collection[SkipKind], hint: str
) -> Source:
    """Describes a split in YOLO's format.

    Image ids are 1, 2, ... in the order of the paths, category ids the class numbers of the format. A
    polygon becomes its bounding box and stays as the annotation's ``segmentation``, in pixels as in COCO.

    Args:
        data_yaml (Path): holds ``train``, ``val`` and ``test``, each a folder, a text file that lists
            images, or several of them; ``names``, a list or a dict by number; and, if wanted, ``nc`` and
            ``path``, the folder that the splits are relative to. Without ``path`` that is its own folder.
        split (str): "train", "val" or "test".
        base (Path | None): folder that replaces ``path``.
        skip (Collection[SkipKind]): kinds of bad input to leave out and count instead of raising.
        hint (str): what to do if a file or folder is missing.
    """
    return Source("yolo", data_yaml, partial(_content, data_yaml, split, base, hint), tuple(skip))


def split_names(data_yaml: Path, hint: str) -> list[str]:
    """Returns which of "train", "val" and "test" a file describes."""
    description = _read_yaml(data_yaml, hint)
    return [name for name in ("train", "val", "test") if description.get(name)]


def _content(data_yaml: Path, split: str, base: Path | None, hint: str, problems: Problems) -> Content:
    description = _read_yaml(data_yaml, hint)
    names = _class_names(description, data_yaml)
    images = _images(description, data_yaml, split, base or _base(description, data_yaml))
    if not images:
        raise DataError(f"no image found for {split} of {data_yaml}; correct `{split}` or `path` in it")
    folder = common_folder({image.parent for image in images})
    labels = [_label_file(image) for image in images]
    with ThreadPoolExecutor(max_workers=8) as pool:
        texts = list(tracked(pool.map(_read_text, labels, chunksize=64), len(labels), "labels"))
    sizes = read_sizes(images, problems, upright=True)
    data: dict[str, Any] = {
        "images": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }
    annotations: list[dict[str, Any]] = []
    for image_id, (image, label, text, size) in enumerate(zip(images, labels, texts, sizes, strict=True), 1):
        if isinstance(text, DataError):
            problems.add("malformed-file", 1, str(text))
        if size is None or isinstance(text, DataError):
            continue
        name = image.relative_to(folder).as_posix()
        data["images"].append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        for record in _rows(text or "", label, size, len(names), problems):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **record})
    if any(text is not None for text in texts):  # without any label file the split is unlabelled
        data["annotations"] = annotations
    return Content(data, folder)


def _read_yaml(data_yaml: Path, hint: str) -> dict[str, Any]:
    try:
        description = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"annotation file {data_yaml} not found: {hint}") from None
    except OSError as error:
        raise DataError(f"annotation file {data_yaml} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"annotation file {data_yaml} is not valid yaml: {said}; correct the file") from None
    except (ValueError, TypeError, RecursionError) as error:  # dates and numbers out of range, deep nesting
        said = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"annotation file {data_yaml} is not valid yaml: {said}; correct the file") from None
    if not isinstance(description, dict):
        raise DataError(f"{data_yaml} must hold train, val and names; correct the file")
    return description


def _class_names(description: dict[str, Any], data_yaml: Path) -> list[str]:
    names = description.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise DataError(
                f"{data_yaml}: the numbers in `names` must be 0, 1, 2, ..., got {shown(list(names))}"
            )
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{data_yaml} has no `names`; list the names of the classes in it")
    count = description.get("nc", len(names))
    if count != len(names):
        raise DataError(
            f"{data_yaml}: nc is {shown(count)} but there are {len(names)} names; correct one of them"
        )
    for name in names:
        # Of plain types alone: a few lines of yaml can describe a list of billions of entries.
        if not isinstance(name, str | int | float) or not is_text(str(name)):
            raise DataError(f"{data_yaml}: the class name {shown(name)} in `names` is not text")
    return [str(name) for name in names]


def _base(description: dict[str, Any], data_yaml: Path) -> Path:
    own = data_yaml.parent
    path = description.get("path")
    if not path:
        return own
    if not isinstance(path, str):
        raise DataError(f"{data_yaml}: `path` is {shown(path)}, expected a folder; correct it")
    if not os.path.isdir(own / path):
        raise DataError(
            f"{data_yaml}: path {own / path} is no folder; correct `path`, or remove it if the data lie "
            "beside the file, or pass --data.train.images FOLDER and the same for the other splits"
        )
    return own / path


def _images(description: dict[str, Any], data_yaml: Path, split: str, base: Path) -> list[Path]:
    """Lists the image files of a split by absolute path, sorted.

    Raises:
        DataError: if the split or something that it names is missing, or an image is in it twice.
    """
    entries = description.get(split)
    if not entries:
        raise DataError(f"{data_yaml} has no `{split}`; add it, or choose another split")
    found: list[str] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str) or not is_text(entry):
            raise DataError(f"{data_yaml}: {split} is {shown(entry)}, expected a folder or a list of images")
        path = base / entry
        if not os.path.exists(path) and entry.startswith("../"):  # Roboflow's exports mean their own folder
            path = base / entry[len("../") :]
        if os.path.abspath(path) == os.path.abspath(os.sep):
            raise DataError(
                f"{data_yaml}: {split} is {path}, all of this computer; name the folder of the images"
            )
        if os.path.isdir(path):
            found += _walk(path)
        elif os.path.isfile(path):
            found += _read_list(path, base)
        else:
            raise DataError(f"{data_yaml}: {split} {path} not found; correct `{split}` or `path` in the file")
    images = sorted(os.path.abspath(path) for path in found)
    for one, next_one in pairwise(images):
        if one == next_one:
            raise DataError(f"{data_yaml}: image {one} is in {split} twice; remove one")
    return [Path(image) for image in images]


def _walk(top: Path) -> list[str]:
    """Lists the images in and below a folder, through links, each folder once: links can form circles."""
    found: list[str] = []
    seen: set[str] = set()
    for folder, below, files in os.walk(top, followlinks=True):
        below.sort()
        real = os.path.realpath(folder)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        found += [os.path.join(folder, f) for f in files if f.lower().endswith(_IMAGE_ENDINGS)]
    return found


def _read_list(path: Path, base: Path) -> list[str]:
    """Reads a list of images: paths relative to its folder, or absolute, but none outside of the data set.

    Raises:
        DataError: if it cannot be read, or a path leads out of its folder and of ``base``.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"list of images {path} cannot be read: {reason}") from None
    folders = {os.path.abspath(path.parent), os.path.abspath(base)}
    images = []
    for number, line in enumerate(map(str.strip, lines), 1):
        image = os.path.abspath(path.parent / line)
        if line and not (is_text(line) and any(image.startswith(os.path.join(f, "")) for f in folders)):
            raise DataError(
                f"list of images {path}, line {number}: {shown(line)} leads out of the data set's folder, "
                f"{base}; move the image there, or set `path` in data.yaml to a folder that holds all of them"
            )
        if line:
            images.append(image)
    return images


def _label_file(image: Path) -> Path:
    """Replaces the last folder named images by labels; without one, the labels lie beside the image."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_text(label: Path) -> str | DataError | None:
    try:
        return label.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        return DataError(f"label file {label} cannot be read: {reason}")


def _rows(
    text: str, label: Path, size: tuple[int, int], num_classes: int, problems: Problems
) -> list[dict[str, Any]]:
    """Turns the rows of a label file into COCO's fields, in pixels of an image of ``size``."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        origin = f"{label}: line {number}"
        values = _numbers(words)
        if values is None or not (len(values) == 5 or (len(values) >= 7 and len(values) % 2)):
            problems.add(
                "malformed-object",
                1,
                f"{origin} is {shown(line.strip())}; expected the numbers `class cx cy w h` or "
                "`class x1 y1 x2 y2 x3 y3 ...`",
            )
        elif not (values[0].is_integer() and 0 <= values[0] < num_classes):
            problems.add(
                "unknown-category",
                1,
                f"{origin} has class {values[0]:g}; the names in data.yaml are 0 to {num_classes - 1}",
            )
        else:
            records.append({"category_id": int(values[0]), **_geometry(values[1:], size), "_origin": origin})
    return records


def _numbers(words: Sequence[str]) -> list[float] | None:
    try:
        values = [float(word) for word in words]
    except ValueError:
        return None
    return values if all(abs(value) < float("inf") for value in values) else None


def _geometry(values: list[float], size: tuple[int, int]) -> dict[str, Any]:
    height, width = size
    if len(values) == 4:
        cx, cy, w, h = values
        return {"bbox": [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]}
    xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
    doubled = sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))  # shoelace formula
    return {
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": abs(doubled) / 2,
        "segmentation": [[value for point in zip(xs, ys, strict=True) for value in point]],
    }
