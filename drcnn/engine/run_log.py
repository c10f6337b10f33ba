"""What a run tells of its iterations: it times them, reads their values at log events and writes records."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drcnn.data import CocoDataset
from drcnn.engine import distributed
from drcnn.engine.loggers import Logger
from drcnn.engine.metrics import Metrics
from drcnn.engine.optim import lr_at
from drcnn.engine.progress import Display, MetricsFile, memory_mb
from drcnn.engine.watchdog import Watchdog
from drcnn.engine.window import LossWindow
from drcnn.errors import TrainingError

if TYPE_CHECKING:
    from drcnn.config import Config


class RunLog:
    """The log of one run, on every rank; the main one shows and writes it.

    Args:
        config (Config): the experiment.
        run (Path): the run folder.
        data (CocoDataset): the training images, to name those of a bad iteration.
        window (LossWindow): what was measured since the last record.
        keep (Callable | None): tells which records of an earlier ``metrics.jsonl`` stay; None begins anew.
        loggers (Sequence[Logger]): where else the records go; of the main rank alone.

    Attributes:
        display (Display): the terminal and ``log.txt``.
        watchdog (Watchdog): says when the run waits for something for long.
    """

    def __init__(
        self,
        config: "Config",
        run: Path,
        data: CocoDataset,
        window: LossWindow,
        keep: Callable[[dict[str, Any]], bool] | None,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self.config, self.run, self.data, self.window = config, run, data, window
        main = distributed.is_main()
        self.display = Display(run / "log.txt" if main else None, config.optim.iterations, silent=not main)
        self.metrics = MetricsFile(run / "metrics.jsonl", keep) if main else None
        self.loggers = loggers
        self.watchdog = Watchdog(config.train.stall_seconds, self.say_stalled)
        self.recent: deque[tuple[int, Tensor]] = deque(maxlen=config.train.log_every)
        self.restart_clock()

    def start(self, lines: Sequence[str]) -> None:
        """Starts the live bar and the watchdog and says ``lines``."""
        self.display.start()
        self.watchdog.start()
        for line in lines:
            self.display.say(line)

    def say_stalled(self, line: str) -> None:
        """Passes a line of the watchdog on; every rank has one, as each may wait for something of its own."""
        if distributed.world_size() > 1:
            line = f"rank {distributed.rank()} {line}"
        if distributed.is_main():
            self.display.say(line)
        else:
            print(line, file=sys.stderr, flush=True)

    def restart_clock(self) -> None:
        """Starts to time the iterations of the next record."""
        self.clock, self.data_time, self.timed_steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def paused_clock(self) -> Iterator[None]:
        """Leaves out of the time of the iterations what happens inside of a ``with`` block."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start

    def fetched(self, iteration: int, indices: Tensor, seconds: float) -> None:
        """Remembers the images (Tensor[n], on the host) of an iteration and how long it waited for them."""
        self.recent.append((iteration, indices))
        self.data_time += seconds
        self.timed_steps += 1

    def write_step(self, step: int, position: int, model: nn.Module) -> None:
        """Waits for the device, checks the window, and writes the record of the iterations up to ``step``.

        Args:
            step (int): iterations done.
            position (int): batches of the stream that they took.
            model (nn.Module): the detector, for its dynamics.

        Raises:
            TrainingError: if a loss or gradient was not finite.
        """
        losses, dynamics = self.read_window(model)
        optim, batch_size = self.config.optim, self.config.data.batch_size
        seconds = time.perf_counter() - self.clock
        record: dict[str, Any] = {
            "step": step,
            "epoch": position * batch_size / len(self.data),
            "lr": lr_at(optim, step - 1, batch_size),
            **losses,
            **dynamics,
            "scale_histogram": model.scale.histogram.tolist(),
            "time_per_step": seconds / max(self.timed_steps, 1),
            "data_time": self.data_time / max(self.timed_steps, 1),
            "memory_mb": memory_mb(self.window.device),
        }
        self.window.reset()
        self.restart_clock()
        self.display.step(record)
        self.write(record)

    def write_evaluation(self, step: int, split: str, metrics: Metrics) -> None:
        """Writes what the weights of iteration ``step`` reach on a split."""
        self.display.say(f"step {step}  {split}  {metrics.headline()}")
        self.write({"step": step, "split": split, **metrics.flat()})

    def write(self, record: dict[str, Any]) -> None:
        """Writes a record on the main rank, and passes it on to the loggers."""
        if self.metrics is not None:
            self.metrics.write(record)
        for logger in self.loggers:
            logger.write(record)

    def sync(self) -> None:
        """Waits until all records are on disk."""
        if self.metrics is not None:
            self.metrics.sync()

    def read_window(self, model: nn.Module) -> tuple[dict[str, float], dict[str, float | list[float]]]:
        """Waits for the device, and stops the run if a loss or gradient was not finite.

        Raises:
            TrainingError: naming the iteration and its images.
        """
        losses, dynamics, bad = self.window.read(model.dynamics.metrics())
        bad = distributed.first_over_ranks(bad)
        if bad is None:
            return distributed.mean_over_ranks(losses, self.window.device), dynamics
        indices = dict(self.recent).get(bad, torch.zeros(0, dtype=torch.int64)).tolist()
        names = distributed.gather_objects([self.data.file_name(i) for i in indices])
        images = ", ".join(name for share in names for name in share)
        lr = lr_at(self.config.optim, bad - 1, self.config.data.batch_size)
        kept = self.run / "checkpoints" / "last.pt"
        raise TrainingError(
            f"a loss or gradient was not finite at iteration {bad} (lr {lr:.3g}) on the images {images}; "
            f"lower --optim.lr, set --optim.clip-norm 10, or check these images"
            + (f"; {kept} is from before" if kept.exists() else "")
        )

    def close(self) -> None:
        """Ends the watchdog and the live bar and closes the files and the loggers."""
        self.watchdog.stop()
        self.display.close()
        for logger in self.loggers:
            logger.close()
        if self.metrics is not None:
            self.metrics.close()
