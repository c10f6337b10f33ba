"""Data sets, transforms and loaders."""

from drcnn.data.bitmasks import BitMasks
from drcnn.data.coco import CocoDataset, read_coco
from drcnn.data.collage import Stitcher
from drcnn.data.config import AugmentationConfig, CropConfig, DataConfig, SplitConfig
from drcnn.data.image import MAX_PIXELS, load_image
from drcnn.data.loader import Batch, BatchLoader, eval_loader, train_loader
from drcnn.data.micro_batches import split_batch
from drcnn.data.padding import canvas_ladder, pad_images, pad_targets
from drcnn.data.problems import SkipKind
from drcnn.data.sampler import StreamSampler
from drcnn.data.segmentation import Segmentation
from drcnn.data.split import Split, load_split
from drcnn.data.synthetic import SyntheticConfig, make_synthetic
from drcnn.data.transforms import augment, resize_for_test, resized_shape
from drcnn.data.views import View, eval_views, make_view, pad_view
from drcnn.data.voc import VOC_CLASSES, read_voc
from drcnn.data.yolo import read_yolo

__all__ = [
    "MAX_PIXELS",
    "VOC_CLASSES",
    "AugmentationConfig",
    "Batch",
    "BatchLoader",
    "BitMasks",
    "CocoDataset",
    "CropConfig",
    "DataConfig",
    "Segmentation",
    "SkipKind",
    "Split",
    "SplitConfig",
    "Stitcher",
    "StreamSampler",
    "SyntheticConfig",
    "View",
    "augment",
    "canvas_ladder",
    "eval_loader",
    "eval_views",
    "load_image",
    "load_split",
    "make_synthetic",
    "make_view",
    "pad_images",
    "pad_targets",
    "pad_view",
    "read_coco",
    "read_voc",
    "read_yolo",
    "resize_for_test",
    "resized_shape",
    "split_batch",
    "train_loader",
]
