"""Reading tensors from files without running code from them."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from drcnn.errors import WeightsError
from drcnn.weights.checksum import verify_checksum
from drcnn.weights.pickles import RefusedPickle, read_pickled

_WRAPPERS = ("model", "state_dict", "model_state", "module")
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of each name."""
_DTYPES = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    }
)
_EXPANDED = 2**30
"""Bytes up to which a tensor may be larger than what the file holds of it, by a stride of 0."""


@dataclass
class Weights:
    """What a file or a state dict holds.

    Attributes:
        tensors: by name, without the prefixes of wrappers such as "module.".
        extra: what lies beside them in a checkpoint, or a safetensors file's metadata.
        source: what to call the weights in an error.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = "the state dict"


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a weights file or checkpoint, on the CPU; see :func:`read_weights`."""
    return read_weights(path).tensors


def read_weights(path: str | os.PathLike) -> Weights:
    """Reads a weights file or checkpoint, on the CPU.

    The kind of file is told by its content: safetensors, what ``torch.save`` writes (also before torch 1.6),
    or a plain pickle of arrays such as those of Detectron2's model zoo. Objects of known trainers that lie
    beside the tensors are passed over, and a file that names anything else is refused.

    Args:
        path: file with a state dict, or a checkpoint with one under "model" or "state_dict".

    Raises:
        WeightsError: no such file, a damaged one, one that would run code, one without tensors.
    """
    return unwrap(read_content(path), str(path))


def read_content(path: str | os.PathLike) -> dict[str, Any]:
    """Reads all that a weights file holds; safetensors become a dict with ``tensors`` and ``metadata``.

    Raises:
        WeightsError: no such file, a damaged one, one that would run code, or one that holds no dict.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"weights file not found: {path}; check the path")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, expected a weights file (.pth, .pt, .pkl or .safetensors)")
    try:
        verify_checksum(path)
        content = _read_safetensors(path) if _is_safetensors(path) else read_pickled(path)
    except WeightsError:
        raise
    except RefusedPickle as error:
        raise WeightsError(f"{path} is refused: {error}; get the weights from a source you trust") from None
    except Exception as error:  # what a damaged file makes its readers raise has no bounds
        raise WeightsError(f"{path} is damaged or not a weights file: {_cause(error)}") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no state dict but a {type(content).__name__}")
    return content


def unwrap(content: dict[str, Any], source: str) -> Weights:
    """Finds the state dict in a checkpoint's content, strips the names' wrappers, turns arrays into tensors.

    Args:
        content: state dict, or a dict that holds one under "model", "state_dict" or the like.
        source: what to call the content in an error.

    Raises:
        WeightsError: the content holds no tensors by name, or one that is no plain array of real numbers.
    """
    extra: dict[str, Any] = {}
    if isinstance(content.get("metadata"), dict) and isinstance(content.get("tensors"), dict):
        content, extra = content["tensors"], content["metadata"]
    for key in _WRAPPERS:
        if isinstance(content.get(key), dict):
            extra |= {name: value for name, value in content.items() if name != key}
            content = content[key]
    try:
        tensors = {
            str(name): torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value
            for name, value in content.items()
            if isinstance(value, Tensor | np.ndarray)
        }
    except TypeError as error:
        raise WeightsError(f"{source} holds an array that is no tensor: {_cause(error)}") from None
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise WeightsError(f"{source} holds no tensors by name; it holds {keys}")
    for name, tensor in tensors.items():
        _check_plain(name, tensor, source)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return Weights(tensors, extra, source)


def _check_plain(name: str, tensor: Tensor, source: str) -> None:
    plain = tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.dtype in _DTYPES
    if not plain:
        kind = f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
        raise WeightsError(f"{source} holds {name} as {kind}, expected a plain tensor of real numbers")
    if tensor.nbytes > max(tensor.untyped_storage().nbytes(), _EXPANDED):
        raise WeightsError(
            f"{source} is damaged: {name} states the shape {list(tensor.shape)}, but holds less"
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {"tensors": tensors, "metadata": file.metadata() or {}}


def _is_safetensors(path: Path) -> bool:
    """A safetensors file starts with the length of its json header, and the header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            return False
        if file.read(1) != b"{":
            return False
        try:
            return isinstance(json.loads(b"{" + file.read(length - 1)), dict)
        except ValueError:
            return False


def _cause(error: Exception) -> str:
    """The first sentence of an error that may be pages long."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.split(". ")[0][:200]
