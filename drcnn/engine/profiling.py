"""``drcnn train CONFIG --profile n``: a trace of n iterations by torch.profiler."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 3
"""Iterations before those that are traced; the profiler itself warms up in the last of them."""


class StepProfiler:
    """A context manager that is told of each iteration; it does nothing where there is nothing to trace.

    Args:
        steps (int): iterations to trace after the warm-up, 0 for none.
        file (Path): where the trace goes.
        say (Callable[[str], None]): takes the line that says so.
    """

    def __init__(self, steps: int, file: Path, say: Callable[[str], None]) -> None:
        self._steps, self._file, self._say = steps, file, say
        self._profile: profile | None = None
        self._left = WARM_UP + steps

    def __enter__(self) -> "StepProfiler":
        """Starts to count."""
        if self._steps:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            phases = schedule(wait=WARM_UP - 1, warmup=1, active=self._steps, repeat=1)
            self._profile = profile(activities=activities, schedule=phases, record_shapes=True)
            self._profile.start()
        return self

    def step(self) -> None:
        """Ends an iteration; after the last one that is traced it writes the trace."""
        if self._profile is None:
            return
        self._left -= 1
        if self._left:
            self._profile.step()
            return
        self._profile.stop()
        self._profile.export_chrome_trace(str(self._file))
        self._profile = None
        self._say(
            f"profile of {self._steps} iterations: {self._file}; open it in https://ui.perfetto.dev "
            "or chrome://tracing"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives a trace up that has not become whole."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
            self._say(f"no profile: the run ended {self._left} iterations too early for it")
