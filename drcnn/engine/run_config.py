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
    sync_bn: bool = False
    """Batch norm that is trained takes its statistics over all ranks, on GPUs."""
    rank_timeout: float = 30.0
    """Minutes that a rank waits for the others before the run ends; more than a scoring of val takes."""
    log_every: int = 20
    """Iterations between log lines; losses are means over them."""
    checkpoint_every: int = 5000
    """Iterations between writings of checkpoints/last.pt; 0 writes it only at the end."""
    keep_last: int = 1
    """More than 1 keeps so many earlier checkpoints too, as checkpoints/step_XXXXXXXX.pt."""
    eval_every: int = 0
    """Iterations between evaluations on the val split, the best of which is kept; 0 evaluates at the end."""
    patience: int = 0
    """Evaluations on the val split without a better AP after which training ends early; 0 for never."""
    auto_batch: bool = False
    """Find the largest data.batch_size that fits on the GPU before training; the learning rate follows it."""
    deterministic: bool = False
    """Equal bits on every run, on a GPU too, where it takes some speed; a CPU has that anyway."""
    compile: bool = False
    """Compile the forward and backward pass by torch.compile as one graph, once for each padded shape."""
    channels_last: bool = False
    """Lay images and features out channel by channel of a pixel, as tensor cores like it best."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where records go besides metrics.jsonl; each needs the extra of its name."""
    stall_seconds: float = 300.0
    """After waiting so long for one batch, iteration or evaluated batch the run says so; 0 for never."""
    eval_batch_size: int = 4
    """Images per forward of these evaluations on each rank; results follow from it, not from the ranks."""
    pictures: int = 8
    """Number of pictures of predictions drawn at the end."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        least = {"seed": 0, "log_every": 1, "checkpoint_every": 0, "keep_last": 1, "eval_every": 0}
        for name, value in (least | {"eval_batch_size": 1, "patience": 0, "stall_seconds": 0}).items():
            if not getattr(self, name) >= value:
                raise ConfigError(f"train.{name} must be at least {value}, got {getattr(self, name)}")
        if not 0 < self.rank_timeout <= 60 * 24 * 365:
            raise ConfigError(f"train.rank_timeout must be positive minutes, got {self.rank_timeout}")
        if self.patience and not self.eval_every:
            raise ConfigError("train.patience counts evaluations; set train.eval_every too")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"train.threads must be at least 1 or None, got {self.threads}")


def due(every: int, step: int) -> bool:
    """Tells whether an event that comes every so many iterations, 0 for never, comes after ``step``."""
    return every > 0 and step % every == 0
