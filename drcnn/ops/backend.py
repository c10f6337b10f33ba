"""Which implementation serves an operator: PyTorch (``reference``), C++/CUDA (``native``) or Triton.

The choice comes from ``DRCNN_BACKEND`` (read at import), ``with use_backend("triton"):``, or, by
default, from ``auto``: native when it was built for the device, else Triton on CUDA, else reference.
An explicit backend that cannot run raises `BackendError` and says why. ``auto`` that cannot use the
native kernel on a GPU warns once per operator with the cause.

An operator file registers its implementations and asks for one on each call::

    from drcnn.ops.backend import implementation, register

    @register("box_iou", "reference")
    def _reference(a, b): ...

    @register("box_iou", "native", requires=("box_iou",))   # torch.ops.drcnn.box_iou
    def _native(a, b): ...

    @register("box_iou", "triton")                          # drcnn/kernels/box_iou.py
    def _triton(a, b): ...

    def box_iou(a, b):
        return implementation("box_iou", a.device.type)(a, b)

All implementations of an operator take the same arguments. An operator that has a reference alone
registers just that one. The choice is made in plain Python from strings, so `torch.compile` treats
it as a constant and recompiles when `use_backend` changes it.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from drcnn.errors import DrcnnError

BACKENDS = ("reference", "native", "triton")
"""Names of the backends, without ``auto``."""

DEVICE_TYPES = ("cpu", "cuda")
"""Device types that `backend_status` reports."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendError(DrcnnError, RuntimeError):
    """A backend that was asked for by name and cannot run."""


class BackendWarning(UserWarning):
    """``auto`` could not use the native kernel on a GPU."""


@dataclass(frozen=True)
class Choice:
    """Which backend serves an operator on a device type.

    Attributes:
        op: name of the operator.
        device_type: ``"cpu"`` or ``"cuda"``.
        backend: the backend that serves it, or None when the requested one cannot run.
        unavailable: why each of the other backends cannot run; those that could are left out.
    """

    op: str
    device_type: str
    backend: str | None
    unavailable: dict[str, str]


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    requires: tuple[str, ...]


class _Request:
    """The backend that is asked for, one for the whole process."""

    name: str = os.environ.get("DRCNN_BACKEND", "").strip().lower() or "auto"


_implementations: dict[str, dict[str, _Implementation]] = {}
_resolved: dict[tuple[str, str, str], str] = {}


def _load_native_library() -> str | None:
    """Loads the operator library and returns why that failed, or None."""
    if importlib.util.find_spec("drcnn._C") is None:
        return (
            "drcnn._C was not built (at installation there was no C++ compiler or DRCNN_NATIVE=0, or "
            "this source tree was never installed); install a C++20 compiler and run `pip install -e .` again"
        )
    try:
        build = importlib.import_module("drcnn._C").build_info()
        torch.ops.load_library(build["library"])
    except (ImportError, OSError, KeyError) as error:
        cause = f"{error} ({error.__cause__})" if error.__cause__ else error
        return f"the native library does not load: {cause}; run `pip install -e .` again"
    return None


native_load_error: str | None = _load_native_library()
"""Why the native operator library is not loaded, or None when it is."""


def native_defines(*names: str) -> bool:
    """Tells whether the native library is loaded and defines these operators of ``torch.ops.drcnn``.

    A library that was built from older sources and lacks one is warned about: the reference takes its place.
    """
    if native_load_error is not None:
        return False
    missing = [name for name in names if not hasattr(torch.ops.drcnn, name)]
    if missing:
        warnings.warn(
            f"the native library was built from older sources and has no {', '.join(missing)}; "
            "run `pip install -e .` again",
            BackendWarning,
            stacklevel=2,
        )
    return not missing


def native_build_info() -> dict[str, Any] | None:
    """How the native library was built, or None when it is not loaded.

    Returns:
        A dict with ``library`` (path), ``compiler``, ``cxx_flags``, ``torch`` (built against), ``cuda``
        (toolkit version or empty) and ``architectures`` (such as ``["80-real", "90"]``), or None.
    """
    if native_load_error is not None:
        return None
    return dict(importlib.import_module("drcnn._C").build_info())


