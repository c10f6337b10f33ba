"""Shape checks that the public operators share."""

from torch import Tensor


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raises ``ValueError`` unless ``boxes`` has shape [B, N, 4] or [N, 4]."""
    if boxes.dim() not in (2, 3) or boxes.shape[-1] != 4:
        raise ValueError(f"{name} must have shape [B, N, 4] or [N, 4], got {list(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {boxes.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``tensor`` has exactly ``shape``."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
