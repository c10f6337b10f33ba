"""Opening the splits that a run needs, and checking them against each other and the model."""

from typing import TYPE_CHECKING

from drcnn.data import CocoDataset, load_split
from drcnn.engine import distributed
from drcnn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from drcnn.config import Config


def open_splits(config: "Config") -> tuple[CocoDataset, CocoDataset, CocoDataset | None]:
    """Opens train, val and test, and checks them against each other and the model.

    Raises:
        ConfigError: if the number of classes is not the model's, or masks are needed and not read.
        DataError: if a file is missing or bad, or the classes of the splits differ.
    """
    if getattr(config.model, "mask_head", None) is not None and not config.data.masks:
        raise ConfigError("the model has a mask head, but no masks are read; pass --data.masks")
    if not distributed.is_main():
        distributed.barrier()  # the main rank makes synthetic data first
    train = load_split(config.data, "train")
    val = load_split(config.data, "val")
    test = None if config.data.test is None else load_split(config.data, "test")
    if distributed.is_main():
        distributed.barrier()
    count = len(train.categories)
    if count != config.model.num_classes:
        raise ConfigError(
            f"{train.annotation_file} has {count} classes but the model has {config.model.num_classes}; "
            f"pass --model.num-classes {count}"
        )
    for other in (val, test):
        if other is not None and list(other.categories) != list(train.categories):
            raise DataError(
                f"{other.annotation_file} has other classes than {train.annotation_file}; "
                "the splits must list the same categories with the same ids"
            )
    if not val.has_annotations:
        raise DataError(f"{val.annotation_file} has no annotations, so it cannot be the val split")
    return train, val, test
