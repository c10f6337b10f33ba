"""Finds the C++ compiler and the CUDA toolkit, and decides for which GPUs to compile."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_CUDA = (12, 0)
"""The first toolkit whose nvcc knows C++20."""

DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0+PTX")
"""Compiled for when neither TORCH_CUDA_ARCH_LIST nor a GPU says better."""

_NAMED = {
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


class ToolchainError(Exception):
    """Something that was asked for by an environment variable is not there or does not work."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that has what a build needs.

    Attributes:
        root: its folder, the parent of ``bin/nvcc``.
        version: such as (13, 0).
        architectures: compute capabilities that it compiles for, such as ``{"8.0", "9.0"}``.
    """

    root: Path
    version: tuple[int, int]
    architectures: frozenset[str]


def find_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the path of the C++ compiler that CMake will take (``CXX``, else the usual names), or None."""
    if environ.get("CXX"):
        return shutil.which(environ["CXX"].split()[0], path=environ.get("PATH"))
    found = (shutil.which(name, path=environ.get("PATH")) for name in ("c++", "g++", "clang++"))
    return next((path for path in found if path), None)


def candidate_roots(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Returns the folders that may be a CUDA toolkit, the most explicit first."""
    roots = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc:
        # nvcc on PATH can be a link or a script that starts the real one: ask it where it stands.
        roots += [Path(nvcc).resolve().parent.parent, *_top_of(nvcc)]
    roots.append(Path("/usr/local/cuda"))
    roots += sorted(Path("/usr/local").glob("cuda-*"), key=_version_in_name, reverse=True)
    return list(dict.fromkeys(root.resolve() for root in roots))


def inspect_toolkit(root: Path) -> Toolkit | str:
    """Returns the toolkit in ``root``, or what is wrong with that folder."""
    nvcc = root / "bin" / "nvcc"
    if not os.access(nvcc, os.X_OK):
        return f"{root} has no bin/nvcc"
    targets = [root, *sorted(root.glob("targets/*"))]
    if not any((target / "include" / "cuda_runtime.h").is_file() for target in targets):
        return f"{root} has no include/cuda_runtime.h"
    folders = [target / name for target in targets for name in ("lib64", "lib")]
    if not any((folder / "libcudart_static.a").is_file() for folder in folders):
        return f"{root} has no libcudart_static.a"
    match = re.search(r"release (\d+)\.(\d+)", _output_of([nvcc, "--version"]))
    if match is None:
        return f"{nvcc} --version does not name a release"
    version = (int(match[1]), int(match[2]))
    if version < OLDEST_CUDA:
        return f"{root} is CUDA {version[0]}.{version[1]}, and C++20 needs {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}"
    numbers = re.findall(r"compute_(\d+)\b", _output_of([nvcc, "--list-gpu-arch"]))
    return Toolkit(root, version, frozenset(f"{int(number) // 10}.{int(number) % 10}" for number in numbers))


def find_toolkit(
    torch_cuda: str | None, environ: Mapping[str, str] = os.environ
) -> tuple[Toolkit | None, str]:
    """Returns the CUDA toolkit to build with, or None and why there is none.

    Args:
        torch_cuda: CUDA version that torch was built with, None for a CPU build.
        environ: ``DRCNN_CUDA=0`` forbids CUDA, ``DRCNN_CUDA=1`` requires it.

    Raises:
        ToolchainError: ``DRCNN_CUDA=1`` and there is no working toolkit, or torch is a CPU build.
    """
    wish = environ.get("DRCNN_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ToolchainError(f"DRCNN_CUDA must be 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "DRCNN_CUDA=0"
    toolkit, note = None, "torch is a CPU build; install one built with CUDA"
    if torch_cuda is not None:
        inspected = [inspect_toolkit(root) for root in candidate_roots(environ)]
        toolkit = next((found for found in inspected if isinstance(found, Toolkit)), None)
        note = "no CUDA toolkit: " + "; ".join(reason for reason in inspected if isinstance(reason, str))
    if toolkit is None and wish == "1":
        raise ToolchainError(f"DRCNN_CUDA=1, but {note}")
    return toolkit, "" if toolkit else note


def choose_architectures(toolkit: Toolkit, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the value of CMAKE_CUDA_ARCHITECTURES as a list, such as ``["80-real", "90"]``.

    ``TORCH_CUDA_ARCH_LIST`` decides, else the GPUs of this machine, else `DEFAULT_ARCHITECTURES`.

    Raises:
        ToolchainError: TORCH_CUDA_ARCH_LIST cannot be read, or names what the toolkit does not know.
    """
    if environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        wanted = parse_architectures(environ["TORCH_CUDA_ARCH_LIST"])
        unknown = [name for name in wanted if _plain(name) not in toolkit.architectures]
        if unknown:
            known = ", ".join(sorted(toolkit.architectures, key=_as_numbers))
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST asks for {', '.join(unknown)}, and CUDA {toolkit.version[0]}."
                f"{toolkit.version[1]} compiles for {known}"
            )
    else:
        wanted = architectures_for(visible_capabilities(), toolkit.architectures)
    return [_for_cmake(name) for name in wanted]


