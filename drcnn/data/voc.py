"""Reading PASCAL VOC: an XML file for each image, and text files that list the images of a split.

Coordinates in the files are 1-based inclusive pixel numbers. In the continuous coordinates of this package
these are x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax, as wide as VOC says: xmax - xmin + 1.
Objects marked ``difficult`` are handled as crowd regions are: not trained on, and ignored in evaluation.
"""

import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from drcnn.data.coco import CocoDataset, read_source
from drcnn.data.problems import Problems, SkipKind
from drcnn.data.records import escapes, is_text
from drcnn.data.source import Content, Source, common_folder, read_sizes, tracked
from drcnn.errors import DataError, shown

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)
"""The 20 classes of PASCAL VOC 2007 to 2012, in the order of their labels."""

_HOW_TO_FIX = "restore or correct the file, or take it off the list"


class _Listed(NamedTuple):
    """One image of a split: its XML file, whether that exists, and its image file."""

    xml: Path
    labelled: bool
    image: Path


class _Object(NamedTuple):
    """One object as written: its class and box in 1-based inclusive pixels."""

    origin: str
    name: str
    box: tuple[float, float, float, float]
    difficult: bool


def read_voc(
    image_sets: str | Path | Sequence[str | Path],
    *,
    classes: Sequence[str] = (),
    images: str | Path | None = None,
    skip: Collection[SkipKind] = (),
    filter_empty: bool = False,
    hint: str = "check the path",
) -> CocoDataset:
    """Reads and checks a data set in PASCAL VOC format; see :func:`voc_source` for the arguments."""
    sets = [image_sets] if isinstance(image_sets, str | Path) else image_sets
    source = voc_source(
        [Path(s) for s in sets], classes, None if images is None else Path(images), skip, hint
    )
    return read_source(source, filter_empty=filter_empty, hint=hint)


def voc_source(
    image_sets: Sequence[Path],
    classes: Sequence[str],
    images: Path | None,
    skip: Collection[SkipKind],
    hint: str,
) -> Source:
    """Describes a split in PASCAL VOC format.

    Image ids are 1, 2, ... in the order of the lists, category ids 1, 2, ... in the order of the classes.
    Sizes come from the XML files, and from the images' headers where those have none.

    Args:
        image_sets (Sequence[Path]): lists such as ``VOC2007/ImageSets/Main/trainval.txt``, with
            ``VOC2007/Annotations`` and ``VOC2007/JPEGImages`` beside ``ImageSets``; or folders of XML
            files, with the images there or in ``JPEGImages`` beside them. The split is their union.
        classes (Sequence[str]): class names in the order of the labels. Empty: those that occur, sorted.
        images (Path | None): folder of the images, if it is another.
        skip (Collection[SkipKind]): kinds of bad input to leave out and count instead of raising.
        hint (str): what to do if a file or folder is missing.
    """
    reader = partial(_content, tuple(image_sets), tuple(classes), images, hint)
    return Source("voc", Path(" + ".join(map(str, image_sets))), reader, tuple(skip))


def voc_class_names(image_sets: Iterable[Path], skip: Collection[SkipKind], hint: str) -> tuple[str, ...]:
    """Returns the names of the classes that occur in any of ``image_sets``, sorted; the sets may overlap."""
    problems, names = Problems(skip), set()
    for xml in sorted({item.xml for s in image_sets for item in _listed([s], None, hint) if item.labelled}):
        root = _parse(xml, problems)
        if root is not None:
            names.update(found.name for found in _objects(root, xml, problems))
    return tuple(sorted(names))


def _content(
    image_sets: Sequence[Path], classes: Sequence[str], images: Path | None, hint: str, problems: Problems
) -> Content:
    listed = _listed(image_sets, images, hint)
    has_labels = any(item.labelled for item in listed)
    sizes: list[tuple[int, int] | None] = []
    objects: list[list[_Object]] = []
    usable: list[_Listed] = []
    for item in tracked(listed, len(listed), "annotations"):
        root = _parse(item.xml, problems) if has_labels else None
        if has_labels and root is None:
            continue
        usable.append(item)
        sizes.append(None if root is None else _size(root))
        objects.append([] if root is None else list(_objects(root, item.xml, problems)))
    unsized = [i for i, size in enumerate(sizes) if size is None]
    measured = read_sizes([usable[i].image for i in unsized], problems, upright=False)
    for i, size in zip(unsized, measured, strict=True):
        sizes[i] = size
    names = list(classes) or sorted({o.name for found in objects for o in found})
    if not names:
        raise DataError(f"{' + '.join(map(str, image_sets))}: no object names a class; set data.classes")
    folder = common_folder({item.image.parent for item in listed}) if listed else Path()
    data: dict[str, Any] = {
        "images": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(names, 1)],
    }
    annotations: list[dict[str, Any]] = []
    category_ids = {name: k for k, name in enumerate(names, 1)}
    for image_id, (item, size, found) in enumerate(zip(usable, sizes, objects, strict=True), 1):
        if size is None:
            continue
        name = Path(os.path.abspath(item.image)).relative_to(folder).as_posix()
        data["images"].append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
        annotations += _records(found, image_id, len(annotations) + 1, category_ids, problems)
    if has_labels:
        data["annotations"] = annotations
    return Content(data, folder)


