"""Records as TensorBoard's event files in ``RUN/tensorboard``."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from drcnn.engine.loggers import scalars


class TensorBoardLogger:
    """Writes the numbers of each record, and what was traced in each iteration at its own step.

    Args:
        run (Path): the run folder.
        step (int): iterations done; events of later ones, from before a resume, are no longer shown.
    """

    def __init__(self, run: Path, step: int) -> None:
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record, to the disk at once."""
        step = record["step"]
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        for name, values in record.items():
            if isinstance(values, list) and name != "scale_histogram":
                for at, value in enumerate(values, start=step - len(values) + 1):
                    self._writer.add_scalar(f"train/{name}", value, at)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()
