"""Says what a run waits for when it takes too long."""

import threading
import time
from collections.abc import Callable


class Watchdog:
    """A thread that looks now and then at what the run waits for; telling it costs an assignment.

    Args:
        seconds (float): after how long it says so, then again each time the wait has doubled; 0 for never.
        say (Callable[[str], None]): takes the line; called in the thread.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds, self._say = seconds, say
        self._waiting = ("the start", time.monotonic())
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts to watch."""
        if self._seconds > 0:
            self.waits_for("the start")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def waits_for(self, what: str) -> None:
        """Is told what the run does from now on."""
        self._waiting = (what, time.monotonic())

    def stop(self) -> None:
        """Ends the thread."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        seen, limit = self._waiting, self._seconds
        while not self._ended.wait(self._seconds / 4):
            waiting = self._waiting
            if waiting is not seen:
                seen, limit = waiting, self._seconds
            what, since = waiting
            waited = time.monotonic() - since
            if waited >= limit:
                self._say(f"stalled: waiting for {what} for {waited:.3g} s (train.stall_seconds)")
                limit = 2 * waited