def _records(
    objects: list[_Object], image_id: int, first_id: int, category_ids: dict[str, int], problems: Problems
) -> list[dict[str, Any]]:
    records = []
    for found in objects:
        if found.name not in category_ids:
            problems.add(
                "unknown-category",
                1,
                f"{found.origin} has the class {shown(found.name)}, which is not in data.classes",
            )
            continue
        xmin, ymin, xmax, ymax = found.box
        records.append(
            {
                "id": first_id + len(records),
                "image_id": image_id,
                "category_id": category_ids[found.name],
                "bbox": [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1],
                "iscrowd": int(found.difficult),
                "_origin": found.origin,
            }
        )
    return records


def _listed(image_sets: Sequence[Path], images: Path | None, hint: str) -> list[_Listed]:
    """Lists the images of all sets, in their order.

    Raises:
        DataError: if a set is missing or is none, or an image is in it twice.
    """
    listed: dict[Path, _Listed] = {}
    for image_set in image_sets:
        if image_set.is_dir():
            xml_folder = image_set
            stems = sorted(name[: -len(".xml")] for name in _names(xml_folder) if name.endswith(".xml"))
            beside = image_set.parent / "JPEGImages"
            image_folder = images or (beside if beside.is_dir() else image_set)
        else:
            stems = _stems(image_set, hint)
            above = [folder for folder in image_set.parents if folder.name == "ImageSets"]
            if not above:
                raise DataError(
                    f"image set {image_set} is in no folder ImageSets with Annotations and JPEGImages "
                    "beside it; arrange the data as VOC does, or name the folder of the xml files instead"
                )
            xml_folder, image_folder = (
                above[0].parent / "Annotations",
                images or above[0].parent / "JPEGImages",
            )
        present = _names(xml_folder)
        files = _by_stem(image_folder)
        for stem in stems:
            xml = xml_folder / f"{stem}.xml"
            if xml in listed:
                raise DataError(f"{stem} is listed twice in {' + '.join(map(str, image_sets))}; remove one")
            listed[xml] = _Listed(xml, xml.name in present, image_folder / files.get(stem, f"{stem}.jpg"))
    return list(listed.values())


def _names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:
        return frozenset()


def _by_stem(folder: Path) -> dict[str, str]:
    """Files that may be images, by their names without ending."""
    names = sorted(_names(folder), reverse=True)  # of several with one stem the first by name is taken
    return {os.path.splitext(name)[0]: name for name in names if not name.endswith((".xml", ".txt"))}


def _stems(image_set: Path, hint: str) -> list[str]:
    try:
        lines = [line.split() for line in image_set.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise DataError(f"image set {image_set} not found: {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise DataError(f"image set {image_set} cannot be read: {reason}") from None
    for number, words in enumerate(lines, 1):
        if len(words) > 1:
            raise DataError(
                f"image set {image_set}, line {number}: expected the name of an image alone, got "
                f"{shown(' '.join(words))}; choose the list of all classes, such as trainval.txt"
            )
        if words and (escapes(words[0]) or not is_text(words[0])):
            raise DataError(
                f"image set {image_set}, line {number}: {shown(words[0])} leads out of the image folder; "
                "give the name of an image without its ending"
            )
    return [words[0] for words in lines if words]


def _parse(xml: Path, problems: Problems) -> ElementTree.Element | None:
    """Parses an annotation file; None if it is bad and skipped."""
    try:
        root = ElementTree.parse(xml).getroot()
    except FileNotFoundError:
        problems.add("malformed-file", 1, f"annotation file {xml} not found; {_HOW_TO_FIX}")
    except ElementTree.ParseError as error:
        problems.add("malformed-file", 1, f"annotation file {xml} is not valid xml: {error}; {_HOW_TO_FIX}")
    except (OSError, ValueError, LookupError) as error:
        problems.add("malformed-file", 1, f"annotation file {xml} cannot be read: {error}; {_HOW_TO_FIX}")
    else:
        if root.tag == "annotation":
            return root
        problems.add(
            "malformed-file",
            1,
            f"annotation file {xml} is not in VOC format: it holds <{root.tag}>, not <annotation>; "
            f"{_HOW_TO_FIX}",
        )
    return None


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Height and width; None where a tool left them out or wrote 0."""
    try:
        height, width = (int(root.findtext(f"size/{side}", "0")) for side in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _objects(root: ElementTree.Element, xml: Path, problems: Problems) -> Iterable[_Object]:
    """Reads the objects of a file; parts of objects are not objects."""
    for number, element in enumerate(root.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        origin = f"{xml}: object {number} ({name or 'without a name'})"
        texts = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        difficult = (element.findtext("difficult") or "0").strip()
        if not name:
            problems.add("malformed-object", 1, f"{origin} has no class; give it a <name>")
        elif any(text is None or not _is_number(text) for text in texts):
            said = "no bndbox" if texts == [None] * 4 else f"the bndbox {shown(texts)}"
            problems.add(
                "malformed-object", 1, f"{origin} has {said}; it must hold numbers xmin, ymin, xmax and ymax"
            )
        elif difficult not in ("0", "1"):
            problems.add(
                "malformed-object", 1, f"{origin} has difficult {shown(difficult)}; it must be 0 or 1"
            )
        else:
            yield _Object(origin, name, tuple(map(float, texts)), difficult == "1")


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
