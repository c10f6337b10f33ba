"""What a run says about itself at its start."""

import platform
from typing import TYPE_CHECKING

import torch
from torch import nn

from drcnn import __version__
from drcnn.data import CocoDataset
from drcnn.engine.optim import describe_lr, describe_schedule
from drcnn.errors import ConfigError
from drcnn.ops.backend import backend_status

if TYPE_CHECKING:
    from drcnn.config import Config


def summarize(
    config: "Config",
    model: nn.Module,
    splits: dict[str, CocoDataset | None],
    device: torch.device,
    world_size: int,
) -> list[str]:
    """Says in a few lines what is trained, on what, how, where, and with which kernels."""
    present = {name: data for name, data in splits.items() if data is not None}
    counts = ", ".join(f"{name} {len(data)}" for name, data in present.items())
    classes = len(next(iter(present.values())).categories)
    lines = [
        describe_model(config, model),
        f"data: {config.data.root}: {counts} images, {classes} classes",
    ]
    lines += [f"{name}: {line}" for name, data in present.items() for line in data.report]
    lines += [
        f"{name}: no annotations, so it is not evaluated"
        for name, data in present.items()
        if not data.has_annotations
    ]
    ranks = f", {world_size} ranks" if world_size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return [
        *lines,
        f"schedule: {describe_schedule(config.optim)}; {describe_lr(config.optim, config.data.batch_size)}",
        f"device: {device}{name}{threads}{ranks}, amp {config.train.amp}, seed {config.train.seed}",
        f"operators: {describe_backends(device.type)}",
        f"software: {describe_software()}",
    ]


def describe_software() -> str:
    """Says in one line which versions run, and on which system."""
    versions = f"drcnn {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.platform()}"


def build_model(config: "Config") -> nn.Module:
    """Builds the detector of ``config``.

    Raises:
        ConfigError: if its parts do not go together.
    """
    try:
        return config.model.build()
    except ValueError as error:
        raise ConfigError(f"the model cannot be built: {error}; see the --model flags") from error


def describe_model(config: "Config", model: nn.Module) -> str:
    """Says in one line which backbone, detector and training policy, and how many weights."""
    total, trained = count_parameters(model)
    parts = f"{config.model.backbone.name} {type(model).__name__}, {type(model.dynamics).__name__}"
    return f"model: {parts}, {total / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Counts all weights, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def describe_backends(device_type: str) -> str:
    """Says in one line which backend serves which operator on a device type."""
    by_backend: dict[str, list[str]] = {}
    for choice in backend_status():
        if choice.device_type == device_type:
            by_backend.setdefault(choice.backend or "none", []).append(choice.op)
    return "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items())
