"""Opening a split of the configured data."""

from pathlib import Path
from typing import Literal

from drcnn.data.coco import CocoDataset, read_coco
from drcnn.data.config import DataConfig
from drcnn.data.synthetic import make_synthetic
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
    annotations = root / paths.annotations
    if config.synthetic is not None and not _foreign(root, annotations):
        make_synthetic(root, config.synthetic)
    dataset = read_coco(
        annotations,
        root / paths.images,
        skip=config.skip,
        filter_empty=config.filter_empty and split == "train",
        masks=config.masks,
        hint=_hint(annotations, split),
    )
    if split == "train" and not dataset.has_annotations:
        raise DataError(
            f"{annotations} has no `annotations`, so it cannot be trained on; choose another file"
        )
    return dataset


def _foreign(root: Path, annotations: Path) -> bool:
    """Whether ``root`` holds data of the user's own, to be read and never to be replaced."""
    return annotations.exists() and not (root / "synthetic.json").exists()


def _hint(annotations: Path, split: str) -> str:
    if "2017" in annotations.name or "2014" in annotations.name:
        year = "2017" if "2017" in annotations.name else "2014"
        return f"download COCO {year} from https://cocodataset.org/#download or pass --data.root FOLDER"
    return (
        f"pass --data.root FOLDER (the folder that data.{split}.images and data.{split}.annotations are "
        "relative to)"
    )
