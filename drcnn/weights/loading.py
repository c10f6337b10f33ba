"""Loading a whole detector's weights, whoever wrote them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drcnn.errors import WeightsError
from drcnn.weights import torchvision_detectors
from drcnn.weights.files import plain_state_dict, read_state_dict

_COUNTER = "num_batches_tracked"
"""Batch norm's counter: frozen and group norm have none, and nothing that we compute reads it."""

_LAST_LAYERS = ("box_head.classifier.", "box_head.deltas.")
"""Those whose size is the number of classes."""


@dataclass
class LoadReport:
    """What became of each tensor; names are the model's, but for ``unexpected``.

    Attributes:
        source: kind of weights that the content was recognised as.
        matched: tensors that were loaded.
        missing: tensors of the model that the weights do not hold; left as they were.
        unexpected: tensors of the weights that the model has no place for.
        reshaped: those of ``matched`` whose rows were moved or dropped on the way.
        misshaped: tensors whose shape does not fit, with both shapes; left as they were.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every tensor on either side found its counterpart."""
        return not (self.missing or self.unexpected or self.misshaped)

    def problems(self) -> str:
        """Names what did not fit, in one line; empty if all did."""
        parts = []
        if self.misshaped:
            shapes = [
                f"{name} {list(theirs)} instead of {list(ours)}"
                for name, (theirs, ours) in self.misshaped.items()
            ]
            parts.append(f"misshaped: {_some(shapes)}")
        if self.missing:
            parts.append(f"missing: {_some(self.missing)}")
        if self.unexpected:
            parts.append(f"unexpected: {_some(self.unexpected)}")
        return "; ".join(parts)


def load_weights(
    model: nn.Module,
    weights: str | os.PathLike | Mapping[str, Tensor],
    *,
    partial: bool = False,
    source: str | None = None,
) -> LoadReport:
    """Loads a detector's weights; what kind they are is told by their content.

    Recognised are our own checkpoints and state dicts, and those of torchvision's
    ``fasterrcnn_resnet50_fpn`` and its likes.

    Args:
        model: detector to load into.
        weights: path of a file (.pth, .pt, .safetensors, a checkpoint) or a state dict.
        partial: load what fits and leave the rest of the model as it is, for example the last layers when
            the number of classes differs.
        source: what to call the weights in an error; the path if None.

    Returns:
        What was matched, missing, unexpected, reshaped and misshaped.

    Raises:
        WeightsError: the file cannot be read; nothing matches; or, unless ``partial``, a tensor is missing,
            unexpected or misshaped. The model is then unchanged.
    """
    if isinstance(weights, Mapping):
        source = source or "the state dict"
        tensors = plain_state_dict(dict(weights), source)
    else:
        source = source or str(weights)
        tensors = read_state_dict(weights)
    if torchvision_detectors.recognises(tensors):
        tensors, reshaped = torchvision_detectors.convert(tensors, model)
        report = LoadReport("torchvision", reshaped=reshaped)
        optional = torchvision_detectors.OWN_STATE
    else:
        report, optional = LoadReport("drcnn"), ()
    fitting = sort_tensors(tensors, model.state_dict(), report, optional)
    if not fitting:
        raise WeightsError(f"{source} fits no tensor of the model; it begins with {_some(list(tensors))}")
    if not (partial or report.complete):
        raise WeightsError(f"{source} does not fit the model ({report.problems()}); {_advice(report)}")
    copy_tensors(fitting, model)
    return report


def sort_tensors(
    tensors: dict[str, Tensor], own: dict[str, Tensor], report: LoadReport, optional: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Compares tensors with a model's, writes the differences to ``report`` and returns what fits.

    Args:
        tensors: tensors by the model's names.
        own: the model's state dict.
        report: filled here.
        optional: beginnings of names that need not be there.
    """
    fitting = {}
    for name, tensor in tensors.items():
        if name not in own:
            if not name.endswith(_COUNTER):
                report.unexpected.append(name)
        elif tensor.shape != own[name].shape:
            report.misshaped[name] = (tuple(tensor.shape), tuple(own[name].shape))
        else:
            fitting[name] = tensor
            report.matched.append(name)
    report.missing += [
        name
        for name in own
        if name not in tensors and not name.endswith(_COUNTER) and not name.startswith(optional or ("\0",))
    ]
    report.reshaped[:] = [name for name in report.reshaped if name in fitting]
    return fitting


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], module: nn.Module) -> None:
    """Copies tensors into a module's parameters and buffers in place, keeping dtype and device."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _advice(report: LoadReport) -> str:
    if report.misshaped and all(name.startswith(_LAST_LAYERS) for name in report.misshaped):
        return "they were trained for another number of classes: set model.num_classes, or load partially"
    if report.misshaped:
        return "the sizes or the depth differ: use the config that they were trained with"
    return "the parts of the model differ: use the config that they were trained with"


def _some(names: list[str], most: int = 3) -> str:
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
