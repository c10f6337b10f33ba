"""A decision of the device that the host reads early, without draining the device's queue."""

import torch
from torch import Tensor


class EarlyRead:
    """Copies a bool to the host as soon as the device has it, and waits for that copy alone.

    Scale training decides at the end of the forward pass of iteration t what batch t + 1 is made of. The copy
    is queued there, before the backward pass, into page-locked memory. When the host comes to batch t + 1 it
    has queued the backward pass and the optimizer's step of iteration t, which the device is still busy
    with, or will be: the wait ends long before they do, and the device never runs dry because of it. So the
    decision of iteration t holds for exactly batch t + 1, however many batches are prefetched. On a CPU
    there is nothing to wait for.

    Args:
        device: where the decisions are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, on_gpu = device, device.type == "cuda"
        self._value = torch.zeros((), dtype=torch.bool, pin_memory=on_gpu)
        self._copied = torch.cuda.Event() if on_gpu else None

    def send(self, value: Tensor) -> None:
        """Queues the copy of a bool Tensor[]; nothing here waits."""
        self._value.copy_(value, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def receive(self) -> bool:
        """Returns what was sent last, once its copy is there."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._value)
