"""Reading pickled weights of other systems without running anything from them.

A pickle names functions that are called while it is read. Here such a name can only mean one of three things:
a builder of tensors, arrays or plain containers; an inert stand-in for a data class of a known trainer, which
keeps nothing; or a refusal that says what the file wanted to call. Nothing is ever imported.
"""

import builtins
import collections
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch

TRAINERS = (
    "addict",
    "argparse",
    "datetime",
    "detectron2",
    "dynamic_rcnn",
    "easydict",
    "fvcore",
    "maskrcnn_benchmark",
    "mmcv",
    "mmdet",
    "mmengine",
    "omegaconf",
    "pathlib",
    "yacs",
)
"""Packages whose objects lie beside the weights in checkpoints; they are read as empty stand-ins."""

_PLAIN = ("bool", "complex", "dict", "float", "frozenset", "int", "list", "set")
_TENSORS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")


class RefusedPickle(pickle.UnpicklingError):
    """A pickle that names something other than data."""


class DataUnpickler(pickle._Unpickler):
    """Reads tensors, arrays and plain types; knows nothing else.

    It is Python's own unpickler in Python, not the one in C: damaged numbers in a file cannot make it reserve
    memory, and its instructions can be restricted.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(file, **options)
        # Made anew for each file, so that no file can leave anything behind in them.
        self._known = _known_names()

    def find_class(self, module: str, name: str) -> Any:
        """Looks a name up in the closed list.

        Raises:
            RefusedPickle: the name is not on it.
        """
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        found = self._known.get((module.replace("numpy._core", "numpy.core"), name))
        if found is not None:
            return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] in TRAINERS:
            return self._known["inert"]
        raise RefusedPickle(f"it calls {module}.{name} when it is loaded, which is not data")

    def load_build(self) -> None:
        """Sets an object's state, but only of arrays and their types; others keep none."""
        target = self.stack[-2]
        if isinstance(target, np.ndarray | np.dtype):
            super().load_build()
        else:
            self.stack.pop()

    dispatch[pickle.BUILD[0]] = load_build


def _inert() -> type:
    """Makes a class that takes the place of objects that are not needed."""

    class Inert:
        """Takes anything, keeps nothing."""

        def __new__(cls, *_: object, **__: object) -> "Inert":
            return super().__new__(cls)

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def __setitem__(self, key: object, value: object) -> None:
            pass

        def append(self, value: object) -> None:
            pass

        def extend(self, values: object) -> None:
            pass

        def add(self, value: object) -> None:
            pass

    return Inert


def _known_names() -> dict[Any, Any]:
    """Everything that a name in a pickle can mean."""
    inert = _inert()

    def attribute(owner: object, name: str, *_: object) -> type:
        if owner is not inert:
            raise RefusedPickle(f"it asks for the attribute {name!r} of an object when it is loaded")
        return inert

    def new_object(kind: object, *_: object) -> object:
        if kind is not inert:
            raise RefusedPickle("it makes an object of an unknown kind when it is loaded")
        return inert()

    def scalar(kind: np.dtype, data: bytes | str = b"") -> Any:
        data = data.encode("latin1") if isinstance(data, str) else data
        return inert() if kind.hasobject else np.frombuffer(data, kind, count=1)[0].item()

    known: dict[Any, Any] = {
        "inert": inert,
        ("builtins", "getattr"): attribute,
        ("copyreg", "_reconstructor"): new_object,
        ("builtins", "object"): inert,
        ("builtins", "bytes"): lambda: b"",
        ("_codecs", "encode"): lambda text, *_: str(text).encode("latin1"),
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): lambda *_: {},
        ("collections", "deque"): lambda items=(), *_: list(items),
        ("collections", "Counter"): lambda items=(), *_: dict(items),
        ("numpy", "ndarray"): inert,
        # A copy, for a state may be set on it.
        ("numpy", "dtype"): lambda kind, *_: np.dtype(str(kind), copy=True),
        ("numpy.core.multiarray", "_reconstruct"): lambda *_: np.ndarray((0,), np.int8),
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy.core.numeric", "_frombuffer"): _forward(_array),
        ("torch", "Size"): torch.Size,
        ("torch", "device"): lambda *_: None,
    }
    known |= {("builtins", name): _forward(getattr(builtins, name)) for name in _PLAIN}
    known |= {("torch._utils", name): _forward(getattr(torch._utils, name)) for name in _TENSORS}
    return known


def _array(buffer: bytes, kind: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(bytes(buffer), kind).reshape(shape, order="F" if order == "F" else "C")


def _forward(function: Callable) -> Callable:
    """Wraps a function, so that a file cannot reach the function itself."""
    return lambda *arguments: function(*arguments)


def read_pickled(path: Path) -> Any:
    """Reads a file of ``torch.save``, in its zip or its older format, or a plain pickle, on the CPU.

    Args:
        path: the file.

    Returns:
        Its content, with stand-ins for objects of trainers.

    Raises:
        RefusedPickle: the file would call something that is not data.
        Exception: of many kinds, for a damaged file.
    """
    with warnings.catch_warnings():
        # About unusual pickle protocols: the file is then read, or refused with an error of its own.
        warnings.simplefilter("ignore", UserWarning)
        of_torch = _is_torch_file(path)
        # Opened here, for torch would tell the kind of file by the end of its name.
        with open(path, "rb") as file:
            if not of_torch:
                return DataUnpickler(file, encoding="latin1").load()
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                file.seek(0)
                reader = SimpleNamespace(Unpickler=DataUnpickler, load=_load, __name__=__name__)
                return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)


def _load(file: BinaryIO, **options: Any) -> Any:
    return DataUnpickler(file, **options).load()


def _is_torch_file(path: Path) -> bool:
    """Tells files of ``torch.save`` from plain pickles; refuses those that torch would unpack or run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise RefusedPickle("it is a TorchScript program; save its state_dict() instead")
        return True
    if tarfile.is_tarfile(path):
        raise RefusedPickle("it is a tar archive, a format of torch before 0.1.10; save it again")
    magic = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
    with open(path, "rb") as file:
        return magic in file.read(32)