def parse_architectures(text: str) -> list[str]:
    """Splits a value of TORCH_CUDA_ARCH_LIST such as ``"8.0;8.6+PTX 9.0a"`` or ``"Hopper"`` in its entries.

    Raises:
        ToolchainError: an entry is no compute capability and no known name.
    """
    entries: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        name, plus, rest = entry.partition("+")
        if name in _NAMED:
            entries += _NAMED[name].split(";")
        elif re.fullmatch(r"\d+\.\d[a-z]?", name) and (not plus or rest == "PTX"):
            entries.append(entry)
        else:
            names = ", ".join(_NAMED)
            raise ToolchainError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; write compute capabilities such as 8.0;9.0+PTX, "
                f"or {names}"
            )
    return list(dict.fromkeys(entries))


def architectures_for(capabilities: Iterable[str], supported: Iterable[str]) -> list[str]:
    """Returns entries for GPUs of these compute capabilities, or the defaults, within what is supported.

    A GPU newer than the toolkit gets the PTX of the newest one that the toolkit knows.
    """
    known = sorted(supported, key=_as_numbers)
    wanted = []
    for capability in sorted(set(capabilities), key=_as_numbers):
        older = [name for name in known if _as_numbers(name) <= _as_numbers(capability)]
        if older:
            wanted.append(older[-1])
    if not wanted:
        wanted = [_plain(name) for name in DEFAULT_ARCHITECTURES if _plain(name) in known] or known[-1:]
    wanted = list(dict.fromkeys(wanted))
    return [*wanted[:-1], f"{wanted[-1]}+PTX"]


def visible_capabilities() -> list[str]:
    """Returns the compute capabilities of this machine's GPUs, as nvidia-smi gives them."""
    if shutil.which("nvidia-smi") is None:
        return []
    lines = _output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]).splitlines()
    return [line.strip() for line in lines if re.fullmatch(r"\d+\.\d", line.strip())]


def _for_cmake(entry: str) -> str:
    name, _, ptx = entry.partition("+")
    number = name.replace(".", "")
    return number if ptx else f"{number}-real"


def _plain(entry: str) -> str:
    return entry.partition("+")[0].rstrip("abcdefghijklmnopqrstuvwxyz")


def _as_numbers(name: str) -> tuple[int, int]:
    major, _, minor = _plain(name).partition(".")
    return int(major), int(minor)


def _version_in_name(path: Path) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path.name))


def _top_of(nvcc: str) -> list[Path]:
    match = re.search(r"^#\$ TOP=(.+)$", _output_of([nvcc, "--dryrun", "-x", "cu", os.devnull]), re.MULTILINE)
    return [Path(match[1].strip())] if match else []


def _output_of(command: list[str | Path]) -> str:
    """Returns what a command prints on both streams; empty when it cannot be started."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout + result.stderr
