"""``python -m drcnn.doctor``: what is installed, what was built, which backend serves each operator and why.

Exit code 0: everything that this machine can use is there. Exit code 1: something is missing or broken; the
last section says what to do about it.
"""

import argparse
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from drcnn.command import command
from drcnn.ops import backend_status
from drcnn.ops.backend import Choice, native_build_info, native_load_error, requested_backend

_PACKAGES = ("numpy", "pillow", "tyro", "rich", "faster-coco-eval", "safetensors", "triton")


def version_rows() -> list[tuple[str, str]]:
    """Returns names and versions of what drcnn runs on."""
    rows = [
        ("drcnn", _version("drcnn") or "not installed: imported from its source tree"),
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"),
        ("torch", torch.__version__),
        ("torchvision", _version("torchvision") or "missing"),
        ("CUDA of torch", torch.version.cuda or "none: a CPU build"),
    ]
    return rows + device_rows() + [(name, _version(name) or "missing") for name in _PACKAGES]


def device_rows() -> list[tuple[str, str]]:
    """Returns a row for each GPU that torch sees, or one that says why it sees none."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [("GPU", "none: torch is a CPU build")]
        driver = (
            "no driver (nvidia-smi) is there" if shutil.which("nvidia-smi") is None else "a driver is there"
        )
        return [("GPU", f"none that torch can use; {driver}")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        rows.append(
            (f"cuda:{index}", f"{properties.name}, {memory:.0f} GiB, compute capability {capability}")
        )
    return rows


def build_rows() -> list[tuple[str, str]]:
    """Returns how the native library was built, or why there is none."""
    build = native_build_info()
    if build is None:
        return [("native library", f"not loaded: {native_load_error}")]
    cuda = f"{build['cuda']} for {', '.join(build['architectures'])}" if build["cuda"] else "no"
    rows = [
        ("native library", build["library"]),
        ("compiler", build["compiler"]),
        ("torch when built", build["torch"]),
        ("CUDA kernels", cuda),
    ]
    return rows + ([("why no CUDA", build["cuda_note"])] if build["cuda_note"] else [])


def advice(status: Sequence[Choice]) -> list[str]:
    """Returns what to do about each lack, one line each; nothing when all is well."""
    lines = []
    build = native_build_info()
    if native_load_error is not None:
        lines.append(f"The C++ kernels are not used: {native_load_error}.")
    elif not build["cuda"] and torch.version.cuda is not None and torch.cuda.is_available():
        lines.append(
            f"There is a GPU, and the CUDA kernels were not built ({build['cuda_note']}): install a CUDA "
            "toolkit, point CUDA_HOME to it and run `DRCNN_CUDA=1 pip install -e .`."
        )
    if shutil.which("nvidia-smi") is not None and not torch.cuda.is_available():
        lines.append(
            "There is an NVIDIA driver, but torch is a CPU build: install a CUDA build from https://pytorch.org."
            if torch.version.cuda is None
            else f"There is an NVIDIA driver, but torch cannot use it: update the driver to one for CUDA "
            f"{torch.version.cuda}, and see what CUDA_VISIBLE_DEVICES says."
        )
    for package in ("torchvision", *(name for name in _PACKAGES if name != "triton")):
        if _version(package) is None:
            lines.append(f"{package} is missing: run `pip install {package}`.")
    for choice in status:
        usable = choice.device_type == "cpu" or torch.cuda.is_available()
        if choice.backend is None and usable:
            why = choice.unavailable.get(requested_backend(), "DRCNN_BACKEND names no backend")
            lines.append(f"{choice.op} cannot run on {choice.device_type}: {why}.")
    return lines


def operator_table(status: Sequence[Choice]) -> Table:
    """Returns a table of the backend of each operator on each device type and why not the others."""
    table = Table(title=f"Operators (DRCNN_BACKEND={requested_backend()})", title_justify="left")
    for column in ("operator", "device", "backend", "others"):
        table.add_column(column, overflow="fold")
    for choice in status:
        device = choice.device_type
        if device == "cuda" and not torch.cuda.is_available():
            device = "cuda (no GPU here)"
        others = "; ".join(f"{name}: {why}" for name, why in choice.unavailable.items())
        table.add_row(choice.op, device, choice.backend or "none", others)
    return table


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _section(title: str, rows: Sequence[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


@command
def main(argv: list[str]) -> int:
    """Prints the report and returns 0 when nothing is missing, else 1."""
    parser = argparse.ArgumentParser(
        prog="drcnn doctor",
        description="Says what is installed, what was built, which backend serves each operator and why, and "
        "what to do about each lack. Exit code 1 when something is missing.",
    )
    parser.parse_args(argv)
    status = backend_status()
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_section("Versions", version_rows()))
    console.print(_section("Native build", build_rows()))
    console.print(operator_table(status))
    lines = advice(status)
    console.print("What to do" if lines else "Nothing is missing.")
    for line in lines:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
