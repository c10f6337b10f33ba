"""``drcnn doctor``."""

import os
import subprocess
import sys

import pytest
import torch

import drcnn
from drcnn import doctor
from drcnn.ops import backend, backend_status
from drcnn.ops.backend import registered_operators


def test_report_names_versions_build_and_operators(capsys):
    code = doctor.main([])
    out = capsys.readouterr().out
    assert code in (0, 1)
    for word in ("Versions", "Native build", "Operators", torch.__version__, drcnn.__version__):
        assert word in out
    for op in registered_operators():
        assert op in out
    assert ("Nothing is missing" in out) == (code == 0)


def test_module_and_help():
    command = [sys.executable, "-m", "drcnn.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1) and "smooth_l1" in result.stdout, result.stderr
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "which backend serves each operator" in shown.stdout


def test_missing_library_is_reported_with_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "native_load_error", "drcnn._C was not built; run `pip install -e .`")
    monkeypatch.setattr(doctor, "native_build_info", lambda: None)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "not loaded: drcnn._C was not built" in out
    assert "What to do\n- The C++ kernels are not used: drcnn._C was not built" in out


def test_gpu_without_cuda_kernels_is_reported(monkeypatch):
    build = {"cuda": "", "architectures": [], "cuda_note": "no CUDA toolkit", "torch": "", "library": ""}
    monkeypatch.setattr(doctor, "native_load_error", None)
    monkeypatch.setattr(doctor, "native_build_info", lambda: build)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("CUDA kernels were not built (no CUDA toolkit)" in line for line in doctor.advice([]))


def test_driver_that_torch_cannot_use_is_reported(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert any("torch is a CPU build" in line for line in doctor.advice([]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert any("update the driver" in line for line in doctor.advice([]))


def test_backend_that_cannot_run_is_reported(monkeypatch):
    monkeypatch.setattr(backend._Request, "name", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines = doctor.advice(backend_status())
    causes = ("Triton runs on a CPU only in its interpreter", "the package triton is not installed")
    assert any(line.startswith(f"box_iou cannot run on cpu: {cause}") for line in lines for cause in causes)


def test_unknown_flag_is_an_error():
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--fix"])
    assert stop.value.code == 2


def test_explains_a_library_that_does_not_load(tmp_path):
    """A build for another torch must name the linker's cause, not hide it."""
    code = (
        "import sys, types; fake = types.ModuleType('drcnn._C');"
        f"fake.build_info = lambda: {{'library': {str(tmp_path / 'gone.so')!r}}};"
        "import importlib.machinery; fake.__spec__ = importlib.machinery.ModuleSpec('drcnn._C', None);"
        "sys.modules['drcnn._C'] = fake;"
        "from drcnn.ops.backend import native_load_error; print(native_load_error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=False
    )
    assert "the native library does not load" in result.stdout and "gone.so" in result.stdout, result.stderr
