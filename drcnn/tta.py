"""Test-time augmentation and Soft-NMS in a word each, for any detector, as flags of its config's fields."""

import functools
from typing import Any, Literal

from drcnn.config import Config, flags
from drcnn.errors import ConfigError
from drcnn.models import SparseRCNNConfig

Augmentation = Literal["config", "off", "flip", "scales"]
"""What the config says; one view; an image and its mirror image; three scales, each with its mirror image."""
SoftNmsChoice = Literal["config", "off", "linear", "gaussian"]
"""What the config says; plain NMS; or how scores fall with the overlap."""

SCALES = (1.0, 0.75, 1.25)
"""Short sides of ``scales``, as shares of the config's; the first one is the one without augmentation."""


def tta_flags(config: Config, tta: Augmentation, soft_nms: SoftNmsChoice) -> list[str]:
    """Says in flags of ``config``'s fields how images are tested.

    Args:
        config: the detector and how its images are resized.
        tta: ``config``, ``off``, ``flip`` (left to right) or ``scales`` (0.75, 1 and 1.25 of the usual size,
            each with its flip).
        soft_nms: ``config``, ``off``, ``linear`` or ``gaussian``; for the detector and for the merging of
            views.

    Returns:
        Flags for :func:`drcnn.config.apply_overrides`.

    Raises:
        ConfigError: Soft-NMS for a detector that has no NMS.
    """
    return [*_augmentation(config, tta), *_soft_nms(config, soft_nms)]


def _augmentation(config: Config, tta: Augmentation) -> list[str]:
    name = "--data.test-augmentation"
    if tta == "config":
        return []
    plain = [f"{name}.short-sides", f"{name}.no-hflip", f"{name}.no-vflip"]
    if tta == "off":
        return plain
    # As many as the detector keeps of one view.
    most = max(value for flag, value in _fields(config, "detections") if flag.startswith("--model."))
    chosen = [f"{name}.hflip", f"{name}.no-vflip", f"{name}.detections", str(most), f"{name}.short-sides"]
    if tta == "scales":
        data = config.data
        chosen += [str(round(scale * data.test_short_side)) for scale in SCALES]
        chosen += [f"{name}.max-size", str(round(max(SCALES) * data.test_max_size))]
    return chosen


def _soft_nms(config: Config, soft_nms: SoftNmsChoice) -> list[str]:
    if soft_nms == "config":
        return []
    model = config.model
    if isinstance(model, SparseRCNNConfig) and not model.assignment.build(model.head.stages).many_to_one:
        raise ConfigError("--soft-nms has no meaning here: a detector of one-to-one assignment has no NMS")
    return [part for flag, _ in _fields(config, "soft-nms") for part in (flag, soft_nms)]


def _fields(config: Config, leaf: str) -> list[tuple[str, Any]]:
    """Finds the fields of this name anywhere in the config: their flags and values."""
    found = [flag for flag in flags(config) if flag.rpartition(".")[2] == leaf]
    return [(flag, functools.reduce(getattr, _path(flag), config)) for flag in found]


def _path(flag: str) -> list[str]:
    return flag.removeprefix("--").replace("-", "_").split(".")
