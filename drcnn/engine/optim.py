"""SGD, AdamW and their schedules: the learning rate is a pure function of the iteration and of the batch."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drcnn.errors import ConfigError

_NAMES = {"sgd": "SGD", "adamw": "AdamW"}


@dataclass(frozen=True)
class OptimConfig:
    """Linear warm-up, then steps or a cosine; by default SGD as in Dynamic R-CNN section 4.1 (1x)."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or Adam with decoupled weight decay (arXiv 1711.05101)."""
    lr: float = 0.02
    """Learning rate for `reference_batch` images a step; scaled linearly to the actual batch."""
    reference_batch: int = 16
    """Number of images a step that `lr` is meant for."""
    momentum: float = 0.9
    """Momentum of SGD; AdamW has `betas` instead."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: float = 1e-4
    """Decay of every trained weight: an L2 penalty in SGD, decoupled from the gradient in AdamW."""
    warmup_iterations: int = 500
    """Iterations over which the learning rate rises linearly to its full value; 0 for none."""
    warmup_factor: float = 1 / 3
    """Share of the learning rate at the first iteration of the warm-up."""
    iterations: int = 90_000
    """Number of training iterations."""
    schedule: Literal["step", "cosine"] = "step"
    """After the warm-up: drops at `milestones`, or half a cosine to `final_factor` (arXiv 1608.03983)."""
    milestones: tuple[int, ...] = (60_000, 80_000)
    """Iterations at which the schedule `step` multiplies the learning rate by `gamma`."""
    gamma: float = 0.1
    """Factor of each drop of the learning rate."""
    final_factor: float = 0.0
    """Share of the learning rate at the end of the schedule `cosine`."""
    clip_norm: float | None = None
    """Largest norm of the gradient of all weights together; None for no clipping."""
    accumulate: int = 1
    """Micro-batches that each rank's share of a batch is cut into, to save memory; gradients are averaged.
    Only what looks at several images at once differs: losses with one divisor for all images of a batch,
    batch norm that is trained, and the random numbers."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999, which is then evaluated, kept as
    the best and drawn with; buffers are copied. None for no average."""
    fused: bool = False
    """One fused kernel for the optimizer's step; fp16 has it anyway."""

    def __post_init__(self) -> None:
        """Checks the ranges, so that a typing slip fails before training starts."""
        for name in ("lr", "reference_batch", "iterations"):
            if not getattr(self, name) > 0 or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"optim.{name} must be positive, got {getattr(self, name)}")
        not_negative = ("momentum", "weight_decay", "warmup_iterations", "warmup_factor", "gamma")
        for name in (*not_negative, "final_factor"):
            if not getattr(self, name) >= 0 or not math.isfinite(getattr(self, name)):
                raise ConfigError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas must be at least 0 and less than 1, got {self.betas}")
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            raise ConfigError(f"optim.milestones must be rising iterations, got {self.milestones}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm must be positive or None, got {self.clip_norm}")
        if self.accumulate < 1:
            raise ConfigError(f"optim.accumulate must be at least 1, got {self.accumulate}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ConfigError(f"optim.ema must be at least 0 and less than 1, or None, got {self.ema}")


def scaled_lr(config: OptimConfig, batch_size: int) -> float:
    """Scales the learning rate linearly to ``batch_size`` images a step, over all ranks."""
    return config.lr * batch_size / config.reference_batch


def lr_at(config: OptimConfig, iteration: int, batch_size: int) -> float:
    """Computes the learning rate of one iteration.

    With ``w = warmup_iterations`` and ``f = warmup_factor``: ``lr * batch / reference_batch``, times
    ``f + (1 - f) * iteration / w`` while ``iteration < w``. The schedule ``step`` multiplies it by ``gamma``
    for each milestone reached; the schedule ``cosine``, with ``e = final_factor``, by
    ``e + (1 - e) * (1 + cos(pi * (iteration - w) / (iterations - w))) / 2`` from ``w`` on.

    Args:
        config (OptimConfig): the schedule.
        iteration (int): number of iterations done before this one; 0 is the first.
        batch_size (int): images a step over all ranks.
    """
    lr, warmup = scaled_lr(config, batch_size), config.warmup_iterations
    if config.schedule == "step":
        lr *= config.gamma ** sum(iteration >= m for m in config.milestones)
    elif iteration >= warmup:
        done = (iteration - warmup) / max(config.iterations - warmup, 1)
        wave = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        lr *= config.final_factor + (1 - config.final_factor) * wave
    if iteration < warmup:
        lr *= config.warmup_factor + (1 - config.warmup_factor) * iteration / warmup
    return lr


def describe_lr(config: OptimConfig, batch_size: int) -> str:
    """Says in one sentence how the learning rate was scaled to the batch."""
    images = f"{batch_size} image{'s' * (batch_size != 1)}"
    if batch_size == config.reference_batch:
        return f"lr {config.lr:g} for {images}, the batch it is meant for"
    scaled = scaled_lr(config, batch_size)
    return f"lr {config.lr:g} for {config.reference_batch} images -> {scaled:g} for {images}"


def describe_schedule(config: OptimConfig) -> str:
    """Says in one sentence which optimizer trains, for how long, and where the learning rate changes."""
    drops = [str(m) for m in config.milestones if m < config.iterations]
    text = f"{_NAMES[config.optimizer]}, {config.iterations} iterations, "
    if config.schedule == "cosine":
        text += f"cosine of the lr down to {config.final_factor:g} of it"
    else:
        text += f"lr x {config.gamma:g} at {' and '.join(drops)}" if drops else "no drop of the lr"
    if config.warmup_iterations:
        text += f", warm-up over {config.warmup_iterations} from {config.warmup_factor:.3g} of the lr"
    if config.clip_norm is not None:
        text += f", gradient norm clipped at {config.clip_norm:g}"
    if config.accumulate > 1:
        text += f", {config.accumulate} micro-batches a step"
    if config.ema is not None:
        text += f", weights averaged with decay {config.ema:g}"
    return text


def build_optimizer(
    config: OptimConfig, model: nn.Module, batch_size: int, *, scaled: bool = False
) -> torch.optim.Optimizer:
    """Builds the optimizer over the weights of ``model`` that require a gradient.

    Args:
        config (OptimConfig): which optimizer, its learning rate, momentum or betas, and weight decay.
        model (nn.Module): the weights.
        batch_size (int): images a step over all ranks.
        scaled (bool): a gradient scaler decides whether a step is taken. The fused form, which it then is,
            decides on the device; with any other the scaler waits for the device at each step.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    lr, decay, fused = lr_at(config, 0, batch_size), config.weight_decay, scaled or config.fused or None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=lr, betas=config.betas, weight_decay=decay, fused=fused)
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=config.momentum, weight_decay=decay, fused=fused)
    if scaled and config.momentum:
        # torch makes the buffers of fused SGD without values and relies on the first step to write them,
        # which it does not do when that step is skipped. From zero the first step is the same.
        for weight in weights:
            optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the running means of an optimizer, whose settings stay those of its config.

    Args:
        optimizer (Optimizer): as :func:`build_optimizer` made it.
        state (dict): ``state_dict()`` of an optimizer over the same weights; not changed.
    """
    saved = state["param_groups"]
    # Before loading: whether AdamW is fused says on which device its count of steps must lie.
    groups = [g | {"params": s["params"]} for g, s in zip(optimizer.param_groups, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> Tensor:
    """Clips the gradients of all weights together, without waiting for the device.

    Args:
        optimizer (Optimizer): its weights.
        clip_norm (float | None): largest norm; None leaves the gradients as they are.

    Returns:
        Tensor[]: the norm before.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(weights, clip_norm, norm)
    return norm


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
