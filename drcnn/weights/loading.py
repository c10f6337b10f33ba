"""Loading a whole detector's weights, whoever wrote them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from drcnn.errors import WeightsError
from drcnn.weights.files import Weights, read_weights, unwrap
from drcnn.weights.sources import OWN, differing_settings, recognise, system_of

_COUNTER = "num_batches_tracked"
"""Batch norm's counter: frozen and group norm have none, and nothing that we compute reads it."""

_SCALE = ("scale.",)
_DYNAMICS = ("dynamics.", *_SCALE)
"""Beginnings of the names of dynamic training's state, of which other systems' weights have none."""

_LAST_LAYERS = re.compile(
    r"box_head\.(stages\.\d\.)?(classifier|deltas)\..*|mask_head\.logits\..*"
    r"|head\.(stages\.\d\.)?classifier\..*"
)
"""Those whose size is the number of classes."""

_CAUSES = {
    "mask_head.": "a mask head",
    "box_head.stages.": "a cascade of box heads",
    "head.stages.": "Sparse R-CNN's head",
    "box_head.convs.": "convolutions in the box head",
    "rpn.more_convs.": "a second convolution in the RPN",
    "conv_offset": "deformable convolutions",
    "head.centerness.": "FCOS's head",
    "fpn.extra_blocks.": "a pyramid with P7",
    "running_mean": "batch norm",
    "backbone.layer": "other blocks in its backbone",
    "dynamics.": "another state of dynamic training",
}
"""What a part of the name of a missing or unexpected tensor tells about the cause, the most telling first."""


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
        settings: fields in which the model computes otherwise than the detector that the weights were
            trained as, with that detector's value and the model's.
        notes: what differs from the system that wrote the weights.
    """

    source: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    settings: dict[str, tuple[object, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every tensor on either side found its counterpart."""
        return not (self.missing or self.unexpected or self.misshaped)

    def summary(self) -> list[str]:
        """Says what was loaded and what was not, a line each."""
        lines = [f"{self.source} weights: {len(self.matched)} tensors loaded"]
        fresh = [*self.missing, *self.misshaped]
        if fresh:
            lines.append(f"left at their initial values: {', '.join(fresh)}")
        if self.unexpected:
            lines.append(f"without a place in the model: {', '.join(self.unexpected)}")
        for name, (theirs, ours) in self.settings.items():
            lines.append(f"trained with {name} {theirs}, the model has {ours}")
        return lines + self.notes

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
    dynamics: bool = True,
    source: str | None = None,
) -> LoadReport:
    """Loads a detector's weights; what kind they are is told by their content.

    Recognised are our own checkpoints and state dicts, and those of torchvision, MMDetection 2 and 3,
    Detectron2, maskrcnn-benchmark and the Dynamic R-CNN author.

    Args:
        model: detector to load into.
        weights: path of a file (.pth, .pt, .pkl, .safetensors, a checkpoint) or a state dict.
        partial: load what fits and leave the rest of the model as it is, for example the last layers when
            the number of classes differs.
        dynamics: also load the state of dynamic training, such as the IoU threshold, if the weights have it.
        source: what to call the weights in an error; the path if None.

    Returns:
        What was matched, missing, unexpected, reshaped and misshaped, and settings that differ.

    Raises:
        WeightsError: the file cannot be read; nothing matches; a weight is not finite; or, unless
            ``partial``, a tensor is missing, unexpected or misshaped. The model is then unchanged.
    """
    if isinstance(weights, Mapping):
        read = unwrap(dict(weights), source or "the state dict")
    else:
        read = read_weights(weights)
        read.source = source or read.source
    own = model.state_dict()
    if system_of(read.tensors) is None:
        report, tensors = LoadReport(OWN), read.tensors
        if not dynamics:
            tensors = {n: t for n, t in tensors.items() if not n.startswith(_DYNAMICS)}
        optional = _SCALE if dynamics else _DYNAMICS  # our first weights have no state of the scale
    else:
        report, tensors = _recognised(model, read)
        optional = _DYNAMICS
    fitting = sort_tensors(tensors, own, report, optional)
    if not fitting:
        raise WeightsError(
            f"{read.source} fits no tensor of the model; it begins with {_some(list(tensors))}"
        )
    if not (partial or report.complete):
        raise WeightsError(f"{read.source} does not fit the model ({report.problems()}); {_advice(report)}")
    refuse_non_finite(fitting, read.source)
    copy_tensors(fitting, model)
    return report


def _recognised(model: nn.Module, weights: Weights) -> tuple[LoadReport, dict[str, Tensor]]:
    """Brings another system's weights into our names, and to the deviation of the model's pixels."""
    config = getattr(model, "config", None)
    found = recognise(weights, getattr(config, "num_classes", None))
    tensors, first = dict(found.tensors), "backbone.conv1.weight"
    if config is not None and first in tensors and config.pixel_std != found.config.pixel_std:
        # The first convolution takes the deviation in: it is linear, and the mean is the same or is reported.
        ratio = torch.tensor(config.pixel_std) / torch.tensor(found.config.pixel_std)
        tensors[first] = tensors[first] * ratio.view(1, 3, 1, 1)
    report = LoadReport(found.system, reshaped=found.reshaped, notes=found.notes)
    if config is not None:
        report.settings = differing_settings(found.config, config)
    return report, tensors


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


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuses weights that hold NaN or infinity: they are damaged, or of a run that diverged.

    Raises:
        WeightsError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        # The records of dynamic training are NaN where nothing has been recorded.
        if not name.startswith(_DYNAMICS) and tensor.is_floating_point() and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise WeightsError(
                f"{source} holds {count} values in {name} that are not finite: it is damaged, or of a run "
                "that diverged; use another file"
            )


@torch.no_grad()
def copy_tensors(tensors: dict[str, Tensor], module: nn.Module) -> None:
    """Copies tensors into a module's parameters and buffers in place, keeping dtype and device."""
    own = module.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _advice(report: LoadReport) -> str:
    """The likely cause of what does not fit, and what to do."""
    if report.misshaped and all(map(_LAST_LAYERS.fullmatch, report.misshaped)):
        return (
            "they were trained for another number of classes: set model.num_classes, "
            "or load partially (--train.partial-weights)"
        )
    if report.misshaped:
        return "the sizes or the depth differ: use the config that they were trained with"
    for part, cause in _CAUSES.items():
        if any(part in name for name in report.unexpected):
            return (
                f"the weights have {cause} and the model has none: use the config that they were trained with"
            )
        if any(part in name for name in report.missing):
            return (
                f"the model has {cause} and the weights have none: use the config that they were trained with"
            )
    return "the parts of the model differ: use the config that they were trained with"


def _some(names: list[str], most: int = 3) -> str:
    text = ", ".join(names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
