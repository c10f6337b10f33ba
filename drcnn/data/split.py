"""Opening a split of the configured data."""

from pathlib import Path
from typing import Literal

from drcnn.data.coco import CocoDataset, coco_source, read_source
from drcnn.data.config import DataConfig, SplitConfig
from drcnn.data.source import Source
from drcnn.data.synthetic import make_synthetic
from drcnn.data.voc import voc_class_names, voc_source
from drcnn.data.yolo import yolo_source
from drcnn.errors import ConfigError, DataError

Split = Literal["train", "val", "test"]


def load_split(config: DataConfig, split: Split) -> CocoDataset:
    """Reads one split, after making the synthetic data set if one is configured and absent.

    Images without a box are left out of ``train`` only, if ``config.filter_empty`` says so.

    Args:
        config (DataConfig): where the data lie and what may be skipped.
        split ("train" | "val" | "test"): which split.

    Returns:
        CocoDataset: its ``report`` lists what was left out.

    Raises:
        ConfigError: if the configuration has no such split.
        DataError: if the data are missing or bad, naming the file and the id.
    """
    paths = getattr(config, split, None)
    if paths is None:
        raise ConfigError(f"the configuration has no {split} split: set data.{split}, or use train or val")
    root = Path(config.root)
    if config.synthetic is not None and not _foreign(root, paths):
        make_synthetic(root, config.synthetic)
    hint = _hint(paths, split)
    dataset = read_source(
        split_source(config, split, paths, hint),
        filter_empty=config.filter_empty and split == "train",
        masks=config.masks,
        max_pixels=config.max_pixels,
        hint=hint,
    )
    if split == "train" and not dataset.has_annotations:
        raise DataError(
            f"{dataset.annotation_file} has no `annotations`, so it cannot be trained on; choose another file"
        )
    return dataset


def split_source(config: DataConfig, split: str, paths: SplitConfig, hint: str) -> Source:
    """Describes a split by the format of its annotations; ``hint`` says what to do if they are missing."""
    root = Path(config.root)
    files = [root / file for file in paths.files]
    images = root / paths.images if paths.images else None
    if paths.format == "voc":
        classes = config.classes or _occurring_classes(config, hint)
        return voc_source(files, classes, images, config.skip, hint)
    if paths.format == "yolo":
        return yolo_source(files[0], split, images, config.skip, hint)
    return coco_source(files[0], images or root, config.skip, hint)


def _occurring_classes(config: DataConfig, hint: str) -> tuple[str, ...]:
    """The classes of all splits, so that they agree on the labels even where a rare class is absent."""
    splits = [s for s in (config.train, config.val, config.test) if s is not None and s.format == "voc"]
    files = dict.fromkeys(Path(config.root) / file for s in splits for file in s.files)
    return voc_class_names(files, config.skip, hint)


def _foreign(root: Path, paths: SplitConfig) -> bool:
    """Whether ``root`` holds data of the user's own, to be read and never to be replaced."""
    return any((root / file).exists() for file in paths.files) and not (root / "synthetic.json").exists()


def _hint(paths: SplitConfig, split: str) -> str:
    name = Path(paths.files[0]).name
    if paths.format == "voc" and "VOC20" in paths.files[0]:
        return (
            "extract the tars of VOC 2007 (trainval, test) and 2012 (trainval) from "
            "http://host.robots.ox.ac.uk/pascal/VOC/ and pass --data.root VOCdevkit, the folder they make"
        )
    if paths.format == "coco" and ("2017" in name or "2014" in name):
        year = "2017" if "2017" in name else "2014"
        return f"download COCO {year} from https://cocodataset.org/#download or pass --data.root FOLDER"
    return (
        f"pass --data.root FOLDER (the folder that data.{split}.images and data.{split}.annotations are "
        "relative to)"
    )