def register(op: str, backend: str, *, requires: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Registers the decorated function as ``backend``'s implementation of ``op``.

    Args:
        op: name of the operator, which is also the stem of its files.
        backend: ``"reference"``, ``"native"`` or ``"triton"``.
        requires: for ``native``, names in ``torch.ops.drcnn`` that must have a kernel for the device.

    Raises:
        ValueError: the backend is unknown or already has an implementation of ``op``.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")

    def decorate(function: _Function) -> _Function:
        table = _implementations.setdefault(op, {})
        if backend in table:
            raise ValueError(f"{op} already has a {backend} implementation")
        table[backend] = _Implementation(function, requires)
        _resolved.clear()
        return function

    return decorate


def implementation(op: str, device_type: str) -> Callable[..., Any]:
    """Returns the function that serves ``op`` on tensors of ``device_type`` under the current request.

    Raises:
        BackendError: the backend was asked for by name and cannot run; the message says why.
    """
    return _implementations[op][_resolve(op, device_type, _Request.name)].function


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects the backend of all operators within the ``with`` block, for the whole process.

    Args:
        name: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``. A backend that cannot run raises
            `BackendError` when an operator is called, not here.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {name!r}")
    before = _Request.name
    _Request.name = name
    try:
        yield
    finally:
        _Request.name = before


def requested_backend() -> str:
    """Returns the backend that is asked for now: ``auto`` or a name."""
    return _Request.name


def registered_operators() -> tuple[str, ...]:
    """Returns the names of all operators that have an implementation."""
    return tuple(sorted(_implementations))


def backend_status() -> list[Choice]:
    """Returns the backend of every operator on every device type, and why others cannot serve it."""
    importlib.import_module("drcnn.ops")
    return [_choose(op, device, _Request.name) for op in registered_operators() for device in DEVICE_TYPES]


# Decided once per key, so that the warning comes once and a call costs a look-up. torch.compile calls this
# while it traces and folds the string into the graph: the answer depends on the arguments and on what is
# installed, and neither changes within a process.
@torch.compiler.assume_constant_result
def _resolve(op: str, device_type: str, requested: str) -> str:
    key = (op, device_type, requested)
    if key not in _resolved:
        _resolved[key] = _decide(op, device_type, requested)
    return _resolved[key]


def _decide(op: str, device_type: str, requested: str) -> str:
    choice = _choose(op, device_type, requested)
    if choice.backend is None:
        if requested in BACKENDS:
            reason = choice.unavailable[requested]
        else:
            reason = f"DRCNN_BACKEND must be one of auto, {', '.join(BACKENDS)}"
        raise BackendError(f"backend {requested!r} cannot run {op} on {device_type}: {reason}")
    if requested == "auto" and device_type == "cuda" and choice.backend != "native":
        causes = "; ".join(f"{name}: {why}" for name, why in choice.unavailable.items())
        warnings.warn(f"{op} runs on CUDA with the {choice.backend} backend ({causes})", BackendWarning, 5)
    return choice.backend


def _choose(op: str, device_type: str, requested: str) -> Choice:
    reasons = {name: _why_not(op, name, device_type) for name in BACKENDS}
    unavailable = {name: why for name, why in reasons.items() if why is not None}
    if requested == "auto":
        # Triton on a CPU is an interpreter for tests, never a choice of auto.
        order = ("native", "triton", "reference") if device_type == "cuda" else ("native", "reference")
        backend = next((name for name in order if reasons[name] is None), None)
    else:
        backend = requested if requested in BACKENDS and reasons[requested] is None else None
    return Choice(op, device_type, backend, unavailable)


def _why_not(op: str, backend: str, device_type: str) -> str | None:
    """Returns why ``backend`` cannot run ``op`` on ``device_type``, or None when it can."""
    table = _implementations.get(op)
    if table is None:
        raise ValueError(f"no operator is called {op!r}; there are {', '.join(registered_operators())}")
    if backend not in table:
        return f"it has no {backend} kernel, only {', '.join(name for name in BACKENDS if name in table)}"
    if backend == "native":
        return _why_not_native(table[backend].requires, device_type)
    if backend == "triton":
        return _why_not_triton(op, device_type)
    return None


def _why_not_native(requires: tuple[str, ...], device_type: str) -> str | None:
    if native_load_error is not None:
        return native_load_error
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return f"there are native kernels for cpu and cuda, not for {device_type}"
    build = native_build_info() or {}
    if key == "CUDA" and not build["cuda"]:
        return (
            "drcnn._C was built without CUDA; install a CUDA toolkit, point CUDA_HOME to it and run "
            "`DRCNN_CUDA=1 pip install -e .`"
        )
    for name in requires:
        if not hasattr(torch.ops.drcnn, name):
            return f"{build['library']} was built from older sources; run `pip install -e .` again"
        if not _has_kernel(f"drcnn::{name}", key):
            return f"drcnn::{name} has no {key} kernel in {build['library']}"
    return _why_no_image(build["architectures"]) if key == "CUDA" else None


def _has_kernel(qualified_name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, key)


def _why_no_image(architectures: list[str]) -> str | None:
    """Returns why the CUDA code cannot run on a visible GPU, or None; no GPU is no objection."""
    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not any(runs_on(architecture, major, minor) for architecture in architectures):
            return (
                f"drcnn._C holds code for {', '.join(architectures)}, not for cuda:{index} of compute "
                f"capability {major}.{minor}; set TORCH_CUDA_ARCH_LIST={major}.{minor} and install again"
            )
    return None


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for a CMake architecture such as ``"86-real"`` runs on compute capability major.minor.

    Machine code runs on the same major and the same or a later minor, PTX on anything later, and an
    architecture with a letter (``90a``) on exactly that one.
    """
    number, _, kind = architecture.partition("-")
    digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
    built = divmod(int(digits), 10)
    if digits != number:
        return built == (major, minor) if number.endswith("a") else built[0] == major and built[1] <= minor
    as_machine_code = kind != "virtual" and built[0] == major and built[1] <= minor
    as_ptx = kind != "real" and built <= (major, minor)
    return as_machine_code or as_ptx


def _why_not_triton(op: str, device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; run `pip install triton`"
    if importlib.util.find_spec(f"drcnn.kernels.{op}") is None:
        return f"drcnn.kernels.{op} is missing; run `pip install -e .` again"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs on a CPU only in its interpreter; start Python with TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return f"Triton kernels run on cuda, not on {device_type}"
    return None
