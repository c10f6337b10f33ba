"""The build backend: which compiler, CUDA toolkit, GPUs and build requirements."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

import drcnn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def toolchain():
    return _load("drcnn_toolchain")


@pytest.fixture(scope="module")
def build(toolchain):
    return _load("drcnn_build")


def _load(name):
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    sys.path.insert(0, str(ROOT / "build_backend"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "build_backend"))


def _script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def _toolkit(root, release="13.0", library="lib64"):
    """A folder that looks like a CUDA toolkit; its nvcc answers as the real one does."""
    _script(
        root / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        "--list-gpu-arch) echo compute_80; echo compute_90; echo compute_103;;\n"
        f"--dryrun) echo '#$ TOP={root}/bin/..' >&2;; esac\n",
    )
    (root / "include").mkdir(parents=True, exist_ok=True)
    (root / "include" / "cuda_runtime.h").touch()
    (root / library).mkdir(parents=True, exist_ok=True)
    (root / library / "libcudart_static.a").touch()
    return root


@pytest.mark.parametrize("library", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_working_toolkit(toolchain, tmp_path, library):
    toolkit = toolchain.inspect_toolkit(_toolkit(tmp_path / "cuda", library=library))
    assert toolkit.version == (13, 0)
    assert toolkit.architectures == {"8.0", "9.0", "10.3"}


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("bin/nvcc", "has no bin/nvcc"),
        ("include/cuda_runtime.h", r"has no include/cuda_runtime\.h"),
        ("lib64/libcudart_static.a", r"has no libcudart_static\.a"),
    ],
)
def test_incomplete_toolkit_says_what_is_missing(toolchain, tmp_path, missing, reason):
    root = _toolkit(tmp_path / "cuda")
    (root / missing).unlink()
    assert re.search(reason, toolchain.inspect_toolkit(root))


def test_old_toolkit_is_refused(toolchain, tmp_path):
    assert "C++20 needs 12.0" in toolchain.inspect_toolkit(_toolkit(tmp_path / "cuda", release="11.8"))


def test_nvcc_that_is_a_wrapper_script_leads_to_its_toolkit(toolchain, tmp_path):
    real = _toolkit(tmp_path / "real")
    _script(tmp_path / "path" / "nvcc", f'exec {real}/bin/nvcc "$@"\n')
    environ = {"PATH": f"{tmp_path / 'path'}:/usr/bin:/bin"}
    assert real.resolve() in toolchain.candidate_roots(environ)
    toolkit, note = toolchain.find_toolkit("13.0", environ)
    assert toolkit.root == real.resolve() and note == ""


def test_cuda_home_comes_first(toolchain, tmp_path):
    home = _toolkit(tmp_path / "home")
    other = _toolkit(tmp_path / "other")
    environ = {"CUDA_HOME": str(home), "PATH": f"{other}/bin:/usr/bin:/bin"}
    assert toolchain.find_toolkit("13.0", environ)[0].root == home.resolve()


def test_cuda_switch(toolchain, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "candidate_roots", lambda environ: [tmp_path])
    assert toolchain.find_toolkit("13.0", {"DRCNN_CUDA": "0"}) == (None, "DRCNN_CUDA=0")
    toolkit, note = toolchain.find_toolkit("13.0", {})
    assert toolkit is None and "has no bin/nvcc" in note
    toolkit, note = toolchain.find_toolkit(None, {})
    assert toolkit is None and "torch is a CPU build" in note
    with pytest.raises(toolchain.ToolchainError, match="DRCNN_CUDA=1, but no CUDA toolkit"):
        toolchain.find_toolkit("13.0", {"DRCNN_CUDA": "1"})
    with pytest.raises(toolchain.ToolchainError, match="DRCNN_CUDA=1, but torch is a CPU build"):
        toolchain.find_toolkit(None, {"DRCNN_CUDA": "1"})
    with pytest.raises(toolchain.ToolchainError, match="must be 0 or 1"):
        toolchain.find_toolkit("13.0", {"DRCNN_CUDA": "yes"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ["8.0"]),
        ("8.0;8.6+PTX", ["8.0", "8.6+PTX"]),
        ("8.0 9.0a", ["8.0", "9.0a"]),
        ("8.0, 9.0 , 8.0", ["8.0", "9.0"]),
        ("Hopper", ["9.0+PTX"]),
        ("Ampere;9.0", ["8.0", "8.6+PTX", "9.0"]),
    ],
)
def test_arch_list(toolchain, text, expected):
    assert toolchain.parse_architectures(text) == expected


@pytest.mark.parametrize("text", ["80", "8", "8.0+SASS", "sm_80", "Voodoo"])
def test_arch_list_that_cannot_be_read(toolchain, text):
    with pytest.raises(toolchain.ToolchainError, match="write compute capabilities such as"):
        toolchain.parse_architectures(text)


def test_architectures_for_cmake(toolchain, tmp_path, monkeypatch):
    toolkit = toolchain.Toolkit(tmp_path, (13, 0), frozenset({"8.0", "8.6", "8.9", "9.0", "10.0"}))
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: ["8.6"])
    choose = toolchain.choose_architectures
    assert choose(toolkit, {"TORCH_CUDA_ARCH_LIST": "8.0;9.0a;8.9+PTX"}) == ["80-real", "90a-real", "89"]
    assert choose(toolkit, {}) == ["86"]
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: [])
    assert choose(toolkit, {"TORCH_CUDA_ARCH_LIST": " "}) == ["80-real", "86-real", "89-real", "90"]
    with pytest.raises(
        toolchain.ToolchainError, match=r"asks for 7\.0, and CUDA 13\.0 compiles for 8\.0, 8\.6"
    ):
        choose(toolkit, {"TORCH_CUDA_ARCH_LIST": "7.0"})


@pytest.mark.parametrize(
    ("capabilities", "supported", "expected"),
    [
        (["8.6", "8.6"], ["8.0", "8.6", "9.0"], ["8.6+PTX"]),
        (["9.0", "8.0"], ["8.0", "9.0"], ["8.0", "9.0+PTX"]),
        (["12.0"], ["8.0", "9.0"], ["9.0+PTX"]),  # newer than the toolkit
        (["7.0"], ["8.0", "9.0"], ["8.0", "9.0+PTX"]),  # older than the toolkit: the defaults
        ([], ["8.0", "8.6"], ["8.0", "8.6+PTX"]),
    ],
)
def test_architectures_of_visible_devices(toolchain, capabilities, supported, expected):
    assert toolchain.architectures_for(capabilities, supported) == expected


def test_compiler(toolchain, tmp_path):
    compiler = _script(tmp_path / "g++", "")
    assert toolchain.find_compiler({"PATH": str(tmp_path)}) == str(compiler)
    assert toolchain.find_compiler({"PATH": str(tmp_path / "none")}) is None
    assert toolchain.find_compiler({"PATH": str(tmp_path), "CXX": "/nonexistent"}) is None
    assert toolchain.find_compiler({"PATH": "", "CXX": f"{compiler} -m64"}) == str(compiler)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.9.1", False),
        ("2.10.0", True),
        ("2.13.0+cpu", True),
        ("3.0.0a0+git", True),
        ("1.13", False),
        ("x", False),
    ],
)
def test_which_torch_is_new_enough(build, version, expected):
    assert build.is_new_enough(version) is expected


def test_build_requirements(build, monkeypatch, tmp_path):
    native = list(build.NATIVE_REQUIREMENTS)
    monkeypatch.setattr(build.drcnn_toolchain, "find_compiler", lambda: "/usr/bin/c++")
    monkeypatch.setattr(build, "probe_torch", lambda flags: build.Torch("2.12.0", None, tmp_path))
    assert build.native_requirements() == native
    monkeypatch.setattr(build, "probe_torch", lambda flags: None)
    assert build.native_requirements() == [*native, "torch>=2.10"]
    monkeypatch.setenv("DRCNN_NATIVE", "0")
    assert build.native_requirements() == []
    monkeypatch.delenv("DRCNN_NATIVE")
    monkeypatch.setattr(build.drcnn_toolchain, "find_compiler", lambda: None)
    assert build.native_requirements() == []


def _fake_torch(folder, version):
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / "version.py").write_text(f"__version__ = {version!r}\ncuda = '13.0'\n")
    return package


def test_probing_does_not_import_torch(build, monkeypatch, tmp_path):
    package = _fake_torch(tmp_path, "2.11.0+cu130")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    torch = build.probe_torch(())
    assert (torch.version, torch.cuda, torch.root) == ("2.11.0+cu130", "13.0", package)
    assert torch.include_dirs[0] == package / "include" and torch.library_dirs == [package / "lib"]


def test_isolated_probe_ignores_the_build_environment(build, monkeypatch, tmp_path):
    _fake_torch(tmp_path, "2.99.0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    isolated = build.probe_torch(("-I",))
    assert isolated is None or isolated.version != "2.99.0"


def test_old_torch_is_not_built_against(build, monkeypatch, tmp_path):
    _fake_torch(tmp_path, "2.9.1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert build.probe_torch(()) is None


def test_sources_are_listed_in_one_place():
    setup = (ROOT / "setup.py").read_text()
    assert ".cu" not in setup.replace(".cuda", "") and ".cpp" not in setup


def test_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == drcnn.__version__
    assert f"[{drcnn.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_every_operator_has_its_files():
    """One op, one stem: a kernel file without the operator's own file, or without tests, is an orphan.

    A backward that is too long for the operator's file has its own, OP_backward.
    """
    kernels = [path for pattern in ("csrc/*.cu", "kernels/*.py") for path in ROOT.glob(pattern)]
    stems = {path.stem.removesuffix("_backward") for path in kernels} - {"__init__"}
    for stem in sorted(stems):
        for path in (
            f"drcnn/ops/{stem}.py",
            f"csrc/{stem}.h",
            f"tests/ops/test_{stem}.py",
            f"bench/bench_{stem}.py",
        ):
            assert (ROOT / path).is_file(), f"{path} is missing"
    assert "smooth_l1" in stems


def test_architectures_of_a_real_toolkit(toolchain):
    roots = [toolchain.inspect_toolkit(root) for root in toolchain.candidate_roots(os.environ)]
    toolkit = next((found for found in roots if isinstance(found, toolchain.Toolkit)), None)
    if toolkit is None:
        pytest.skip("no CUDA toolkit on this machine")
    assert "9.0" in toolkit.architectures


@pytest.fixture
def source(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "CMakeLists.txt").write_text("project(x)")
    (tmp_path / "setup.py").write_text("setup()")
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    return tmp_path


def test_a_fingerprint_follows_all_that_decides_about_a_build(source):
    kept = _load("drcnn_kept")
    compiler = _script(source / "bin" / "c++", "echo 1.0")
    settings = {"torch": "2.10", "cuda": None}

    def name(settings=settings, environ={}):  # noqa: B006
        return kept.fingerprint(source, settings, [compiler], environ)

    seen = [name(), name(settings | {"torch": "2.11"}), name(environ={"CXXFLAGS": "-O0"})]
    assert name(environ={"HOME": "/"}) == seen[0]
    for file, text in (
        ("setup.py", ""),
        ("CMakeLists.txt", "project(y)"),
        ("csrc/a.cpp", "int b;"),
        ("csrc/b.h", ""),
    ):
        (source / file).write_text(text)
        seen.append(name())
    _script(compiler, "echo 1.1")
    seen.append(name())
    assert len(set(seen)) == len(seen)


def test_what_was_compiled_is_kept_until_the_next_build(tmp_path):
    kept = _load("drcnn_kept")
    built, first, second = tmp_path / "built", tmp_path / "kept" / "1", tmp_path / "kept" / "2"
    built.mkdir()
    (built / "a.so").write_text("a")
    assert not kept.restore(first, ["a.so"], tmp_path / "out")
    kept.keep(first, ["a.so"], built)
    assert not kept.restore(first, ["a.so", "b.so"], tmp_path / "out") and not (tmp_path / "out").exists()
    assert kept.restore(first, ["a.so"], tmp_path / "out") and (tmp_path / "out" / "a.so").read_text() == "a"
    kept.keep(second, ["a.so"], built)
    assert not first.exists() and second.is_dir()
