"""Checks of shapes and dtypes that the public operators share."""

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def at_most(limit: int, size: int) -> int:
    """Returns the lesser of a limit and a tensor's size, which stays symbolic where an export varies it."""
    return min(limit, size) if isinstance(size, int) else torch.sym_min(limit, size)


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raises ``ValueError`` unless ``boxes`` has shape [B, N, 4] or [N, 4]."""
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must have shape [B, N, 4] or [N, 4], got {list(boxes.shape)}")
    if boxes.dtype not in _DTYPES:
        raise ValueError(
            f"{name} must be floating point (float16, bfloat16, float32 or float64), got {boxes.dtype}"
        )


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``tensor`` has exactly ``shape``."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def computation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which boxes of ``dtype`` are computed with: areas overflow half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32
