"""What a run shows and keeps: a live bar on a terminal, plain lines elsewhere, log.txt and metrics.jsonl."""

import io
import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from drcnn.engine.writing import LineFile, changing, replacing

SHORT_NAMES = {
    "loss_rpn_objectness": "rpn",
    "loss_rpn_box": "rpn_box",
    "loss_classification": "cls",
    "loss_box": "box",
    "loss_centerness": "center",
    "iou_threshold": "T_now",
    "beta": "beta_now",
    "scale_ratio": "r_t",
    "scale_collage": "collages",
}
"""How a value of a record is called on a line; other losses and metrics keep their names."""

HIDDEN = ("step", "epoch", "lr", "loss", "time_per_step", "data_time", "memory_mb")
HIDDEN += ("window_iou_count", "window_error_count")
HIDDEN += ("scale_histogram", "loss_share_small", "loss_share_medium", "loss_share_large")
"""Values of a record that have their own place on a line, or none."""

HIDDEN_ZEROS = ("non_finite_statistics", "scale_collage")
"""Values that are shown only when there is something to tell."""


class MetricsFile:
    """``metrics.jsonl``: one json object a line, appended and handed to the system at each event.

    Args:
        path: the file.
        keep: which records of an earlier run stay; None for none. What a kill tore never stays.

    Raises:
        TrainingError: if it cannot be written.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        kept = [line for line in _lines(path) if _stays(line, keep)] if keep is not None else []
        with replacing(path) as file:
            file.writelines(line + b"\n" for line in kept)
        self._file = LineFile(path)

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; a number that is not finite becomes null, as json has no other word for it.

        Raises:
            TrainingError: if the disk says no.
        """
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(plain) + "\n")

    def sync(self) -> None:
        """Waits until all records are on disk, as they must be before a checkpoint that comes after them."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _lines(path: Path) -> list[bytes]:
    with changing(path):
        return path.read_bytes().split(b"\n") if path.is_file() else []


def _stays(line: bytes, keep: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return bool(keep(json.loads(line)))
    except (ValueError, KeyError, TypeError):  # torn by a kill
        return False


class Display:
    """Shows a run on the terminal (a live bar, or plain lines) and keeps every line in ``log.txt``."""

    def __init__(self, log: Path | None, iterations: int, *, silent: bool = False) -> None:
        """Shows nothing when ``silent``, as on ranks other than the main one."""
        self.iterations = iterations
        self.silent = silent
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._log = None if silent or log is None else LineFile(log)
        self._step_time: float | None = None
        self._live: Live | None = None
        if self._console.is_terminal and not silent:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"))
            self._train = self._bar.add_task("train", total=iterations, text="")
            self._eval = self._bar.add_task("eval", total=None, text="", visible=False)
            self._values = Text()
            below = Group(self._bar, self._values)
            self._live = Live(below, console=self._console, refresh_per_second=2)

    def start(self) -> None:
        """Starts the live bar, if there is one."""
        if self._live is not None:
            self._live.start()

    def close(self) -> None:
        """Ends the live bar and closes ``log.txt``."""
        if self._live is not None:
            self._live.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def say(self, line: str) -> None:
        """Prints one line and keeps it."""
        if not self.silent:
            self._console.print(line, markup=False)
            self._keep(line)

    def show(self, renderable: RenderableType) -> None:
        """Prints a table or another object of ``rich`` and keeps it as text."""
        if not self.silent:
            self._console.print(renderable)
            text = io.StringIO()
            Console(file=text, width=100, no_color=True).print(renderable)
            self._keep(text.getvalue().removesuffix("\n"))

    def step(self, record: dict[str, Any]) -> None:
        """Shows a record of training: under the bar on a terminal, as a line elsewhere."""
        if self.silent:
            return
        values, speed = self._words(record)
        line = "  ".join([f"step {record['step']}/{self.iterations}", *values, *speed])
        if self._live is None:
            self.say(line)
            return
        self._keep(line)
        self._bar.update(self._train, completed=record["step"], text="  ".join(speed))
        self._values.plain = "  ".join(values)

    def evaluation(self, split: str, done: int, total: int) -> None:
        """Shows how far an evaluation is."""
        if self._live is not None:
            going_on = done < total
            self._bar.update(
                self._eval, description=f"eval {split}", completed=done, total=total, visible=going_on
            )

    def _keep(self, line: str) -> None:
        if self._log is not None:
            self._log.write(line + "\n")

    def _words(self, record: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Writes the values of a record, and its speed, memory and time to the end."""
        values = [f"loss {record['loss']:.4f}"]
        for name, value in record.items():
            value = sum(value) / len(value) if isinstance(value, list) else value
            if name not in HIDDEN and (value or name not in HIDDEN_ZEROS):
                short = SHORT_NAMES.get(name, name.removeprefix("loss_"))
                values.append(f"{short} {value:.3f}")
        values.append(f"lr {record['lr']:.3g}")
        seconds = record["time_per_step"]
        smooth = seconds if self._step_time is None else 0.7 * self._step_time + 0.3 * seconds
        self._step_time = smooth
        left = format_time((self.iterations - record["step"]) * smooth)
        speed = [f"{1 / seconds:.2f} it/s", f"data {record['data_time']:.3f} s"]
        return values, [*speed, f"{record['memory_mb']:.0f} MB", f"ETA {left}"]


def format_time(seconds: float) -> str:
    """Writes a duration as ``h:mm:ss``, with days before it where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def memory_mb(device: torch.device) -> float:
    """Returns the peak memory in MiB: allocated by torch on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
