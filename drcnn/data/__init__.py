"""Data sets, transforms and loaders."""

from drcnn.data.bitmasks import BitMasks
from drcnn.data.coco import CocoDataset, read_coco
from drcnn.data.config import DataConfig, SplitConfig
from drcnn.data.image import load_image
from drcnn.data.loader import Batch, BatchLoader, eval_loader, train_loader
from drcnn.data.padding import canvas_ladder, pad_images, pad_targets
from drcnn.data.problems import SkipKind
from drcnn.data.sampler import StreamSampler
from drcnn.data.segmentation import Segmentation
from drcnn.data.split import Split, load_split
from drcnn.data.synthetic import SyntheticConfig, make_synthetic
from drcnn.data.transforms import augment, resize_for_test, resized_shape

__all__ = [
    "Batch",
    "BatchLoader",
    "BitMasks",
    "CocoDataset",
    "DataConfig",
    "Segmentation",
    "SkipKind",
    "Split",
    "SplitConfig",
    "StreamSampler",
    "SyntheticConfig",
    "augment",
    "canvas_ladder",
    "eval_loader",
    "load_image",
    "load_split",
    "make_synthetic",
    "pad_images",
    "pad_targets",
    "read_coco",
    "resize_for_test",
    "resized_shape",
    "train_loader",
]
