"""Drives the native build; CMakeLists.txt describes it and pyproject.toml holds everything else.

Environment variables: ``DRCNN_NATIVE=0`` installs the Python part alone, ``DRCNN_CUDA=0|1`` forbids or
requires CUDA, ``TORCH_CUDA_ARCH_LIST`` chooses the GPUs, ``CXX`` the compiler, ``MAX_JOBS`` how many jobs.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import drcnn_build  # noqa: E402
import drcnn_kept  # noqa: E402
import drcnn_toolchain  # noqa: E402


def say(message: str) -> None:
    """Prints a line where ``pip install -v`` and a failing build show it."""
    print(f"drcnn: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Ends the build with a cause."""
    raise SystemExit(f"drcnn: {message}")


def tool(name: str) -> str:
    """Returns the path of cmake or ninja, that of the build environment before that of the machine."""
    try:
        package = importlib.import_module(name)
        folder = getattr(package, "CMAKE_BIN_DIR", None) or package.BIN_DIR
        found = shutil.which(name, path=folder)
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        fail(f"{name} is missing; run `pip install {name}`, or build without --no-build-isolation")
    return found


class BuildNative(build_ext):
    """Builds both extensions with one run of CMake."""

    def build_extensions(self) -> None:
        """Configures and builds; a failure ends the installation."""
        torch = drcnn_build.find_torch()
        if torch is None:
            fail("building native code needs torch >= 2.10; run `pip install torch`, or set DRCNN_NATIVE=0")
        try:
            import pybind11
        except ImportError:
            fail("pybind11 is missing; run `pip install pybind11`, or build without --no-build-isolation")
        output = Path(self.get_ext_fullpath("drcnn._C")).resolve()
        suffix = output.name[len("_C") :]
        choices = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "DRCNN_EXT_SUFFIX": suffix,
            "DRCNN_TORCH_VERSION": torch.version,
            **cuda_definitions(torch),
        }
        say(f"building against torch {torch.version} in {torch.root}")
        versions = {"pybind11": pybind11.__version__, "python": sys.version}
        compilers = [drcnn_toolchain.find_compiler()]
        if "CMAKE_CUDA_COMPILER" in choices:
            compilers.append(choices["CMAKE_CUDA_COMPILER"])
        kept = ROOT / "build" / "kept" / drcnn_kept.fingerprint(ROOT, choices | versions, compilers)
        files = [f"{name}{suffix}" for name in ("_C", "_native")]
        if drcnn_kept.restore(kept, files, output.parent):
            say(f"nothing has changed since this was compiled: taken from {kept}")
            return
        definitions = choices | {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DRCNN_OUTPUT_DIR": output.parent,
            "DRCNN_TORCH_INCLUDE_DIRS": ";".join(map(str, torch.include_dirs)),
            "DRCNN_TORCH_LIBRARY_DIRS": ";".join(map(str, torch.library_dirs)),
        }
        folder = Path(self.build_temp).resolve() / "cmake"
        cmake = tool("cmake")
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        run([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *flags])
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run([cmake, "--build", folder, *jobs])
        drcnn_kept.keep(kept, files, output.parent)


def cuda_definitions(torch: drcnn_build.Torch) -> dict[str, object]:
    """Returns CMake's definitions for CUDA, or those that say why it is left out."""
    try:
        toolkit, note = drcnn_toolchain.find_toolkit(torch.cuda)
        if toolkit is None:
            say(f"building without CUDA ({note})")
            return {"DRCNN_CUDA": "OFF", "DRCNN_CUDA_NOTE": note}
        architectures = drcnn_toolchain.choose_architectures(toolkit)
    except drcnn_toolchain.ToolchainError as error:
        fail(str(error))
    version = ".".join(map(str, toolkit.version))
    say(f"building with CUDA {version} of {toolkit.root} for {', '.join(architectures)}")
    return {
        "DRCNN_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": toolkit.root / "bin" / "nvcc",
        "CUDAToolkit_ROOT": toolkit.root,
        "CMAKE_CUDA_ARCHITECTURES": ";".join(architectures),
    }


def run(command: list[object]) -> None:
    """Runs a step of the build and ends the installation when it fails."""
    line = [str(part) for part in command]
    if subprocess.run(line, check=False).returncode != 0:
        fail(
            f"the native build failed in `{' '.join(line[:3])} ...`; its messages are above. "
            "Set DRCNN_CUDA=0 to build without CUDA, or DRCNN_NATIVE=0 to install the Python part alone."
        )


def extensions() -> list[Extension]:
    """Returns what is to be built; nothing, and says so, without a compiler."""
    if drcnn_build.wants_native():
        # CMakeLists.txt knows the sources; setuptools only copies the two files where they belong.
        return [Extension("drcnn._C", []), Extension("drcnn._native", [])]
    off = os.environ.get("DRCNN_NATIVE", "1") == "0"
    reason = "DRCNN_NATIVE=0" if off else "no C++ compiler was found (CXX, c++, g++, clang++)"
    say(
        f"installing the Python part alone: {reason}. Operators run on PyTorch; see `python -m drcnn.doctor`."
    )
    return []


setup(
    packages=[*find_packages(include=["drcnn", "drcnn.*"]), "drcnn.kernels"],
    package_dir={"drcnn.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
