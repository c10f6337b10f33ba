"""How far a count of images is and how long the rest takes: a live bar on a terminal, else plain lines."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from drcnn.engine.progress import format_time

SECONDS_BETWEEN_LINES = 10.0


class Countdown:
    """A context manager that is told ``(done, total)`` as the work goes on.

    Args:
        title: what is going on, in a word.
        unit: what is counted.
        silent: show nothing, as on ranks other than the main one.
    """

    def __init__(self, title: str, unit: str = "images", *, silent: bool = False) -> None:
        self._title, self._unit, self._silent = title, unit, silent
        self._console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
        self._start = self._last = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal and not silent:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
            rest = (TextColumn("{task.fields[speed]}"), TextColumn("ETA"), TimeRemainingColumn())
            self._bar = Progress(*columns, *rest, console=self._console)
            self._task = self._bar.add_task(title, total=None, speed="")

    def __enter__(self) -> "Countdown":
        """Starts the clock and the bar."""
        self._start = self._last = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line on stderr without disturbing the bar."""
        self._console.print(line, markup=False)

    def __call__(self, done: int, total: int | None) -> None:
        """Shows that ``done`` of ``total`` are done; None where nobody knows how many there will be."""
        if self._silent:
            return
        now = time.monotonic()
        rate = done / max(now - self._start, 1e-9)
        speed = (
            f"{rate:.1f} {self._unit}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s/{self._unit[:-1]}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, speed=speed)
        elif now - self._last >= SECONDS_BETWEEN_LINES or done == total:
            self._last = now
            if total is None:
                self.say(f"{self._title} {done} {self._unit}  {speed}")
                return
            eta = format_time((total - done) / max(rate, 1e-9))
            self.say(f"{self._title} {done}/{total} {self._unit}  {speed}  ETA {eta}")
