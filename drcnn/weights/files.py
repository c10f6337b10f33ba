"""Reading tensors from files without running code from them."""

import json
import os
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from drcnn.errors import WeightsError

_WRAPPERS = ("model", "state_dict", "model_state", "module")
_PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of each name."""


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Reads the tensors of a weights file or checkpoint, on the CPU.

    The kind of file is told by its content: safetensors, or what ``torch.save`` writes. The latter is
    read with ``weights_only=True``, which refuses everything but tensors and plain types.

    Args:
        path: file with a state dict, or a checkpoint with one under "model" or "state_dict".

    Returns:
        Tensors by name, without the prefixes of wrappers such as "module.".

    Raises:
        WeightsError: no such file, a damaged one, one with anything but plain types, one without tensors.
    """
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"weights file not found: {path}; check the path")
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, expected a weights file (.pth, .pt or .safetensors)")
    try:
        content = load_file(path) if _is_safetensors(path) else _torch_load(path)
    except pickle.UnpicklingError as error:
        raise WeightsError(f"{path} cannot be read without running code from it: {_cause(error)}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise WeightsError(f"{path} is damaged or not a weights file: {_cause(error)}") from None
    return plain_state_dict(content, str(path))


def plain_state_dict(content: object, source: str) -> dict[str, Tensor]:
    """Finds the state dict in a checkpoint's content and strips the names' wrappers.

    Args:
        content: state dict, or a dict that holds one under "model", "state_dict" or the like.
        source: what to call the content in an error.

    Raises:
        WeightsError: the content holds no tensors by name.
    """
    for key in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise WeightsError(f"{source} holds no state dict but a {type(content).__name__}")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise WeightsError(f"{source} holds no tensors by name; it holds {keys}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _torch_load(path: Path) -> object:
    with warnings.catch_warnings():
        # About unusual pickle protocols: the file is then read, or refused with an error of its own.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


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
