"""What a run reads: the folders, the order and size of batches, and how images are resized."""

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Literal

from drcnn.data.image import MAX_PIXELS
from drcnn.data.problems import SkipKind
from drcnn.data.synthetic import SyntheticConfig
from drcnn.errors import ConfigError


@dataclass(frozen=True)
class SplitConfig:
    """One split of a data set in COCO, PASCAL VOC or YOLO format; paths are relative to ``DataConfig.root``.

    Raises:
        ConfigError: if the annotations are not given or tell no format.
    """

    images: str = ""
    """Folder of the image files. VOC and YOLO data name it themselves; there it is for other places."""
    annotations: str | tuple[str, ...] = ""
    """A COCO .json; a YOLO data.yaml; a VOC list of images such as VOC2007/ImageSets/Main/trainval.txt or a
    folder of VOC .xml files, or several of these, which are joined."""

    def __post_init__(self) -> None:
        """Checks that the format can be told."""
        _ = self.format

    @property
    def files(self) -> tuple[str, ...]:
        """The annotations as a tuple."""
        return (self.annotations,) if isinstance(self.annotations, str) else self.annotations

    @property
    def format(self) -> Literal["coco", "voc", "yolo"]:
        """The format that the ending of the annotations tells."""
        endings = {PurePath(file).suffix.lower() for file in self.files if file}
        if len(self.files) == 1 and endings == {".json"}:
            return "coco"
        if len(self.files) == 1 and endings in ({".yaml"}, {".yml"}):
            return "yolo"
        if endings and endings <= {".txt", ""} and all(self.files):
            return "voc"
        raise ConfigError(
            "the annotations of a split are one COCO .json, one YOLO .yaml, or VOC lists of images (.txt) or "
            f"folders of .xml files, got {' '.join(self.files) or 'none'}"
        )


@dataclass(frozen=True)
class AugmentationConfig:
    """Test-time augmentation: detections of several scales and flips of an image are merged by NMS by class.

    Without scales and flips, which is the default, images are tested plainly.

    Raises:
        ConfigError: if a value cannot be used.
    """

    short_sides: tuple[int, ...] = ()
    """Lengths in pixels of the shorter image side, one view for each; none stands for the usual one."""
    max_size: int = 2000
    """Greatest length in pixels of the longer side at these scales."""
    hflip: bool = False
    """Show each scale flipped left to right too."""
    vflip: bool = False
    """Show each scale upside down too."""
    nms: float = 0.5
    """IoU above which the lower of two merged detections of a class is dropped."""
    soft_nms: Literal["off", "linear", "gaussian"] = "off"
    """Lower the scores of overlapping detections instead (Soft-NMS)."""
    soft_nms_sigma: float = 0.5
    """Width of the Gaussian of Soft-NMS."""
    score_threshold: float = 0.001
    """Least score after Soft-NMS."""
    detections: int = 100
    """Most detections per image."""

    def __post_init__(self) -> None:
        """Checks the ranges of the numbers."""
        positive = {"short_sides": min(self.short_sides, default=1), "max_size": self.max_size}
        for name, value in (positive | {"detections": self.detections}).items():
            if value < 1:
                raise ConfigError(f"data.test_augmentation.{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class CropConfig:
    """Random crop before an image is resized, as in DETR (arXiv 2005.12872, section A.4).

    A crop of a drawn height and width is taken at a drawn place of the image, whose shorter side is scaled
    to a drawn length for this. Objects without any area in the crop are dropped.

    Raises:
        ConfigError: if a value cannot be used.
    """

    probability: float = 0.5
    """Probability of cropping a training image."""
    short_sides: tuple[int, ...] = (400, 500, 600)
    """Lengths in pixels that the shorter side of the image is scaled to; one is drawn for each image."""
    min_size: int = 384
    """Least height and width of a crop in pixels of the scaled image, or all of a shorter side."""
    max_size: int = 600
    """Greatest height and width of a crop in pixels of the scaled image."""

    def __post_init__(self) -> None:
        """Checks the ranges of the numbers."""
        if not 0.0 <= self.probability <= 1.0:
            raise ConfigError(f"data.crop.probability is between 0 and 1, got {self.probability}")
        if not self.short_sides or min(self.short_sides) < 1:
            raise ConfigError(f"data.crop.short_sides must be lengths in pixels, got {self.short_sides}")
        if not 1 <= self.min_size <= self.max_size:
            raise ConfigError(
                "data.crop.min_size must be at least 1 and at most data.crop.max_size, "
                f"got {self.min_size} and {self.max_size}"
            )


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Raises:
        ConfigError: if a value cannot be used.
    """

    root: str
    """Folder that the paths of all splits are relative to."""
    train: SplitConfig
    """Split to train on."""
    val: SplitConfig
    """Split to evaluate on while training."""
    test: SplitConfig | None = None
    """Held-out split, if there is one."""
    batch_size: int = 16
    """Images per training step, over all processes together."""
    workers: int = 2
    """Processes that read and augment images, for each training process; 0 reads in the process itself."""
    short_sides: tuple[int, ...] = (800,)
    """Lengths in pixels of the shorter image side in training; one is drawn for each image."""
    max_size: int = 1333
    """Greatest length in pixels of the longer image side in training."""
    test_short_side: int = 800
    """Length in pixels of the shorter image side outside training."""
    test_max_size: int = 1333
    """Greatest length in pixels of the longer image side outside training."""
    test_augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Scales and flips of every evaluation and prediction, of which the detections are merged."""
    crop: CropConfig | None = None
    """Random crop of training images before they are resized; None for none."""
    hflip: float = 0.5
    """Probability of flipping a training image left to right."""
    vflip: float = 0.0
    """Probability of flipping a training image upside down."""
    aspect_grouping: bool = True
    """Put landscape and portrait images into separate batches, so that less is padded."""
    filter_empty: bool = True
    """Do not train on images without a box (crowd regions do not count as boxes)."""
    pad_multiple: int = 32
    """Padded heights and widths are multiples of this number of pixels."""
    pad_step: int = 128
    """Distance in pixels between the padded heights and widths, so that few distinct shapes occur."""
    classes: tuple[str, ...] = ()
    """Class names of VOC data in the order of their labels; empty: those that occur in any split, sorted."""
    skip: tuple[SkipKind, ...] = ()
    """Kinds of bad input to leave out and count, where they would otherwise stop the run."""
    masks: bool = False
    """Read the instance masks too, and train on them; needed by detectors with a mask head."""
    max_pixels: int = MAX_PIXELS
    """Most pixels that an image may have: larger ones are refused before anything is decoded."""
    synthetic: SyntheticConfig | None = None
    """Make this synthetic data set in ``root`` if it is not there yet."""

    def __post_init__(self) -> None:
        """Checks the ranges of the numbers."""
        if not self.short_sides:
            raise ConfigError("data.short_sides is empty: give at least one length in pixels")
        positive = {"batch_size": self.batch_size, "short_sides": min(self.short_sides)}
        sizes = ("max_size", "test_short_side", "test_max_size", "pad_multiple", "pad_step", "max_pixels")
        for name in sizes:
            positive[name] = getattr(self, name)
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        formats = {split.format for split in (self.train, self.val, self.test) if split is not None}
        if self.classes and formats != {"voc"}:
            raise ConfigError(
                "data.classes is for VOC data alone; COCO and YOLO files name their classes themselves"
            )
        if len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"data.classes must be different names, got {' '.join(self.classes)}")
        if self.workers < 0:
            raise ConfigError(f"data.workers must be at least 0, got {self.workers}")
        for name in ("hflip", "vflip"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"data.{name} is a probability between 0 and 1, got {value}")
