"""The values of the iterations since the last log line, kept on the device and read in one transfer."""

from typing import Any

import torch
from torch import Tensor

NEVER = -1


class LossWindow:
    """Sums losses, keeps each iteration's other values, and never waits.

    It remembers the first iteration with a loss that is not finite.

    Attributes:
        count (int): number of iterations summed.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts empty, on ``device``."""
        self.device = device
        self.names: list[str] = []
        self.count = 0
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        self.traces: dict[str, list[Tensor]] = {}
        self.first_bad = torch.full((), NEVER, dtype=torch.int64, device=device)

    def add(self, iteration: int, values: dict[str, Tensor], unchecked: dict[str, Tensor]) -> None:
        """Adds the values of one iteration.

        Args:
            iteration (int): number of the iteration, for the report of the first bad one.
            values (dict[str, Tensor]): 0-dim tensors that must be finite, with the same names at each call.
            unchecked (dict[str, Tensor]): the same, but they may be infinite.
        """
        stacked = torch.stack([v.detach().double() for v in (*values.values(), *unchecked.values())])
        names = [*values, *unchecked]
        if self.names != names:
            self.names, self.count = names, 0
            self.sums = torch.zeros_like(stacked)
        self.sums += stacked
        self.count += 1
        bad = ~stacked[: len(values)].isfinite().all() & (self.first_bad == NEVER)
        self.first_bad = torch.where(bad, iteration, self.first_bad)

    def trace(self, values: dict[str, Tensor]) -> None:
        """Keeps 0-dim tensors of one iteration."""
        for name, value in values.items():
            self.traces.setdefault(name, []).append(value.detach().to(torch.float64, copy=True))

    def read(
        self, extra: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, float | list[float]], int | None]:
        """Waits for the device once and reads the window.

        Args:
            extra (dict[str, Tensor]): 0-dim tensors to read in the same transfer.

        Returns:
            The mean of each loss over the window; the values of ``extra``, and what was traced as a list with
            one value for each iteration; the first iteration that had a loss that was not finite, or None.
        """
        means = self.sums / max(self.count, 1)
        tail = [v.detach().to(means) for v in extra.values()]
        traced = [value for values in self.traces.values() for value in values]
        read = iter(torch.cat([means, torch.stack([self.first_bad.double(), *tail, *traced])]).tolist())
        losses = {name: next(read) for name in self.names}
        first_bad = int(next(read))
        others: dict[str, float | list[float]] = {name: next(read) for name in extra}
        others |= {name: [next(read) for _ in values] for name, values in self.traces.items()}
        return losses, others, None if first_bad == NEVER else first_bad

    def reset(self) -> None:
        """Empties the window; the first bad iteration stays on record."""
        self.sums = torch.zeros_like(self.sums)
        self.count = 0
        self.traces = {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the content, so that a resumed run logs the same as one that was never stopped."""
        traces = {name: torch.stack(values) for name, values in self.traces.items()}
        return {"names": list(self.names), "sums": self.sums, "count": self.count, "traces": traces}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.names, self.count = list(state["names"]), int(state["count"])
        self.sums = state["sums"].to(self.device).clone()
        traces = state.get("traces", {})
        self.traces = {name: list(values.to(self.device).unbind()) for name, values in traces.items()}


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Adds the losses of an iteration."""
    return torch.stack([value.float() for value in losses.values()]).sum()
