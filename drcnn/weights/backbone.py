"""Pretrained weights of a backbone: torchvision's by name, or a local file."""

import os
import pickle
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_weights

from drcnn.errors import WeightsError
from drcnn.models.timm_backbone import TimmBackbone
from drcnn.weights.files import read_state_dict
from drcnn.weights.loading import LoadReport, copy_tensors, refuse_non_finite, sort_tensors

_ARCHITECTURES = {
    ("BasicBlock", (2, 2, 2, 2), 64): "resnet18",
    ("BasicBlock", (3, 4, 6, 3), 64): "resnet34",
    ("Bottleneck", (3, 4, 6, 3), 64): "resnet50",
    ("Bottleneck", (3, 4, 23, 3), 64): "resnet101",
    ("Bottleneck", (3, 4, 23, 3), 256): "resnext101_32x8d",
}
"""By block, blocks of each stage, and channels within the first block."""
_PREFIXES = ("", "backbone.body.", "backbone.", "body.")
"""Where a classifier, torchvision's detectors, ours, and torchvision's backbones keep the body."""
_ALTERNATIVE = (
    "give a local file (--model.backbone.weights PATH) or start from none (--model.backbone.weights none)"
)
_TIMEOUT = 30.0


def load_backbone_weights(backbone: nn.Module, name_or_path: str | os.PathLike) -> LoadReport:
    """Loads pretrained weights into a backbone; the classifier is left out.

    Args:
        backbone: ResNet with torchvision's parameter names, or a backbone of timm.
        name_or_path: name of torchvision weights such as "IMAGENET1K_V1" (downloaded once, checked by
            hash), "pretrained" for timm's, or the path of a .pth, .pt or .safetensors file of a classifier
            or, for a ResNet, of a detector.

    Returns:
        What was matched.

    Raises:
        WeightsError: no such name or file, a failed download, or tensors that do not fit the backbone; the
            backbone is then unchanged.
    """
    if isinstance(backbone, TimmBackbone):
        copy_tensors(tensors := _from_timm(backbone, str(name_or_path)), backbone)
        return LoadReport("timm", matched=list(tensors))
    if _is_path(name_or_path):
        source, tensors = str(name_or_path), read_state_dict(name_or_path)
    else:
        weights = _named_weights(backbone, str(name_or_path))
        source, tensors = str(weights), _download(weights)
    report = LoadReport("backbone")
    own = backbone.state_dict()
    # Classifiers are trained without offsets, which then stay at zero.
    offsets = tuple(name for name in own if ".conv_offset." in name)
    fitting = sort_tensors(_body(tensors, source), own, report, offsets)
    if not report.complete:
        raise WeightsError(f"{source} does not fit the backbone ({report.problems()}); {_advice(report)}")
    refuse_non_finite(fitting, source)
    copy_tensors(fitting, backbone)
    return report


def _from_timm(backbone: TimmBackbone, name_or_path: str) -> dict[str, Tensor]:
    if name_or_path != "pretrained" and not os.path.exists(name_or_path):
        raise WeightsError(f"weights file not found: {name_or_path}; give a file, `pretrained` or `none`")
    # Read here and not by timm, of which some versions would run what a file holds.
    weights = None if name_or_path == "pretrained" else read_state_dict(name_or_path)
    try:
        with _timeout(_TIMEOUT):
            tensors = backbone.pretrained(weights)
    except Exception as error:  # whatever the hub's client, the network or a strange file brings about
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(
            f"timm could not load {name_or_path} into {backbone.config.name}: {cause}; {_ALTERNATIVE}"
        ) from None
    # timm passes over names that it does not know, be it all of them.
    if weights is not None and not any(_is_among(tensor, weights) for tensor in tensors.values()):
        raise WeightsError(f"{name_or_path} holds nothing of {backbone.config.name}; {_ALTERNATIVE}")
    refuse_non_finite(tensors, name_or_path)
    return tensors


def _is_among(tensor: Tensor, weights: dict[str, Tensor]) -> bool:
    """Whether the numbers of a tensor are those of one of ``weights``, of whatever shape and precision."""
    flat = tensor.flatten()
    return any(
        len(flat) == w.numel() > 1 and bool(flat.equal(w.flatten().to(flat.dtype))) for w in weights.values()
    )


def _is_path(name_or_path: str | os.PathLike) -> bool:
    text = os.fspath(name_or_path)
    return (
        not isinstance(name_or_path, str) or os.sep in text or "." in Path(text).name or os.path.exists(text)
    )


def _named_weights(backbone: nn.Module, name: str) -> WeightsEnum:
    architecture = _architecture(backbone)
    known = get_model_weights(architecture)
    if name not in known.__members__:
        raise WeightsError(
            f"torchvision has no weights {name!r} for {architecture}, only {', '.join(known.__members__)}; "
            "choose one of them, a file or none"
        )
    return known[name]


def _architecture(backbone: nn.Module) -> str:
    """Tells which of torchvision's ResNets a module is from its blocks."""
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    block = stages[0][0]
    key = (type(block).__name__, tuple(map(len, stages)), block.conv1.out_channels)
    if key not in _ARCHITECTURES:
        raise WeightsError(f"torchvision has no weights for a backbone of {key}; {_ALTERNATIVE}")
    return _ARCHITECTURES[key]


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    try:
        with _timeout(_TIMEOUT):
            # Only one of the processes of a node shows its progress.
            shown = os.environ.get("LOCAL_RANK", "0") == "0"
            return weights.get_state_dict(
                progress=shown, check_hash=True, map_location="cpu", weights_only=True
            )
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise WeightsError(f"could not get {weights.url}: {cause}; {_ALTERNATIVE}") from None


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Bounds each wait of a connection: without this, a network that swallows packets hangs the run."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _body(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Picks the body's tensors out of a classifier or a detector."""
    for prefix in _PREFIXES:
        if f"{prefix}conv1.weight" in tensors:
            found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            return {name: tensor for name, tensor in found.items() if not name.startswith(("fc.", "fpn."))}
    raise WeightsError(
        f"{source} holds no ResNet: no tensor conv1.weight among {', '.join(list(tensors)[:3])} ...; "
        "expected the names of torchvision's ResNets"
    )


def _advice(report: LoadReport) -> str:
    statistics = ("running_mean", "running_var")
    if report.unexpected and all(name.endswith(statistics) for name in report.unexpected):
        return "they were trained with batch norm: set model.backbone.norm to frozen_bn or bn, or use none"
    if report.missing and all(name.endswith(statistics) for name in report.missing):
        return "they were trained without batch norm: set model.backbone.norm to gn"
    return "check model.backbone.name"
