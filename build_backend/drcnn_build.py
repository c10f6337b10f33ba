"""PEP 517 build backend of drcnn: setuptools, plus build requirements that depend on the machine.

Under build isolation, pip runs this in an environment of its own but with the Python of the target
environment. If that one already has a torch that is new enough, drcnn is built against it and no second
torch is downloaded; otherwise torch becomes a build requirement. Without a C++ compiler, or with
``DRCNN_NATIVE=0``, nothing native is built and torch is not needed to build.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import drcnn_toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change

OLDEST_TORCH = (2, 10)
NATIVE_REQUIREMENTS = ("cmake>=3.26", "ninja", "pybind11>=2.13")

# Reads torch/version.py without importing torch, which takes seconds and fails without its libraries.
_PROBE = """
import importlib.util, json, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin is not None:
    root = pathlib.Path(spec.origin).parent
    version = runpy.run_path(str(root / "version.py"))
    found = {"version": str(version["__version__"]), "cuda": version.get("cuda"), "root": str(root)}
    print(json.dumps(found))
"""


@dataclass(frozen=True)
class Torch:
    """A torch installation to build against.

    Attributes:
        version: such as ``"2.13.0+cpu"``.
        cuda: version of CUDA it was built with, or None for a CPU build.
        root: folder of the package.
    """

    version: str
    cuda: str | None
    root: Path

    @property
    def include_dirs(self) -> list[Path]:
        """Folders with its headers, as ``torch.utils.cpp_extension.include_paths`` gives them."""
        return [self.root / "include", self.root / "include" / "torch" / "csrc" / "api" / "include"]

    @property
    def library_dirs(self) -> list[Path]:
        """Folders with its libraries, as ``torch.utils.cpp_extension.library_paths`` gives them."""
        return [self.root / "lib"]


def is_new_enough(version: str) -> bool:
    """Whether a torch version such as ``"2.13.0+cu130"`` is at least `OLDEST_TORCH`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST_TORCH


def probe_torch(flags: tuple[str, ...]) -> Torch | None:
    """Returns the torch that ``sys.executable`` started with ``flags`` would import, if it is new enough."""
    command = [sys.executable, *flags, "-c", _PROBE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not result.stdout.strip():
        return None
    found = json.loads(result.stdout)
    if not is_new_enough(found["version"]):
        return None
    return Torch(found["version"], found["cuda"], Path(found["root"]))


def find_torch() -> Torch | None:
    """Returns the torch of the target environment, else of the build environment, else None."""
    return probe_torch(("-I",)) or probe_torch(())


def wants_native() -> bool:
    """Whether native code is to be built: not switched off, and there is a C++ compiler."""
    return os.environ.get("DRCNN_NATIVE", "1") != "0" and drcnn_toolchain.find_compiler() is not None


def native_requirements() -> list[str]:
    """Returns what the build environment needs beyond setuptools."""
    if not wants_native():
        return []
    torch = [] if probe_torch(("-I",)) else [f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"]
    return [*NATIVE_REQUIREMENTS, *torch]


def get_requires_for_build_wheel(config_settings=None):
    """PEP 517 hook."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_requirements()]


def get_requires_for_build_editable(config_settings=None):
    """PEP 660 hook."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_requirements()]
