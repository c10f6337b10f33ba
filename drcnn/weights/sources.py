"""The systems whose detectors can be read, and the detector that tensors belong to."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from drcnn.errors import WeightsError
from drcnn.weights import detectron2, maskrcnn_benchmark, mmdetection, torchvision_detectors
from drcnn.weights.architecture import detector_config
from drcnn.weights.files import Weights

SYSTEMS: tuple[ModuleType, ...] = (torchvision_detectors, mmdetection, detectron2, maskrcnn_benchmark)
"""Each has a `NAME`, `recognises` tensors, `convert`s their names, and `settle`s what they do not tell."""

OWN = "drcnn"


@dataclass
class Detector:
    """What was recognised.

    Attributes:
        system: who wrote the weights.
        config: config of the detector.
        tensors: by our names.
        reshaped: names of those whose rows or channels were moved or dropped.
        notes: what differs from the system that wrote them.
        categories: names of the classes, if the weights hold them.
    """

    system: str
    config: Any
    tensors: dict[str, Tensor]
    reshaped: list[str]
    notes: list[str]
    categories: tuple[str, ...] | None = None


def system_of(tensors: dict[str, Tensor]) -> ModuleType | None:
    """Tells by their names which other system wrote tensors; None for ours and for unknown ones."""
    return next((system for system in SYSTEMS if system.recognises(tensors)), None)


def recognise(weights: Weights, num_classes: int | None = None) -> Detector:
    """Tells which detector weights belong to, and brings them into our names and order.

    Args:
        weights: of any known system, or ours without a config.
        num_classes: K of the model that they are for, where the weights leave a choice.

    Raises:
        WeightsError: they belong to no detector that drcnn has.
    """
    try:
        return _recognised(weights, num_classes)
    except (
        AttributeError,
        IndexError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    ) as error:
        raise WeightsError(
            f"{weights.source} holds tensors of shapes that no detector has ({error}); it is damaged"
        ) from None


def _recognised(weights: Weights, num_classes: int | None) -> Detector:
    system = system_of(weights.tensors)
    if system is None:
        return Detector(OWN, detector_config(weights.tensors, weights.source), weights.tensors, [], [])
    converted = system.convert(weights, num_classes)
    config = system.settle(detector_config(converted.tensors, weights.source), weights)
    names = system.categories(weights) if hasattr(system, "categories") else None
    return Detector(system.NAME, config, converted.tensors, converted.reshaped, converted.notes, names)


MEANING = (
    "aligned",
    "anchors",
    "average",
    "centerness_on",
    "delta_weights",
    "distances",
    "pixel_mean",
    "point_offset",
    "sampling_ratio",
    "stride_in_1x1",
    "to_last_pixel",
    "top_relu",
)
"""Fields that change what weights compute, though no tensor has another shape."""


def differing_settings(theirs: Any, ours: Any) -> dict[str, tuple[Any, Any]]:
    """Lists the settings that weights were trained with and a model computes otherwise.

    Args:
        theirs: config of the detector that the weights belong to.
        ours: config of the model.

    Returns:
        Both values by dotted name.
    """
    wanted, found = dict(_settings(theirs)), dict(_settings(ours))
    return {
        name: (wanted[name], found[name]) for name in wanted if name in found and wanted[name] != found[name]
    }


def _settings(config: Any, prefix: str = "", inside: bool = False) -> Iterator[tuple[str, Any]]:
    for item in fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        counts = inside or item.name in MEANING
        if is_dataclass(value):
            yield from _settings(value, f"{name}.", counts)
        elif counts:
            yield name, value
