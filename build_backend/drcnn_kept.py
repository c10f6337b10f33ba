"""Keeps what was compiled: installing the same source again with the same tools compiles nothing."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

_VARIABLES = (
    *("CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH"),
    *("CUDAFLAGS", "CUDAHOSTCXX", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)
"""What compilers and CMake read from the environment."""


def fingerprint(
    root: Path,
    settings: Mapping[str, object],
    compilers: Iterable[str | Path],
    environ: Mapping[str, str] = os.environ,
) -> str:
    """Names what decides about the result of a build.

    Args:
        root: folder of ``setup.py``, ``CMakeLists.txt`` and ``csrc``.
        settings: versions and choices, without paths, which change from one build environment to the next.
        compilers: programs whose versions count.
        environ: where compilers look for more.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in (root / "setup.py", root / "CMakeLists.txt", *sorted((root / "csrc").iterdir())):
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    for compiler in compilers:
        digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    digest.update(json.dumps({name: environ.get(name, "") for name in _VARIABLES}).encode())
    return digest.hexdigest()[:16]


def restore(folder: Path, names: Iterable[str], destination: Path) -> bool:
    """Copies the files kept in ``folder`` to ``destination``; tells whether all of them were there."""
    files = [folder / name for name in names]
    if not all(file.is_file() for file in files):
        return False
    destination.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copy2(file, destination)
    return True


def keep(folder: Path, names: Iterable[str], source: Path) -> None:
    """Keeps files of ``source`` in ``folder``, and nothing of earlier builds beside it.

    Where that cannot be, as while another build does the same, the next installation compiles again.
    """
    shutil.rmtree(folder.parent, ignore_errors=True)
    unfinished = folder.with_suffix(".part")
    with contextlib.suppress(OSError):
        unfinished.mkdir(parents=True)
        for name in names:
            shutil.copy2(source / name, unfinished)
        unfinished.rename(folder)
