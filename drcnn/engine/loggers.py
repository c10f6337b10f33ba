"""Where the records of a run go besides ``metrics.jsonl``."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from drcnn.errors import ConfigError


class Logger(Protocol):
    """Takes the records of the main rank."""

    def write(self, record: dict[str, Any]) -> None:
        """Takes a record of ``metrics.jsonl``: of training, or of an evaluation with its ``split``."""

    def close(self) -> None:
        """Ends the logger."""


def open_loggers(names: Sequence[str], run: Path, plain_config: dict[str, Any], step: int) -> list[Logger]:
    """Opens loggers.

    Args:
        names (Sequence[str]): of ``tensorboard`` and ``wandb``.
        run (Path): the run folder.
        plain_config (dict): the experiment as plain types.
        step (int): iterations done; what an earlier process logged after them no longer counts.

    Raises:
        ConfigError: if one is not installed or cannot start.
    """
    loggers: list[Logger] = []
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B leaves, is no package
            raise ConfigError(
                f"train.loggers {name} is not installed; install it with: pip install 'drcnn[{name}]'"
            )
        if name == "tensorboard":
            from drcnn.engine.tensorboard_logger import TensorBoardLogger

            loggers.append(TensorBoardLogger(run, step))
        else:
            from drcnn.engine.wandb_logger import WandbLogger

            loggers.append(WandbLogger(run, plain_config))
    return loggers


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """Picks the numbers of a record, an evaluation's by the name of its split, as in ``val/AP``."""
    place = record.get("split", "train")
    return {
        f"{place}/{name}": value
        for name, value in record.items()
        if isinstance(value, int | float) and name != "step"
    }
