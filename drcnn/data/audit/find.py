"""Finding the splits of a data set: those of a config, or those that a file or a folder holds."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from drcnn.data.config import DataConfig
from drcnn.data.problems import Problems, SkipKind
from drcnn.data.records import read_json
from drcnn.data.source import Content, Source
from drcnn.data.split import Split, split_source
from drcnn.data.voc import voc_class_names, voc_source
from drcnn.data.yolo import split_names, yolo_source
from drcnn.errors import DataError

_SKIP = get_args(SkipKind)
_HINT = "check the path"
_SPLITS = get_args(Split)
_WORDS = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}
_PROBED = 20  # images of which one must be in a folder that is taken for theirs


class Found(NamedTuple):
    """The splits of a data set.

    Attributes:
        sources (dict[str, Source]): by name; "train", "val" and "test" where names of files tell so.
        left_out (list[Path]): files that may be data too, but not of these splits.
    """

    sources: dict[str, Source]
    left_out: Sequence[Path] = ()


def config_sources(config: DataConfig) -> dict[str, Source]:
    """Describes all splits of a config; what it says to skip is found nevertheless."""
    lenient = replace(config, skip=_SKIP)
    splits = {name: getattr(config, name) for name in _SPLITS}
    return {
        name: split_source(lenient, name, paths, _HINT) for name, paths in splits.items() if paths is not None
    }


def find_sources(path: Path, images: Path | None = None) -> Found:
    """Describes the splits that a file or folder holds, whose format its content tells.

    Args:
        path (Path): a COCO json, or a folder with such files in ``annotations``; a YOLO yaml, or the folder
            that holds it; a folder of VOC: a VOCdevkit, one of its years, or a folder of xml files.
        images (Path | None): folder of the images, where it is not near the annotations.

    Raises:
        DataError: if there are no data, or it is not clear which are meant.
    """
    if path.is_file():
        if path.suffix.lower() == ".json":
            return Found({_split_name(path.stem) or path.stem: _coco_source(path, images)})
        if path.suffix.lower() in (".yaml", ".yml"):
            return Found(_yolo_sources(path, images))
        raise DataError(f"{path} is neither a config (.py), COCO (.json) nor YOLO (.yaml); see --help")
    if not path.is_dir():
        raise DataError(f"{path} does not exist; pass a config, a COCO json, a VOC folder or a YOLO yaml")
    coco, voc = _coco_files(path), _voc_sets(path)
    yolo = sorted(file for file in path.iterdir() if file.suffix.lower() in (".yaml", ".yml"))
    found = {"COCO": coco, "YOLO": yolo, "VOC": [file for files in voc.values() for file in files]}
    kinds = [f"{kind} ({files[0]})" for kind, files in found.items() if files]
    if not kinds:
        raise DataError(
            f"{path} holds no data of a known format: no COCO json in annotations, no YOLO yaml, no VOC "
            "lists in ImageSets/Main and no VOC xml; pass the annotation file itself"
        )
    if len(kinds) > 1:
        raise DataError(f"{path} holds {' and '.join(kinds)}: which is meant? pass the file or folder of one")
    if yolo:
        return Found(_yolo_sources(_only(yolo, "yaml files"), images))
    return _coco(coco, images) if coco else Found(_voc_sources(voc, images))


def _only(files: Sequence[Path], what: str) -> Path:
    if len(files) > 1:
        raise DataError(
            f"there are several {what}, {' and '.join(map(str, files))}: which is meant? pass one"
        )
    return files[0]


def _split_name(text: str) -> str | None:
    """The split that a word of a file's or folder's name tells: "train" of instances_train2017."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((_WORDS[word] for word in words if word in _WORDS), None)


def _coco_files(folder: Path) -> list[Path]:
    """COCO files of a folder; where some are instances, captions and keypoints are left aside."""
    for pattern in ("annotations/*.json", "*.json", "*/_annotations.coco.json"):
        files = [file for file in sorted(folder.glob(pattern)) if _is_object(file)]
        if files:
            return [file for file in files if file.name.startswith("instances")] or files
    return []


def _is_object(file: Path) -> bool:
    """Whether a json file may hold annotations: results are a list."""
    with file.open("rb") as opened:
        start = opened.read(4096).lstrip()
    return start.startswith(b"{") and re.search(rb'"(images|annotations|categories|info)"', start) is not None


def _coco(files: Sequence[Path], images: Path | None) -> Found:
    named: dict[str, list[Path]] = {}
    for file in files:
        name = _split_name(file.stem) or (_split_name(file.parent.name) if len(files) > 1 else None)
        named.setdefault(name or "", []).append(file)
    other = named.pop("", [])
    if not named:
        return Found({file.stem: _coco_source(file, images) for file in other})
    chosen = {name: _only(named[name], f"files of {name}") for name in _SPLITS if name in named}
    return Found({name: _coco_source(file, images) for name, file in chosen.items()}, other)


def _coco_source(file: Path, images: Path | None) -> Source:
    return Source("coco", file, partial(_coco_content, file, images), _SKIP)


def _coco_content(file: Path, images: Path | None, problems: Problems) -> Content:
    data = read_json(file, _HINT)
    return Content(data, images or _image_folder(file, data))


def _image_folder(file: Path, data: dict[str, Any]) -> Path:
    """The folder near ``file`` in which images of it lie; a likely name if there is none."""
    records = data.get("images")
    records = records if isinstance(records, list) else []
    names = [str(r.get("file_name")) for r in records[:_PROBED] if isinstance(r, dict)]
    above, split = file.parent.parent, _split_name(file.stem) or ""
    last = file.stem.split("_")[-1]  # train2017 of instances_train2017.json
    likely = [
        base / sub for base in (above, file.parent) for sub in ("images", f"images/{split}", last, split)
    ]
    for folder in (*likely, above, file.parent):
        if any((folder / name).is_file() for name in names):
            return folder
    return above / "images"


def _yolo_sources(file: Path, images: Path | None) -> dict[str, Source]:
    return {name: yolo_source(file, name, images, _SKIP, _HINT) for name in split_names(file, _HINT)}


def _voc_sets(folder: Path) -> dict[str, list[Path]]:
    """Lists or folders of xml files of each split."""
    years = [folder, *sorted(folder.glob("VOC20*"))]
    for year in years:
        if (year / "ImageSets" / "Main").is_dir():
            return {
                name: files
                for name in ("train", "val", "trainval", "test")
                if (files := [f for y in years if (f := y / "ImageSets" / "Main" / f"{name}.txt").is_file()])
            }
    for name in ("", "Annotations"):
        if _holds_xml(folder / name):
            return {"train": [folder / name]}
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and _holds_xml(part)]
    return {_split_name(part.name) or part.name: [part] for part in parts}


def _holds_xml(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.endswith(".xml") for entry in entries)
    except OSError:
        return False


def _voc_sources(sets: dict[str, list[Path]], images: Path | None) -> dict[str, Source]:
    if {"train", "val"} <= sets.keys():
        sets.pop("trainval", None)  # their union
    elif "trainval" in sets:
        sets = {"train": sets["trainval"], **{k: v for k, v in sets.items() if k in ("val", "test")}}
    files = [file for of_split in sets.values() for file in of_split]
    classes = voc_class_names(files, _SKIP, _HINT)
    return {name: voc_source(of_split, classes, images, _SKIP, _HINT) for name, of_split in sets.items()}
