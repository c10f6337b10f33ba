"""Dynamic R-CNN and its relatives for PyTorch.

``import drcnn`` is light: what needs torch is imported at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drcnn.engine.predictor import Predictor, Result
    from drcnn.loading import load
    from drcnn.structures import Detections, ImageBatch, Targets

__version__ = "0.1.0"

_EXPORTS = {
    "ImageBatch": "drcnn.structures",
    "Targets": "drcnn.structures",
    "Detections": "drcnn.structures",
    "Predictor": "drcnn.engine.predictor",
    "Result": "drcnn.engine.predictor",
    "load": "drcnn.loading",
}

__all__ = ["Detections", "ImageBatch", "Predictor", "Result", "Targets", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'drcnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_EXPORTS))
