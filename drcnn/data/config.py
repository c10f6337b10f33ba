"""What a run reads: the folders, the order and size of batches, and how images are resized."""

from dataclasses import dataclass

from drcnn.data.problems import SkipKind
from drcnn.data.synthetic import SyntheticConfig
from drcnn.errors import ConfigError


@dataclass(frozen=True)
class SplitConfig:
    """One split of a data set in COCO format; both paths are relative to ``DataConfig.root``."""

    images: str
    """Folder of the image files."""
    annotations: str
    """COCO-format json file of the annotations."""


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
    skip: tuple[SkipKind, ...] = ()
    """Kinds of bad input to leave out and count, where they would otherwise stop the run."""
    masks: bool = False
    """Read the instance masks too, and train on them; needed by detectors with a mask head."""
    synthetic: SyntheticConfig | None = None
    """Make this synthetic data set in ``root`` if it is not there yet."""

    def __post_init__(self) -> None:
        """Checks the ranges of the numbers."""
        if not self.short_sides:
            raise ConfigError("data.short_sides is empty: give at least one length in pixels")
        positive = {"batch_size": self.batch_size, "short_sides": min(self.short_sides)}
        for name in ("max_size", "test_short_side", "test_max_size", "pad_multiple", "pad_step"):
            positive[name] = getattr(self, name)
        for name, value in positive.items():
            if value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}")
        if self.workers < 0:
            raise ConfigError(f"data.workers must be at least 0, got {self.workers}")
        for name in ("hflip", "vflip"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"data.{name} is a probability between 0 and 1, got {value}")
