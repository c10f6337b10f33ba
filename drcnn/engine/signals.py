"""Stopping a run in order: a signal asks, the loop finishes its iteration, saves and leaves.

Ctrl-C asks, and so do SIGTERM and SIGUSR1, by which batch systems announce that a job's time is over or its
place is needed (``kill``, ``scancel``, ``sbatch --signal=USR1@120``).
"""

import signal
import threading
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class RunStopped(Exception):
    """A run that was asked to stop and has saved its state.

    Args:
        number: of the signal that asked.
        step: last iteration that was done.

    Attributes:
        exit_code (int): of the verb: 128 + the number.
    """

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} after iteration {step} with its state saved; "
            "the same command with --resume continues"
        )
        self.exit_code = 128 + number


class StopRequest:
    """Records the signals that ask to stop while its block runs; a second Ctrl-C ends the process as usual.

    A batch system may repeat itself or send one signal after the other; it has SIGKILL for one that must go.

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
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record(self, number: int, frame: FrameType | None) -> None:
        repeated, self.signal = self.signal, self.signal or number
        if repeated and number == signal.SIGINT:
            signal.signal(number, self._before[number])  # type: ignore[arg-type]
            signal.raise_signal(number)
        elif not repeated and hasattr(signal, "SIGCHLD"):
            # A signal to the whole process group ends the loader's workers as well. torch would raise that
            # anywhere, such as half-way through the optimizer's step; the next fetch notices it anyway.
            self._before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, lambda *_: None))
