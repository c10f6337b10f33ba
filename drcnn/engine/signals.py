"""Stopping a run in order: Ctrl-C and SIGTERM ask, the loop finishes its iteration, saves and leaves."""

import signal
import threading
from types import FrameType


class RunStopped(Exception):
    """A run that was asked to stop and has saved its state; ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        """Takes the one-line message and the exit code of the verb."""
        super().__init__(message)
        self.exit_code = exit_code


class StopRequest:
    """Records SIGINT and SIGTERM while its block runs; a second one of either ends the process as usual.

    Attributes:
        signal (int): number of the signal that came, 0 while none has.
    """

    def __init__(self) -> None:
        """Starts with no request; nothing is caught before the block is entered."""
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        """Starts to catch the signals, where Python allows it (in the main thread)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        repeated, self.signal = self.signal, number
        if repeated:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
            signal.raise_signal(number)
        elif hasattr(signal, "SIGCHLD"):
            # A signal to the whole process group ends the loader's workers as well. torch would raise that
            # anywhere, such as half-way through the optimizer's step; the next fetch notices it anyway.
            self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
