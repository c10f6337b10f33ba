"""The settings of a run."""

from dataclasses import dataclass
from typing import Literal

from drcnn.errors import ConfigError


@dataclass(frozen=True)
class TrainConfig:
    """A run: seed, precision, device, and how often it logs, saves and evaluates."""

    seed: int = 0
    """Seed of the initial weights, the order of the data, augmentation and sampling."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Number type of autocast; fp16 scales the loss."""
    weights: str = "none"
    """Weights of a detector to begin with: a run folder, a checkpoint, those of another system; or `none`."""
    partial_weights: bool = False
    """Take what fits of them, for another number of classes; the log lists what does not."""
    device: str = "auto"
    """Device: auto (CUDA where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""
    log_every: int = 20
    """Iterations between log lines; losses are means over them."""
    checkpoint_every: int = 5000
    """Iterations between writings of checkpoints/last.pt; 0 writes it only at the end."""
    keep_last: int = 1
    """More than 1 keeps so many earlier checkpoints too, as checkpoints/step_XXXXXXXX.pt."""
    eval_every: int = 0
    """Iterations between evaluations on the val split, the best of which is kept; 0 evaluates at the end."""
    pictures: int = 8
    """Number of pictures of predictions drawn at the end."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, least in (
            ("seed", 0),
            ("log_every", 1),
            ("checkpoint_every", 0),
            ("keep_last", 1),
            ("eval_every", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name} must be at least {least}, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"train.threads must be at least 1 or None, got {self.threads}")
